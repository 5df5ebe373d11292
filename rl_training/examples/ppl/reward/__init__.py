"""Perplexities and baselines -> the reward that GRPOTrainer calls. Imports scoring and baselines.

terms.py       perplexities and their baselines -> what each text earns, as a whole and by level
function.py    the reward function: what was written, its perplexities, its baselines, and the reward put together
loop_guard.py  a second reward function: what a loop or a copy of the prompt costs
configured.py  the reward as a YAML file describes it, for programs that take a function by its name
"""
