"""What was measured -> what each text earns: functions of numbers and settings alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..config import MOST_HARM, NATS_KNEE, TABLE, RewardConfig

HIGHEST = 1e300  # in place of a perplexity too large for float64: means and differences stay finite


class Measured(NamedTuple):
    """Of the B texts of one call, at L levels."""

    perplexities: np.ndarray  # float64 [B, L], nan where nothing can be scored
    baselines: np.ndarray  # float64 [B, L], nan where there is none
    others: np.ndarray | None  # float64 [2, B, M, L], of M other rows' references: perplexities and baselines
    first_visit: np.ndarray  # bool [B]: rows at a prompt's first visit with no other completion to compare with
    skipped: np.ndarray  # bool [B]: rows without a baseline or a reference
    extracted: np.ndarray | None  # bool [B]: completions that `extract` matches, where there is one
    vetoed: np.ndarray | None  # bool [B]: with a veto

    @property
    def unscorable(self) -> np.ndarray:
        """bool [B]: rows without a perplexity."""
        return np.isnan(self.perplexities).any(axis=1)

    @property
    def scored(self) -> np.ndarray:
        """bool [B]: rows with a perplexity and a baseline."""
        return ~(self.skipped | self.unscorable)


class Earned(NamedTuple):
    rewards: np.ndarray  # float64 [B], nan for a skipped row
    of_levels: np.ndarray  # float64 [B, L], what each level would earn alone
    improvement: np.ndarray  # float64 [B, L], in percent
    average: np.ndarray  # float64 [B], of the levels, by their weights
    others: np.ndarray | None  # float64 [B], what was taken off for other rows' references, in the form's unit
    bent: np.ndarray | None  # bool [B]: with form="nats", those whose ratio is beyond NATS_KNEE


def earned(measured: Measured, config: RewardConfig, by_level: bool = False) -> Earned:
    """What each text earns: 0 where there is nothing to compare with yet, without a perplexity the lowest reward.

    by_level: the rewards are the sum of the levels' own, by their weights.
    """
    current, baseline, blank = measured.perplexities, measured.baselines, measured.unscorable
    weights = np.array(config.weights) / sum(config.weights)
    improvement = improvements(baseline, current)
    enough = [TABLE[level].enough for level in config.levels]
    floor = [0.0 if most is None or config.aggregation != "nested" else math.exp(-most) for most in enough]
    current, baseline = (np.maximum(values, floor) for values in (current, baseline))
    improvement[(measured.first_visit | blank) & ~measured.skipped] = 0.0
    average = improvement @ weights
    gain = nats if config.form == "nats" else improvements
    levels = gain(baseline, current)
    gained, others = levels @ weights, None
    if measured.others is not None:
        theirs = gain(measured.others[1], measured.others[0])
        # As CPMI has it (https://arxiv.org/abs/2604.10660), but for the floor.
        harm = -MOST_HARM if config.form == "nats" else 100 * (1 - math.exp(MOST_HARM))
        others = np.nanmean(np.maximum(theirs @ weights, harm), axis=1)
        gained = gained - others
        levels = levels - np.nanmean(np.maximum(theirs, harm), axis=1)
    if config.form == "nats":
        beyond = np.abs(gained) > NATS_KNEE
        rewards, of_levels = bent(gained), bent(levels)
    else:
        beyond = None
        rewards, of_levels = (threshold_rewards(values, config.reward_thresholds) for values in (gained, levels))
    for values in (rewards, of_levels):
        values[blank] = config.lowest  # no honest text earns less than a blank one
        values[measured.first_visit] = 0.0
    if measured.vetoed is not None:
        of_levels[measured.vetoed] = config.vetoed
    if by_level:
        rewards = of_levels @ weights
    for values in (rewards, of_levels):
        values[measured.skipped] = np.nan
    return Earned(rewards, of_levels, improvement, average, others, beyond)


def improvements(baseline: np.ndarray, current: np.ndarray) -> np.ndarray:
    """100 (baseline - current) / baseline, in percent, of perplexities of any shape; nan gives nan.

    >>> improvements(np.array([20.0]), np.array([19.0]))
    array([5.])
    """
    with np.errstate(over="ignore", invalid="ignore"):
        improvement = 100 * (baseline - current) / baseline
    # Floored: one text near the limit of float64 would drown every mean that is logged.
    return np.maximum(improvement, -1e9)


def nats(baseline: np.ndarray, current: np.ndarray) -> np.ndarray:
    """ln baseline - ln current, in nats a token, of perplexities of any shape; nan gives nan.

    The log form is the one that https://arxiv.org/abs/2602.03979 finds to work everywhere.

    >>> nats(np.array([20.0]), np.array([10.0])).round(3)
    array([0.693])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(baseline) - np.log(current)


def as_nats(improvement: np.ndarray | float) -> np.ndarray:
    """ln baseline - ln current, in nats a token, of improvements in percent: what is shown of nested levels, whose
    ratios make hundreds of percent of a small difference.

    >>> as_nats(np.array([50.0, -100.0])).round(3)
    array([ 0.693, -0.693])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log1p(-np.asarray(improvement) / 100)


def threshold_rewards(improvement: np.ndarray, thresholds: Sequence[tuple[float, float]]) -> np.ndarray:
    """The reward of the highest threshold reached, 0 below the lowest; of improvements in percent of any shape.

    thresholds: (improvement in %, reward), ascending. nan gives nan.

    >>> threshold_rewards(np.array([0.4, 3.0, -1.0]), ((0.5, 0.5), (3.0, 1.0)))
    array([0., 1., 0.])
    """
    improvements, values = np.array(thresholds).T
    # Rounded, so that the last bit of a float does not decide whether 3 % is 3 %.
    reached = np.searchsorted(improvements, np.round(improvement, 9), side="right")
    return np.where(np.isnan(improvement), np.nan, np.concatenate([[0.0], values])[reached])


def bent(ratio: np.ndarray) -> np.ndarray:
    """The reward: the ratio itself within K = `NATS_KNEE` of 0; beyond, 2 K - K^2 / |ratio| with its sign. It goes on
    with the same slope, always rises, and stays within 2 K, so that two rewards differ by 4 K at most.

    >>> bent(np.array([0.1, -0.5, 1.0, 50.0]))
    array([ 0.1  , -0.5  ,  0.75 ,  0.995])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.sign(ratio) * (2 * NATS_KNEE - NATS_KNEE**2 / np.abs(ratio))
    return np.where(np.abs(ratio) > NATS_KNEE, beyond, ratio)


def normalized(rewards: np.ndarray) -> np.ndarray:
    """Shifted and scaled to mean 0 and sample standard deviation 1, as `torch.std` has it; all 0 if all are equal."""
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(ddof=1)


def details_of(measured: Measured, one: Earned, levels: Sequence[str]) -> dict:
    """What `compute_rewards` returns beside the rewards: copies, as tensors."""

    def by_level(values: np.ndarray) -> dict[str, torch.Tensor]:
        return {level: torch.from_numpy(values[:, index].copy()) for index, level in enumerate(levels)}

    return {
        "rewards": torch.from_numpy(one.rewards.copy()),
        "level_rewards": by_level(one.of_levels),
        "improvements": {**by_level(one.improvement), "avg": torch.from_numpy(one.average)},
        "ppls": by_level(measured.perplexities),
        "baselines": by_level(measured.baselines),
    }
