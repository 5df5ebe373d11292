"""Improvement in percent -> reward."""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import InputError


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
