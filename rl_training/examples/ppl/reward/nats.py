"""Log-likelihood ratio -> reward: dense, and without thresholds."""

import numpy as np

from ..definitions import NATS_CLIP


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
