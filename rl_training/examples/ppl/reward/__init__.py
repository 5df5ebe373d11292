"""Perplexities and baselines -> the reward that GRPOTrainer calls. Imports scoring and baselines.

function.py      the reward function: perplexities, baselines and thresholds put together
given.py         the baselines that a call's rows are given, by columns or by the file
earned.py        perplexities and their baselines -> what each text earns, as a whole and by level
last_call.py     what a call found, for the log and for who looks on
sampled.py       what the policy wrote, as it is scored: the ids that it sampled, or their text
cache.py         perplexities already computed, for as long as the scorer's weights stay as they are
first_visits.py  without baselines: a prompt's first completions make its own
thresholds.py    improvement in percent -> reward
nats.py          log-likelihood ratio -> reward
references.py    what completions do for their references
loop_guard.py    a second reward function: what a loop or a copy of the prompt costs
query.py         OpenRLHF's prompt and completion in one string -> the completion
coalescing.py    calls that come one at a time from many threads, scored together
config.py        the reward as a YAML file describes it, for programs that take a function by its name
"""
