"""What a person looks at. Imports scoring, baselines, reward and training.

charts.py  a run's log -> line charts
run.py     a training run as one page, with run.html.j2; in a notebook, in loggers, as a table and a picture
"""
