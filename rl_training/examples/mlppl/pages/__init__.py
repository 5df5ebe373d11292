"""What a person looks at. Imports scoring, baselines, reward and training.

charts.py   a run's log -> line charts
run.py      a training run as one page, with run.html.j2; in a notebook, in loggers, as a table and a picture
compare.py  two runs or more side by side, with compare.html.j2: python -m mlppl.pages.compare RUN RUN
"""
