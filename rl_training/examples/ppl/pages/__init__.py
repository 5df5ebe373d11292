"""What a person looks at. Imports scoring, baselines, reward and training; scoring/calculator.py alone imports it.

heatmap.py  a text coloured by surprisal, with heatmap.html.j2; what all pages share, with frame.html.j2
charts.py   a run's log -> line charts
run.py      a training run as one page, with run.html.j2; in a notebook, in loggers, as a table and a picture
"""
