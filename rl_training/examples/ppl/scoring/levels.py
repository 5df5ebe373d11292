"""Token surprisals + units -> the perplexity of each level."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .batching import ID, ID_BYTES, sort_key
from .surprisal import Scorer
from .tokens import Encoded
from .units import Units

# --- levels ----------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What scoring some texts gives."""

    perplexities: np.ndarray  # float64 [B, 3], in the order of `LEVELS`; nan where no token is scored
    tokens: np.ndarray  # int64 [B], scored ones
    read: np.ndarray  # int64 [B], with those of the context and BOS
    longest: int  # of one pass, in tokens; 0 without any text


def unit_sums(starts: np.ndarray, chars: np.ndarray, surprisal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and total surprisal of each unit.

    starts: int64 [U], where the units start; chars: int64 [n], the character each token stands for;
    surprisal: float64 [n], nats. Returns (n_u int64 [U], S_u float64 [U]); a unit no token starts in has n_u = 0.
    """
    unit = np.searchsorted(starts, chars, side="right") - 1
    return np.bincount(unit, minlength=len(starts)), np.bincount(unit, weights=surprisal, minlength=len(starts))


def level_perplexities(units: Units, chars: Sequence[np.ndarray], surprisals: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [B, 3], each text's perplexity at each level of `units.starts`, nan for a text without a token.

    exp(mean_u r_u) over the units u in which a token starts; r_u = S_u / n_u is a unit's surprisal in nats a token.
    (Nested levels are means over tokens: see nested.py.)

    chars, surprisals: per text int64 [n] offsets into it and float64 [n] nats.
    """
    all_chars = np.concatenate([offset + one for offset, one in zip(units.offsets, chars, strict=False)])
    all_surprisals = np.concatenate(surprisals)
    texts = len(units.offsets) - 1
    result = np.empty((texts, len(units.starts)))
    for column, starts in enumerate(units.starts.values()):
        counts, sums = unit_sums(starts, all_chars, all_surprisals)
        held = np.flatnonzero(counts)
        text = np.searchsorted(units.offsets, starts[held], side="right") - 1
        # A surprisal beyond 709 nats a token is a perplexity of inf; 0 / 0 is the nan of a text without units.
        with np.errstate(over="ignore", invalid="ignore"):
            totals = np.bincount(text, weights=sums[held] / counts[held], minlength=texts)
            result[:, column] = np.exp(totals / np.bincount(text, minlength=texts))
    return result


# --- nested ----------------------------------------------------------------------------------------------------------

# Nested levels: each token's surprisal in its phrase alone, in its sentence alone, and where it stands.
#
#     a_t  given what stands before it in its phrase     word level:     exp(mean a)      are the words likely together
#     b_t  given what stands before it in its sentence   phrase level:   exp(mean b - a)  do the phrases help each other
#     c_t  given the context and all before it           sentence level: exp(mean c - b)  do the sentences, the context
#
# The means are over the scored tokens, so the product of the three is exp(mean c), the text's ordinary perplexity. What
# an outer scope adds is its pointwise mutual information with the inner one, in nats a token: Li et al. 2016,
# https://arxiv.org/abs/1510.03055; for sentences, Sap et al. 2022, "sequentiality", PNAS.

SCOPES = {"a": "phrase", "b": "sentence"}  # which unit a token's surprisal is alone in; c is that of the text


class Scopes(NamedTuple):
    """Surprisals of the scored tokens of each text, float64 [n] in nats: three views of the same tokens."""

    a: list[np.ndarray]
    b: list[np.ndarray]
    c: list[np.ndarray]


def score_scopes(scorer: Scorer, encoded: Sequence[Encoded], units: Units, start: int) -> Scopes:
    """All three from one call of the scorer.

    start: the id that stands before a unit alone: BOS. A unit's tokens are those of the text, not those that a
    tokenizer would make of it alone.

    A sequence that another one begins with is read off that one: equal units run once, a sentence's first phrase and a
    text's first sentence (without a context) not at all.
    """
    sequences = _Sequences()
    opening = sort_key(np.array([start]))
    for one, offset in zip(encoded, units.offsets.tolist(), strict=False):
        key = sort_key(one.ids)
        for level in SCOPES.values():
            unit = np.searchsorted(units.starts[level], offset + one.chars, side="right")
            first = np.flatnonzero(np.diff(unit, prepend=-1))
            begin, end = one.positions[first], one.positions[np.append(first, len(unit))[1:] - 1] + 1
            keys = [
                opening + key[ID_BYTES * b : ID_BYTES * e] for b, e in zip(begin.tolist(), end.tolist(), strict=True)
            ]
            sizes = np.diff(first, append=len(unit))
            sequences.ask(keys, sizes, one.positions - np.repeat(begin, sizes) + 1)
        sequences.ask([key], [len(one.positions)], one.positions)
    surprisals = sequences.score(scorer)
    return Scopes(surprisals[0::3], surprisals[1::3], surprisals[2::3])


def nested_perplexities(scopes: Scopes) -> np.ndarray:
    """float64 [B, 3], of word, phrase and sentence; nan for a text without a scored token."""
    means = np.array([[one.mean() if len(one) else np.nan for one in scope] for scope in scopes])
    a, b, c = means.reshape(3, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(np.stack([a, b - a, c - b], axis=1))


class _Sequences:
    """Sequences of ids, equal ones once. One that another begins with is part of that one."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._asked: list[tuple[np.ndarray, np.ndarray]] = []

    def ask(self, keys: Sequence[bytes], sizes: Sequence[int], positions: np.ndarray) -> None:
        """For the surprisals of tokens, `sizes` of them of each of the sequences `keys`, at `positions` of it."""
        numbers = [self._numbers.setdefault(key, len(self._numbers)) for key in keys]
        self._asked.append((np.repeat(np.array(numbers, dtype=np.int64), sizes), positions))

    def score(self, scorer: Scorer) -> list[np.ndarray]:
        """float64 [n] nats for each call of `ask`."""
        # Sorted, what begins with a sequence follows it directly; backwards, the longest comes before its beginnings.
        whole: list[bytes] = []
        offsets = np.zeros(len(self._numbers), dtype=np.int64)  # by number, where the sequence is in `whole`
        size, following = 0, b""
        for key in sorted(self._numbers, reverse=True):
            if not following.startswith(key):
                whole.append(key)
                size += len(key) // ID_BYTES
            offsets[self._numbers[key]] = size - len(whole[-1]) // ID_BYTES if whole else 0
            following = key
        indices = [offsets[numbers] + positions for numbers, positions in self._asked]
        wanted = np.zeros(size, dtype=bool)
        for one in indices:
            wanted[one] = True
        texts, begin = [], 0
        for key in whole:
            ids = np.frombuffer(key, dtype=ID).astype(np.int64)
            scored = np.flatnonzero(wanted[begin : begin + len(ids)])
            texts.append(Encoded(ids, scored, scored))  # whose characters are nobody's business
            begin += len(ids)
        surprisals = np.zeros(size)
        surprisals[wanted] = np.concatenate([np.empty(0), *scorer.score(texts)])
        return [surprisals[one] for one in indices]
