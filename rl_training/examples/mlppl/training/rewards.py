"""The reward functions of a run, several together: their weights, and how TRL calls each."""

import asyncio
import heapq
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..baselines.file import Baselines, check_meta
from ..config import Sampling
from ..data import Text, message_text
from ..errors import InputError
from ..reward.function import MultiLevelPPLRewardFunction
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.sampling import prompt_ids
from ..scoring.surprisal import as_scorer
from .job import Job

Reward = tuple[Any, float]  # a function in TRL's calling convention, and its weight
GUARDS = {"loop_penalty": "--loop_penalty 0", "copy_penalty": "--allow_copies"}  # what is without a guard


def weighted(job: Job, rewards: Sequence[Reward]) -> list[Reward]:
    """The rewards with the weights of --reward_weights where those are given; TRL adds them up with the same.

    The first one must be the perplexity reward, or the first three its levels: the diagnostics and the report are of
    it. Raises `InputError`, also for a guard that does not hold as the trainer adds up.
    """
    first = perplexity_rewards(rewards)[0]
    names = [name_of(function) for function, _ in rewards]
    guards = [flag for name, flag in GUARDS.items() if name in names]
    if guards and job.config.multi_objective_aggregation == "normalize_then_sum":
        raise InputError(
            "--multi_objective_aggregation normalize_then_sum normalises guards, too, which then guarantee nothing: "
            f"add --per_level, whose veto holds, or turn them off with {' '.join(guards)}"
        )
    check_window(job, first)
    if job.baselines is None and not job.reward.allow_baseline_mismatch:
        check_meta(job.column_meta, first.identity)
    prompt, made = job.train_rows["prompt"][0], job.baselines or job.column_meta
    if notice := other_sampling(made, job.sampling):
        print(notice, file=sys.stderr)
    notice = other_beginning(made, prompt, first.calculator)
    if notice and first.policy.shares_ids([prompt])[0]:  # otherwise texts are scored, as those of the baselines were
        print(notice, file=sys.stderr)
    functions = [function for function, _ in rewards]
    check_reward_weights(job.config.reward_weights, names)
    job.config.reward_weights = job.config.reward_weights or [weight for _, weight in rewards]
    return list(zip(functions, job.config.reward_weights, strict=True))


def check_window(job: Job, reward_fn: MultiLevelPPLRewardFunction) -> None:
    """Raises `InputError` if the scorer cannot read the examples before a row's prompt and a text: training would end
    at that row. The rows with the most characters are looked at."""
    calculator, of_reference = reward_fn.calculator, reward_fn.config.target == "reference"
    if not calculator.contexts.examples:
        return
    splits = [split for split in (job.train_rows, job.heldout_rows, job.eval_rows) if split is not None]
    rows = [row for split in splits for row in zip(split["prompt"], split["reference"], strict=True)]
    sizes = [len(message_text(prompt)) + of_reference * len(message_text(text or "")) for prompt, text in rows]
    longest = [rows[at] for at in heapq.nlargest(8, range(len(rows)), key=sizes.__getitem__)]
    if of_reference:
        pairs = [(reward_fn.reference_context(prompt), message_text(reference or "")) for prompt, reference in longest]
    else:
        pairs = [calculator.last(prompt, "a") for prompt, _ in longest]
    window = as_scorer(reward_fn.model, reward_fn.tokenizer).window
    calculator.refuse_cut(window, calculator.encoder.encode_pairs(pairs)[0], job.sampling.max_new_tokens)


def perplexity_rewards(rewards: Sequence[Reward]) -> list[MultiLevelPPLRewardFunction]:
    """The reward that stands first, or its levels (`per_level`). Raises `InputError` if another one does."""
    functions = [function for function, _ in rewards]
    if isinstance(functions[0], MultiLevelPPLRewardFunction) and functions[0].level is None:
        return functions[:1]
    levels = functions[0].config.levels if isinstance(functions[0], MultiLevelPPLRewardFunction) else (None,)
    if tuple(getattr(function, "level", None) for function in functions[: len(levels)]) == levels:
        return functions[: len(levels)]
    first = name_of(functions[0])
    raise InputError(f"the first reward is {first}, expected the perplexity reward, or its three levels: put it first")


def other_beginning(baselines: Baselines, prompt: Text, calculator: MultiLevelPPLCalculator) -> str | None:
    """What to say if the baselines are of texts behind a BOS token that the policy is not given.

    A text behind a string is scored after BOS where the tokenizer has one; what a policy sampled is scored after the
    ids it was given, and GPT-2's kind of tokenizer puts no BOS before them. With SmolLM2-135M and 16 stories behind
    two sentences the perplexities with and without it differ by 1.7 % (standard deviation), 3.8 % at most.
    """
    if calculator.contexts.reads_as_text(prompt):  # as those of the baselines were
        return None
    start = calculator.encoder.start
    of_texts = baselines.meta.get("target") == "completion" and baselines.meta.get("generated") is None
    given = prompt_ids([prompt], calculator.tokenizer, **calculator.chat)[0]
    if not start or not of_texts or given[:1] == start[:1]:
        return None
    return (
        f"{baselines.source}: these baselines are of texts behind {calculator.tokenizer.decode(start)}, which this "
        "tokenizer does not put before a prompt, so completions are scored without it, some percent higher or lower: "
        "baselines of the model's own writing, compute_baselines_trl.py --generate 4, are scored as completions are"
    )


def other_sampling(baselines: Baselines, sampling: Sampling) -> str | None:
    """What to say if the baselines are of completions that were sampled otherwise than the run samples."""
    made = baselines.meta.get("generated")
    differing = sampling.differences(made) if made else {}
    if not differing:
        return None
    theirs, mine = (", ".join(f"{name} {both[side]}" for name, both in differing.items()) for side in (0, 1))
    return (
        f"{baselines.source}: these baselines are of completions sampled with {theirs}, and this run samples with "
        f"{mine}, so that what it earns is the difference in sampling, too: make them again with this run's flags"
    )


def check_reward_weights(weights: Sequence[float] | None, names: Sequence[str]) -> None:
    """Raises `InputError` unless GRPOConfig's `reward_weights`, where given, has one for each reward function."""
    if weights is not None and len(weights) != len(names):
        raise InputError(
            f"--reward_weights holds {len(weights)} number(s), expected {len(names)}: of {', '.join(names)}"
        )


def name_of(function: Callable) -> str:
    """The name TRL logs it under."""
    return getattr(function, "__name__", type(function).__name__)


def call_as_trl(
    functions: Sequence[Callable],
    prompts: Sequence[Text],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence],
    state,
) -> list[np.ndarray]:
    """Of each function float64 [B], nan for None: called as GRPOTrainer does outside of training, nothing logged.

    texts: what was written; behind chat prompts each becomes an assistant's message. columns: all of the data set's.
    state: the trainer's.
    """
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    others = {name: values for name, values in columns.items() if name != "prompt"}
    results = []
    for function in functions:
        rewards = function(
            prompts=list(prompts),
            completions=completions,
            completion_ids=list(completion_ids),
            **others,
            trainer_state=state,
            log_extra=lambda column, values: None,
            log_metric=lambda name, value: None,
        )
        if inspect.isawaitable(rewards):
            with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has a loop that runs
                rewards = thread.submit(asyncio.run, _awaited(rewards)).result()
        if len(rewards) != len(texts):
            raise ValueError(f"reward {name_of(function)} gave {len(rewards)} numbers for {len(texts)} completions")
        results.append(np.array([np.nan if reward is None else reward for reward in rewards], dtype=float))
    return results


async def _awaited(one):
    return await one
