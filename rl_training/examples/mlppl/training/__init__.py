"""What the training script wires. Imports scoring, baselines and reward.

settings.py     flags and YAML files -> how models are loaded, TRL's GRPOConfig, where a stopped run goes on
job.py          what a run asks for, by names, checked before a model is loaded; Unsloth is imported here
rewards.py      the reward functions together: their weights, and how TRL calls each
policy.py       policy and scorer: loaded, and what was trained saved, merged into one model where that is asked for
trainer.py      GRPOTrainer that goes on as if it had never stopped, and its callbacks
preview.py      what a run will do, said before its first step; that step alone, for --dry_run
diagnostics.py  is there anything to learn from the rewards? Which failure it is, and the remedy
found.py        with which of k rows does what was written go best?
heldout.py      held-out prompts before and after
results.py      what they gave: heldout.json, and what changed, with standard errors
card.py         the model card, above the one that TRL writes, with card.md.j2; how to use the model, with use.md.j2
"""
