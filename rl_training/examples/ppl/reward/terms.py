"""What was measured -> what each text earns: functions of numbers and settings alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..config import LEVELS, NATS_CLIP, RewardConfig

HIGHEST = 1e300  # in place of a perplexity too large for float64: means and differences stay finite


class Measured(NamedTuple):
    """Of B texts of one call."""

    perplexities: np.ndarray  # float64 [B, 3], nan where nothing can be scored
    baselines: np.ndarray  # float64 [B, 3], nan where there is none
    first_visit: np.ndarray  # bool [B]: rows that make their prompt's baseline
    skipped: np.ndarray  # bool [B]: rows without a baseline or a reference
    extracted: np.ndarray  # bool [B]: completions that `extract` matches
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
    of_levels: np.ndarray  # float64 [B, 3], what each level would earn alone
    improvement: np.ndarray  # float64 [B, 3], in percent
    average: np.ndarray  # float64 [B], of the levels, by their weights
    clipped: np.ndarray | None  # bool [B]: with form="nats", those whose ratio is beyond NATS_CLIP


def earned(measured: Measured, config: RewardConfig, by_level: bool = False) -> Earned:
    """What each text earns. A first visit earns 0; a text without a perplexity 0 with thresholds, the lowest reward
    with nats and at each level. by_level: the rewards are the sum of the levels' own, by their weights."""
    current, baseline, unscorable = measured.perplexities, measured.baselines, measured.unscorable
    weights = np.array(config.weights)
    with np.errstate(over="ignore", invalid="ignore"):
        improvement = 100 * (baseline - current) / baseline
    # Floored: one text near the limit of float64 would drown every mean that is logged.
    improvement = np.maximum(improvement, -1e9)
    improvement[(measured.first_visit | unscorable) & ~measured.skipped] = 0.0
    average = improvement @ weights / weights.sum()
    if config.form == "nats":
        ratio = nats(baseline, current, weights)
        beyond = np.abs(ratio) > NATS_CLIP
        rewards = clipped(ratio)
        rewards[unscorable] = config.lowest  # no honest text earns less than a blank one
        with np.errstate(divide="ignore", invalid="ignore"):
            of_levels = clipped(np.log(baseline) - np.log(current))
    else:
        beyond = None
        rewards = threshold_rewards(average, config.reward_thresholds)
        rewards[unscorable] = 0.0
        of_levels = threshold_rewards(improvement, config.reward_thresholds)
    of_levels[unscorable] = config.lowest
    for values in (rewards, of_levels):
        values[measured.first_visit] = 0.0
    if measured.vetoed is not None:
        of_levels[measured.vetoed] = config.vetoed
    if by_level:
        rewards = of_levels @ weights / weights.sum()
    for values in (rewards, of_levels):
        values[measured.skipped] = np.nan
    return Earned(rewards, of_levels, improvement, average, beyond)


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


def normalized(rewards: np.ndarray) -> np.ndarray:
    """Shifted and scaled to mean 0 and sample standard deviation 1, as `torch.std` has it; all 0 if all are equal."""
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std(ddof=1)


def details_of(measured: Measured, one: Earned) -> dict:
    """What `compute_rewards` returns beside the rewards: copies, as tensors."""
    return {
        "rewards": torch.from_numpy(one.rewards.copy()),
        "level_rewards": _by_level(one.of_levels),
        "improvements": {**_by_level(one.improvement), "avg": torch.from_numpy(one.average)},
        "ppls": _by_level(measured.perplexities),
        "baselines": _by_level(measured.baselines),
    }


def _by_level(values: np.ndarray) -> dict[str, torch.Tensor]:
    return {level: torch.from_numpy(values[:, index].copy()) for index, level in enumerate(LEVELS)}
