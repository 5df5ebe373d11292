"""A data set -> the file that the reward compares with, and that file. Imports scoring.

file.py         the file: written, read, asked by id or by prompt, compared with the scorer that is to use it
safe_pickle.py  reads a pickle of plain data, and nothing else
parts.py        work that can be killed at any moment: finished rows are kept in parts
job.py          compute_baselines_trl.py: rows, their perplexities, the loop, by any number of processes
"""
