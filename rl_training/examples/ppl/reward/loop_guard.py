"""A second reward function, against loops: a text that repeats itself is easy to predict, so perplexity rewards it."""

import math
from collections.abc import Callable, Sequence

from ..definitions import DEFAULT_THRESHOLDS, NATS_CLIP
from ..errors import InputError

NGRAM = 8  # tokens; human stories repeat 0.08 % of theirs, a sentence said over and over nearly all
WEIGHT = 20.0  # times what the perplexity reward can differ by


def loop_guard(
    weight: float = WEIGHT,
    reward_thresholds: Sequence[tuple[float, float]] = DEFAULT_THRESHOLDS,
    normalized_over: int | None = None,
    form: str = "thresholds",
) -> tuple[Callable, float]:
    """(TRL's repetition penalty, its weight for GRPOConfig's `reward_weights`), to stand beside the perplexity reward.

    The penalty is minus a completion's share of repeated token n-grams, 1 - distinct / all (`NGRAM` tokens;
    `trl.rewards.get_repetition_penalty_reward`, after https://arxiv.org/abs/2502.03373). The weight is `weight` * R, R
    being what two perplexity rewards can differ by at most: from the lowest of `reward_thresholds`, or 0, to the
    highest, with `form="nats"` twice its clip, or with `normalize` over B completions the widest that standard
    deviation 1 allows, sqrt(2 (B - 1)).

    What that guarantees, whatever the model makes of the texts: of two completions, the one whose share of repeated
    n-grams is larger by more than 1 / weight earns less in sum, as its penalty outweighs R. A run of m tokens said
    over and over from some place on, l tokens of L in all, repeats at least l - m - NGRAM + 1 of its L - NGRAM + 1
    n-grams, so the guarantee holds from l = m + NGRAM - 1 + (L - NGRAM + 1) / weight on over a text without
    repetition: from a twentieth of the text beyond the first time. TRL must add the rewards up before it normalises
    them, as it does by default (`multi_objective_aggregation`).

    weight: 0 or more. normalized_over: completions in one call of a reward with `normalize=True`, else None.
    Raises `InputError` for a weight that is not finite or below 0.

    >>> penalty, weight = loop_guard()
    >>> [weight * share for share in penalty(completion_ids=[list(range(20)), [1, 2, 3, 4] * 5])]
    [0.0, -13.846153846153847]
    """
    from trl.rewards import get_repetition_penalty_reward

    check_weight(weight)
    values = [0.0, *(reward for _, reward in reward_thresholds)]
    widest = 2 * NATS_CLIP if form == "nats" else max(values) - min(values)
    if normalized_over:
        widest = math.sqrt(2 * (normalized_over - 1))
    penalty = get_repetition_penalty_reward(NGRAM, max_penalty=-1.0)
    penalty.__name__ = "loop_penalty"
    return penalty, weight * widest


def check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"--loop_penalty is {weight}, expected 0 (no guard against loops) or more, such as 20")
