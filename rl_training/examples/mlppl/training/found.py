"""With which of k rows does what was written go best? Neither a lower temperature nor a manner of writing moves it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data import Text, message_text

K = 8  # rows at a time


class Found(NamedTuple):
    """top_1: the share of texts that go best with their own row. reciprocal_rank: the mean of one over its rank. p: how
    often a random order of the rows does as well. by_row: top_1 of each row's texts."""

    top_1: float
    reciprocal_rank: float
    p: float
    by_row: list[float]


def found(scores: np.ndarray, k: int, permutations: int = 2000, seed: int = 0) -> Found:
    """Prompt ranking, Fan et al. 2018, https://arxiv.org/abs/1805.04833.

    scores: log-likelihoods [texts, rows], of text i behind row j's prompt, or of row j's reference behind text i; the
    same number of texts for each row, those of row 0 first. The rows are taken k at a time in order, and so only the
    blocks of k rows and their own texts are read: the rest may be nan.

    Rows and columns of a block are centred, so that neither a text that is likely behind everything counts, nor a row
    that everything goes with. Where rows are alike to a text, its own ranks last. p is that of a permutation test of
    the reciprocal rank, in which texts of a row stay together. Raises `ValueError` unless there are whole blocks.

    >>> found(np.array([[-1.0, -9.0], [-1.0, -2.0]]), k=2).top_1
    1.0
    """
    texts, rows = scores.shape
    each = texts // rows
    if texts % rows or rows % k or k < 2:
        raise ValueError(
            f"scores have the shape {scores.shape} and k is {k}: expected texts and k rows in whole blocks"
        )
    blocks = [scores[start * each : (start + k) * each, start : start + k] for start in range(0, rows, k)]
    centred = np.stack([block - block.mean(0) - block.mean(1, keepdims=True) + block.mean() for block in blocks])
    ranks = (centred[..., None, :] >= centred[..., :, None]).sum(-1).reshape(rows // k, k, each, k)

    def own_ranks(order: np.ndarray) -> np.ndarray:
        """[blocks, k, each] ranks of row `order[block, i]` for the texts of row i."""
        return np.take_along_axis(ranks, order[:, :, None, None], axis=3)[..., 0]

    own = own_ranks(np.tile(np.arange(k), (rows // k, 1)))
    rng = np.random.default_rng(seed)
    reached = (1 / own).mean() - 1e-12
    others = [own_ranks(rng.random((rows // k, k)).argsort(1)) for _ in range(permutations)]
    as_good = sum((1 / other).mean() >= reached for other in others)
    p, by_row = (1 + as_good) / (1 + permutations), (own == 1).mean(2).ravel().tolist()
    return Found(float((own == 1).mean()), float((1 / own).mean()), p, by_row)


def found_among(
    reward_fn, prompts: Sequence[Text], groups: Sequence[Sequence[str]], references: Sequence[Text] | None = None
) -> tuple[int, Found] | None:
    """(k, what is found) of completions, under the reward's scorer; None for fewer than two rows.

    A completion goes with a row by ln p(completion | its prompt) a token, or, with references as target, by ln p(its
    reference | its prompt, completion). Rows without a reference, and those with another one's, are left out: nothing
    could tell them apart. groups: per row its completions, equally many. `by_row` is of all rows, nan where one is left
    out.
    """
    of_reference, given = reward_fn.config.target == "reference", len(prompts)
    said = [message_text(one or "").strip() for one in references or ()] if of_reference else list(range(given))
    kept = sorted({one: row for row, one in reversed([*enumerate(said)]) if one != ""}.values())
    k = min(K, len(kept))
    if k < 2:
        return None
    kept = kept[: len(kept) - len(kept) % k]
    rows, each = len(kept), len(groups[0])
    texts = [text for row in kept for text in groups[row]]
    # Each text with the rows of its own row's block.
    cells = [(at, at // each // k * k + other) for at in range(len(texts)) for other in range(k)]
    calculator = reward_fn.calculator

    def pair(text: str, at: int):
        row = kept[at]
        if not of_reference:
            return calculator.last(prompts[row], text)
        part, _ = reward_fn.config.reference_context.extracted(text)
        return reward_fn.reference_context(prompts[row], part), message_text(references[row])

    pairs = [pair(texts[at], other) for at, other in cells]
    seen = -calculator.mean_surprisals(reward_fn.model, pairs)
    seen[np.isnan(seen)] = np.min(seen, initial=0.0, where=~np.isnan(seen))  # a blank text goes with nothing
    scores = np.zeros((len(texts), rows))
    scores[tuple(zip(*cells, strict=True))] = seen
    one = found(scores, k)
    of_kept = dict(zip(kept, one.by_row, strict=True))
    return k, one._replace(by_row=[of_kept.get(row, math.nan) for row in range(given)])
