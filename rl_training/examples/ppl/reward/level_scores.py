"""What each level alone would earn, for trainers that normalise several rewards apart (GDPO, arXiv 2601.05242)."""

import numpy as np
import torch

from ..definitions import LEVELS, NATS_CLIP
from .function import MultiLevelPPLRewardFunction
from .nats import clipped, nats


def level_scores(reward: MultiLevelPPLRewardFunction, details: dict) -> dict[str, torch.Tensor]:
    """`{"score_word": float64 [B], ...}`: the reward's own form, of one level's improvement instead of their mean.

    A text without a scored token has the lowest score there is, so that none earns less than a blank one: its
    improvement would be 0 %, which is more than most have.

    details: of `compute_rewards(..., return_details=True)`, of rows that have a baseline.
    """
    scores = {}
    for level in LEVELS:
        current = details["ppls"][level].numpy()
        if reward.form == "nats":
            ratio = nats(details["baselines"][level].numpy()[:, None], current[:, None], np.ones(1))
            values, lowest = clipped(ratio), -NATS_CLIP
        else:
            values = reward.thresholds.rewards(details["improvements"][level].numpy())
            lowest = min(0.0, reward.thresholds.values.min())
        scores[f"score_{level}"] = torch.from_numpy(np.where(np.isnan(current), lowest, values))
    return scores
