"""Perplexities and their baselines -> what each text earns, as a whole and by level."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..definitions import LEVELS, NATS_CLIP
from .nats import clipped, nats

HIGHEST = 1e300  # in place of a perplexity too large for float64: means and differences stay finite


class Earned(NamedTuple):
    rewards: np.ndarray  # float64 [B], nan for a skipped row; of a level's function the sum of the levels
    of_levels: np.ndarray  # float64 [B, 3], what each level would earn alone
    improvement: np.ndarray  # float64 [B, 3], in percent
    average: np.ndarray  # float64 [B], of the levels, by their weights
    clipped: np.ndarray | None  # bool [B]: with form="nats", those whose ratio is beyond NATS_CLIP


def earned(
    reward_fn,
    current: np.ndarray,
    baseline: np.ndarray,
    first_visit: np.ndarray,
    skipped: np.ndarray,
    unscorable: np.ndarray,
    vetoed: Sequence[bool] | None = None,
) -> Earned:
    """current, baseline: float64 [B, 3]. first_visit: bool [B], rows that make their prompt's baseline: they earn 0.
    unscorable: bool [B], rows without a perplexity. vetoed: bool [B], rows that get `reward_fn.vetoed` at each level.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        improvement = 100 * (baseline - current) / baseline
    # Floored: one text near the limit of float64 would drown every mean that is logged.
    improvement = np.maximum(improvement, -1e9)
    improvement[(first_visit | unscorable) & ~skipped] = 0.0
    average = improvement @ reward_fn.weights / reward_fn.weights.sum()
    if reward_fn.form == "nats":
        ratio = nats(baseline, current, reward_fn.weights)
        beyond = np.abs(ratio) > NATS_CLIP
        rewards = clipped(ratio)
        rewards[unscorable] = -NATS_CLIP  # no honest text earns less than a blank one
        with np.errstate(divide="ignore", invalid="ignore"):
            of_levels = clipped(np.log(baseline) - np.log(current))
    else:
        beyond = None
        rewards = reward_fn.thresholds.rewards(average)
        rewards[unscorable] = 0.0
        of_levels = reward_fn.thresholds.rewards(improvement)
    of_levels[unscorable] = reward_fn.lowest
    for values in (rewards, of_levels):
        values[first_visit] = 0.0
    if vetoed is not None:
        of_levels[np.asarray(vetoed, dtype=bool)] = reward_fn.vetoed
    if reward_fn.level is not None:
        rewards = of_levels @ reward_fn.weights / reward_fn.weights.sum()
    for values in (rewards, of_levels):
        values[skipped] = np.nan
    return Earned(rewards, of_levels, improvement, average, beyond)


def details_of(one: Earned, current: np.ndarray, baseline: np.ndarray) -> dict:
    """What `compute_rewards` returns beside the rewards: copies, as tensors."""
    return {
        "rewards": torch.from_numpy(one.rewards.copy()),
        "level_rewards": _by_level(one.of_levels),
        "improvements": {**_by_level(one.improvement), "avg": torch.from_numpy(one.average)},
        "ppls": _by_level(current),
        "baselines": _by_level(baseline),
    }


def _by_level(values: np.ndarray) -> dict[str, torch.Tensor]:
    return {level: torch.from_numpy(values[:, index].copy()) for index, level in enumerate(LEVELS)}
