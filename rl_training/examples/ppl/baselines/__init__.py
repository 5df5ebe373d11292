"""A data set -> the file that the reward compares with, and that file. Imports scoring.

file.py         the file as the reward asks it: by id or by prompt
formats.py      pickle and JSON: written, read, and what they may hold
meta.py         what the file was made with
mismatch.py     whether it fits a scorer, and the command that makes the one that does
safe_pickle.py  reads a pickle of plain data, and nothing else
run.py          compute_baselines_trl.py: the loop, by any number of processes, from wherever it stopped
plan.py         what can be refused before a model is loaded
rows.py         a data set as it comes -> rows with text and an id
scores.py       rows -> their perplexities
parts.py        work that can be killed at any moment: finished rows are kept in parts
assemble.py     parts -> the file, its meta file, the data set with baselines, the statistics
plot.py         the distribution of the levels, as a picture
"""
