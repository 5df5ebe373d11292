"""The three levels as three reward functions over one scoring pass, for trainers that normalise each by itself.

TRL does so with `multi_objective_aggregation="normalize_then_sum"` (GDPO, https://arxiv.org/abs/2601.05242): each
function's rewards are normalised within their group, then weighted and added, so that a level with a large spread does
not drown one with a small spread. The weights of the levels are then the weights of the functions.

    trainer = GRPOTrainer(
        reward_funcs=reward_fn.per_level(loop_veto(tokenizer=tokenizer)),
        args=GRPOConfig(multi_objective_aggregation="normalize_then_sum", reward_weights=[0.3, 0.3, 0.4], ...),
    )

**The veto.** What loops or copies earns less, at each level, than anything that does not. Normalising within a group
keeps the order at each level, and so does a sum with weights that are not negative; so within its group, whatever the
model makes of the texts, a vetoed completion's advantage is below that of every one that is not vetoed, as long as a
level has a weight and no further reward stands beside the levels. Where a whole group is vetoed, all are alike and
nothing is learned from it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..definitions import LEVELS

Veto = Callable[..., Sequence[bool]]  # of the columns that TRL gives a reward function


class LevelReward:
    """One level's reward in TRL's calling convention; `of` is the reward function that the three share."""

    def __init__(self, level: str, scored_once: "ScoredOnce") -> None:
        self.level = level
        self._scored_once = scored_once
        self.__name__ = f"{scored_once.reward_fn.__name__}_{level}"

    @property
    def of(self):
        return self._scored_once.reward_fn

    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        return self._scored_once(self.level, prompts, completions, columns)


class ScoredOnce:
    """Scores at the first of three calls and answers the other two: by the call's arguments, each level once.

    Scored three times, the first visit of a prompt would be the first for one level only.
    """

    def __init__(self, reward_fn, veto: Veto | None) -> None:
        self.reward_fn = reward_fn
        self.veto = veto
        self._arguments: tuple | None = None
        self._open: dict[str, list[float | None]] = {}

    def __call__(self, level: str, prompts, completions, columns) -> list[float | None]:
        if level not in self._open or self._arguments != (prompts, completions):
            vetoed = None if self.veto is None else self.veto(prompts=prompts, completions=completions, **columns)
            rewards = self.reward_fn.level_rewards(prompts, completions, vetoed, **columns)
            self._arguments, self._open = (prompts, completions), dict(zip(LEVELS, rewards, strict=True))
        return self._open.pop(level)


def level_scores(reward_fn, details: Mapping, vetoed: Sequence[bool] | None = None) -> np.ndarray:
    """float64 [B, 3], each level's rewards, nan for a skipped row: for engines that call `compute_rewards` themselves.

    details: of `compute_rewards(..., return_details=True)`. vetoed: bool [B], of `loop_veto`. What is vetoed gets a
    tenth of the range less than the lowest that a level can earn; not further below, since an outlier widens its
    group's standard deviation, by which the others are divided.
    """
    values = np.stack([details["level_rewards"][level].numpy() for level in LEVELS], axis=1)
    if vetoed is None:
        return values
    veto = reward_fn.lowest - 0.1 * (reward_fn.highest - reward_fn.lowest)
    return np.where(np.asarray(vetoed, dtype=bool)[:, None] & ~np.isnan(values), veto, values)
