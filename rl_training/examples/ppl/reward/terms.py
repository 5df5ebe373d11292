"""Improvement in percent -> reward."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..config import LEVELS, NATS_CLIP
from ..errors import InputError

# --- thresholds ------------------------------------------------------------------------------------------------------


class Thresholds:
    """The reward of the highest threshold reached, 0 below the lowest.

    points: (improvement in %, reward) in any order. Raises `InputError` if one is not finite or stands twice.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        points = sorted((float(improvement), float(reward)) for improvement, reward in points)
        if not points:
            raise InputError("reward_thresholds is empty, expected at least one (improvement %, reward)")
        if bad := [point for point in points if not all(map(math.isfinite, point))]:
            raise InputError(f"reward_thresholds holds {bad[0]}, expected finite numbers")
        self.improvements, self.values = np.array(points).T
        if (twice := self.improvements[1:][np.diff(self.improvements) == 0]).size:
            raise InputError(f"reward_thresholds holds {twice[0]:g} % twice, expected each improvement once")

    @property
    def highest(self) -> float:
        return float(self.values.max())

    @property
    def lowest(self) -> float:
        return float(self.values.min())

    def rewards(self, improvement: np.ndarray) -> np.ndarray:
        """As many rewards as improvements, in percent, whatever their shape; nan gives nan."""
        # Rounded, so that the last bit of a float does not decide whether 3 % is 3 %.
        improvement = np.round(improvement, 9)
        reached = np.searchsorted(self.improvements, improvement, side="right")
        return np.where(np.isnan(improvement), np.nan, np.concatenate([[0.0], self.values])[reached])


def checked_weights(weights: Sequence[float]) -> np.ndarray:
    """float64 [3], of word, phrase and sentence. Raises `InputError` unless finite, not negative and not all 0."""
    values = np.array(weights, dtype=float)
    if values.shape != (3,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise InputError(f"weights are {tuple(weights)}, expected (word, phrase, sentence), none negative, not all 0")
    return values


def normalized(rewards: np.ndarray) -> np.ndarray:
    """Shifted and scaled to mean 0 and sample standard deviation 1, as `torch.std` has it; all 0 if all are equal."""
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(ddof=1)


# --- nats ------------------------------------------------------------------------------------------------------------

# Log-likelihood ratio -> reward: dense, and without thresholds.


def nats(baseline: np.ndarray, current: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [B]: sum_l w_l (ln baseline_l - ln current_l) / sum_l w_l, in nats a token; nan gives nan.

    The log form is the one that https://arxiv.org/abs/2602.03979 finds to work everywhere.

    baseline, current: float64 [B, 3], perplexities. weights: float64 [3].

    >>> nats(np.array([[20.0, 20.0, 20.0]]), np.array([[10.0, 20.0, 20.0]]), np.array([1.0, 1.0, 2.0])).round(3)
    array([0.173])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.log(baseline) - np.log(current)) @ weights / weights.sum()


def clipped(ratio: np.ndarray) -> np.ndarray:
    """The reward: the ratio within `NATS_CLIP` of 0, so that two rewards differ by twice that at most.

    >>> clipped(np.array([0.1, -3.0, 0.7]))
    array([ 0.1, -0.5,  0.5])
    """
    return np.clip(ratio, -NATS_CLIP, NATS_CLIP)


# --- earned ----------------------------------------------------------------------------------------------------------

# Perplexities and their baselines -> what each text earns, as a whole and by level.

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
