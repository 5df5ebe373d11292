"""Token surprisals + units -> the perplexity of each level."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .batching import ID, ID_BYTES, sort_key
from .surprisal import Scorer
from .tokens import Encoded
from .units import Units


class Scores(NamedTuple):
    """What scoring some texts gives."""

    perplexities: np.ndarray  # float64 [B, L], a column a level; nan where no token is scored
    tokens: np.ndarray  # int64 [B], scored ones
    read: np.ndarray  # int64 [B], with those of all contexts and BOS
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


# Nested levels go outward: each is what the surprisal of the same tokens changes by when more stands before them.
#
#     view      given what stands before it ...          level
#     phrase    in its phrase                            word:     exp(mean)            are the words likely together
#     sentence  in its sentence                          phrase:   exp(mean difference) do the phrases help each other
#     others    behind other rows' prompts, the mean     sentence: do the sentences go together
#     prompt    behind its own prompt                    prompt:   does it belong to this prompt
#     examples  the same, behind examples before that    examples: is it written as they are
#
# Where `others` or `examples` is not asked for it is left out, and the difference is to the view before it: of the
# three inner levels alone, the last one is of the text as it stands. The means are over the scored tokens, so the
# product of all is exp(mean of the last view), the text's ordinary perplexity. What an outer view adds is its pointwise
# mutual information with the text, in nats a token: Li et al. 2016, https://arxiv.org/abs/1510.03055; for sentences,
# Sap et al. 2022, "sequentiality", PNAS.

INNER = ("phrase", "sentence")  # units that a token's surprisal is alone in


def nested_perplexities(means: np.ndarray) -> np.ndarray:
    """float64 [B, V], the levels of V views, from their mean surprisals in nats a token, outward; nan gives nan."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(np.diff(means, axis=1, prepend=0.0))


def score_views(
    scorer: Scorer, encoded: Sequence[Encoded], alone: Sequence[int], units: Units, start: Sequence[int]
) -> list[list[np.ndarray]]:
    """Per text the surprisals of its scored tokens, float64 [n] in nats: in their phrase alone and in their sentence
    alone for the texts `alone`, of which `units` are; and where they stand.

    start: the ids that stand before a unit alone, such as BOS. A unit's tokens are those of the text, not those that a
    tokenizer would make of it alone. One call of the scorer. A sequence that another one begins with is read off that
    one: equal units run once, a sentence's first phrase and a text's first sentence (without a context) not at all.
    """
    sequences = _Sequences()
    opening = sort_key(np.array(start))
    offset_of = dict(zip(alone, units.offsets.tolist(), strict=False))
    for index, one in enumerate(encoded):
        key = sort_key(one.ids)
        for level in INNER if index in offset_of else ():
            unit = np.searchsorted(units.starts[level], offset_of[index] + one.chars, side="right")
            first = np.flatnonzero(np.diff(unit, prepend=-1))
            begin, end = one.positions[first], one.positions[np.append(first, len(unit))[1:] - 1] + 1
            keys = [
                opening + key[ID_BYTES * b : ID_BYTES * e] for b, e in zip(begin.tolist(), end.tolist(), strict=True)
            ]
            sizes = np.diff(first, append=len(unit))
            sequences.ask(keys, sizes, one.positions - np.repeat(begin, sizes) + len(start))
        sequences.ask([key], [len(one.positions)], one.positions)
    scored: Iterator[np.ndarray] = iter(sequences.score(scorer))
    return [[next(scored) for _ in range(3 if index in offset_of else 1)] for index in range(len(encoded))]


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
