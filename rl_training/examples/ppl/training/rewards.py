"""The reward functions of a run, several together: their weights, and how TRL calls each."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..baselines.file import check_meta
from ..data import Text
from ..errors import InputError
from ..reward.function import MultiLevelPPLRewardFunction
from .diagnostics import Diagnostics
from .job import Job

_NO_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL gives them under names of its own
Reward = tuple[Any, float]  # a function in TRL's calling convention, and its weight


def weighted(job: Job, rewards: Sequence[Reward]) -> list[Reward]:
    """The rewards with the weights of --reward_weights where those are given; TRL adds them up with the same.

    The first one must be the perplexity reward: the diagnostics and the report are of it. Raises `InputError`.
    """
    first = rewards[0][0]
    if not isinstance(first, MultiLevelPPLRewardFunction):
        raise InputError(f"the first reward is {name_of(first)}, expected the perplexity reward: put it first")
    if job.baselines is None and not job.args.allow_baseline_mismatch:
        check_meta(job.column_meta, first.identity)
    first.observer = Diagnostics()
    functions = [function for function, _ in rewards]
    check_reward_weights(job.config.reward_weights, list(map(name_of, functions)))
    job.config.reward_weights = job.config.reward_weights or [weight for _, weight in rewards]
    return list(zip(functions, job.config.reward_weights, strict=True))


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
    function: Callable,
    prompts: Sequence[Text],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence],
    state,
) -> np.ndarray:
    """float64 [B], nan for None: a reward function called as GRPOTrainer does outside of training, nothing logged.

    texts: what was written; behind chat prompts each becomes an assistant's message. columns: all of the data set's.
    state: the trainer's.
    """
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    others = {
        name: values for name, values in columns.items() if name not in ("prompt", "completion", "completion_ids")
    }
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
    return np.array([np.nan if reward is None else reward for reward in rewards], dtype=float)


async def _awaited(one):
    return await one
