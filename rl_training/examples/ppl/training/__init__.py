"""What the training script wires. Imports scoring, baselines and reward.

flags.py        flags and YAML, checked by name
config.py       flags -> how models are loaded, the reward's settings, TRL's GRPOConfig
trl_settings.py fields of GRPOConfig that cannot work, by asking TRL
job.py          what is asked for, checked before a model is loaded
plan.py         batch, accumulation and group size that TRL accepts
load.py         policy and scorer: loaded, and what was trained saved
rewards.py      the reward functions together: their weights, and how TRL calls each
trainer.py      GRPOTrainer that goes on as if it had never stopped
callbacks.py    progress in one line, the reward's state in a checkpoint, an orderly end on a signal
resume.py       where a stopped run goes on, and the command for it
diagnostics.py  is there anything to learn from the rewards? Which failure it is, and the remedy
heldout.py      held-out prompts before and after
card.py         the model card, above the one that TRL writes, with card.md.j2
merge.py        adapter and weights -> one model
"""
