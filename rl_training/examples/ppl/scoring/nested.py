"""Nested levels: each token's surprisal in its phrase alone, in its sentence alone, and where it stands.

    a_t  given what stands before it in its phrase      word level:     exp(mean a)       are the words likely together
    b_t  given what stands before it in its sentence    phrase level:   exp(mean b - a)   do the phrases help each other
    c_t  given the context and all before it            sentence level: exp(mean c - b)   do the sentences, the context

The means are over the scored tokens, so the product of the three is exp(mean c), the text's ordinary perplexity. What
an outer scope adds is its pointwise mutual information with the inner one, in nats a token: Li et al. 2016,
https://arxiv.org/abs/1510.03055; for sentences, Sap et al. 2022, "sequentiality", PNAS.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .surprisal import SurprisalScorer
from .tokens import Encoded
from .units import Units

SCOPES = {"a": "phrase", "b": "sentence"}  # which unit a token's surprisal is alone in; c is that of the text


class Scopes(NamedTuple):
    """Surprisals of the scored tokens of each text, float64 [n] in nats: three views of the same tokens."""

    a: list[np.ndarray]
    b: list[np.ndarray]
    c: list[np.ndarray]


def score_scopes(scorer: SurprisalScorer, encoded: Sequence[Encoded], units: Units, start: int) -> Scopes:
    """All three from one call of the scorer.

    start: the id of the token that stands before a unit alone. A unit's tokens are those of the text, not those that a
    tokenizer would make of it alone.

    A sequence that another one begins with is read off that one: equal units run once, a sentence's first phrase and a
    text's first sentence (without a context) not at all.
    """
    asked: list[Encoded] = list(encoded)
    owners = [(None, text, slice(None)) for text in range(len(encoded))]
    for name, level in SCOPES.items():
        for text, (one, offset) in enumerate(zip(encoded, units.offsets.tolist(), strict=False)):
            if not len(one.positions):
                continue
            unit = np.searchsorted(units.starts[level], offset + one.chars, side="right")
            edges = np.flatnonzero(np.diff(unit, prepend=-1, append=-1))
            for first, last in pairwise(edges.tolist()):
                asked.append(_alone(one, first, last, start))
                owners.append((name, text, slice(first, last)))
    scopes = Scopes(*([np.zeros(len(one.positions)) for one in encoded] for _ in Scopes._fields))
    for (name, text, tokens), values in zip(owners, _score_once(scorer, asked), strict=True):
        getattr(scopes, name or "c")[text][tokens] = values
    return scopes


def nested_perplexities(scopes: Scopes) -> np.ndarray:
    """float64 [B, 3], of word, phrase and sentence; nan for a text without a scored token."""
    means = np.array([[one.mean() if len(one) else np.nan for one in scope] for scope in scopes])
    a, b, c = means.reshape(3, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(np.stack([a, b - a, c - b], axis=1))


def _alone(text: Encoded, first: int, last: int, start: int) -> Encoded:
    """Scored tokens `first` .. `last` of a text, and what stands between them, behind nothing but `start`."""
    positions = text.positions[first:last]
    ids = text.ids[positions[0] : positions[-1] + 1]
    return Encoded(np.concatenate([[start], ids]), positions - positions[0] + 1, text.chars[first:last])


def _score_once(scorer: SurprisalScorer, asked: Sequence[Encoded]) -> list[np.ndarray]:
    """As `scorer.score(asked)`: what is the beginning of another sequence is read off the longest of them."""
    keys = [one.ids.astype(">u4").tobytes() for one in asked]
    # Sorted, whatever begins with a sequence follows it directly.
    order = sorted(range(len(asked)), key=keys.__getitem__)
    whole = {}  # number of a sequence -> number of the one that it is read off
    for index, following in zip(reversed(order), [None, *reversed(order)], strict=False):
        is_begun = following is not None and keys[following].startswith(keys[index])
        whole[index] = whole[following] if is_begun else index
    wanted: dict[int, list[np.ndarray]] = {}
    for index, longest in whole.items():
        wanted.setdefault(longest, []).append(asked[index].positions)
    positions = {longest: np.unique(np.concatenate(parts)) for longest, parts in wanted.items()}
    # A sequence's characters are nobody's business here.
    surprisals = scorer.score([Encoded(asked[longest].ids, at, at) for longest, at in positions.items()])
    values = dict(zip(positions, surprisals, strict=True))
    return [
        values[whole[index]][np.searchsorted(positions[whole[index]], one.positions)] for index, one in enumerate(asked)
    ]
