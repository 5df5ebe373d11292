"""Perplexities and baselines -> the reward that GRPOTrainer calls. Imports scoring and baselines.

terms.py       perplexities and their baselines -> what each text earns, as a whole and by level
function.py    the reward function: perplexities, baselines and the reward put together
written.py     what the policy wrote, as it is scored: sampled ids, or their text
memory.py      what the function keeps from call to call: perplexities, and each prompt's first ones
loop_guard.py  reward functions beside it: what a loop, a copy of the prompt or a quotation costs
configured.py  the reward as a YAML file describes it, for programs that take a function by its name
"""
