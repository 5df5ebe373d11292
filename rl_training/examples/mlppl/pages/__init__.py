"""What a person looks at. Imports scoring, baselines, reward and training.

charts.py   a run's log -> line charts
run.py      a training run as one page, with run.html.j2; in a notebook, in loggers, as a picture
compare.py  a table and texts, of a run or of several side by side, with compare.html.j2
"""
