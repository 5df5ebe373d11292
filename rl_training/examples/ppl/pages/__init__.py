"""What a person looks at. Imports scoring, baselines, reward and training; scoring/explained.py alone imports it.

frame.py       what the HTML pages share, with frame.html.j2
heatmap.py     a text coloured by surprisal, with heatmap.html.j2
run.py         a training run as one page, with run.html.j2
charts.py      a run's log -> line charts
notebook.py    pages in a notebook: framed, and the curves of a run that goes on
loggers.py     the report in Weights & Biases, TensorBoard and trackio
comparison.py  before and after as a table, and the reward's curve as a picture
"""
