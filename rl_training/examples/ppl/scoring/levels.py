"""Token surprisals + units -> the perplexity of each level."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import one_of
from .units import Units

_OF_UNITS = ("geometric", "arithmetic", "selective")  # nested levels are means over tokens: see nested.py
_WORST = 5  # selective, words: the most surprising one in so many


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


def level_perplexities(
    units: Units, chars: Sequence[np.ndarray], surprisals: Sequence[np.ndarray], aggregation: str
) -> np.ndarray:
    """float64 [B, 3], each text's perplexity at each level of `units.starts`: `aggregate` says how.

    chars, surprisals: per text int64 [n] offsets into it and float64 [n] nats.
    """
    all_chars = np.concatenate([offset + one for offset, one in zip(units.offsets, chars, strict=False)])
    all_surprisals = np.concatenate(surprisals)
    rates = {}
    for level, starts in units.starts.items():
        counts, sums = unit_sums(starts, all_chars, all_surprisals)
        held = np.flatnonzero(counts)
        rates[level] = starts[held], sums[held] / counts[held]
    return aggregate(units.offsets, rates, aggregation)


def aggregate(offsets: np.ndarray, rates: Mapping[str, tuple[np.ndarray, np.ndarray]], aggregation: str) -> np.ndarray:
    """float64 [B, 3], each text's perplexity at each level, from its units' rates; nan for a text without one.

    geometric: exp(mean_u r_u). arithmetic: mean_u exp(r_u). selective: exp of
        word: the mean over the fifth of the words with the highest rates, rounded up: one wrong word shows
        phrase: the median over the phrases: one wrong word does not, disorder everywhere does
        sentence: the mean over the first words of sentences: what has to follow from the sentence before
    All three give V to a uniform model of vocabulary V, and none falls when a token becomes more surprising.

    offsets: int64 [B + 1], where each text starts. rates: per level (where each unit with a token starts, int64 [U];
    r_u = S_u / n_u, its surprisal in nats a token, float64 [U]).
    """
    one_of("aggregation", aggregation, _OF_UNITS)
    result = np.empty((len(offsets) - 1, len(rates)))
    # A surprisal beyond 709 nats a token is a perplexity of inf; 0 / 0 is the nan of a text without units.
    with np.errstate(over="ignore", invalid="ignore"):
        for column, (level, (starts, values)) in enumerate(rates.items()):
            if aggregation == "arithmetic":
                result[:, column] = _mean(offsets, starts, np.exp(values))
                continue
            if aggregation == "selective":
                starts, values = _selected(offsets, rates, level)
            result[:, column] = np.exp(_mean(offsets, starts, values))
    return result


def _selected(offsets: np.ndarray, rates, level: str) -> tuple[np.ndarray, np.ndarray]:
    """The units that `selective` takes the mean of, as `rates` has them."""
    starts, values = rates[level]
    if level == "sentence":
        words, of_words = rates["word"]
        # A sentence with a token has a word with one: the next word there is.
        first = np.searchsorted(words, starts)
        return words[first], of_words[first]
    text = _text_of(offsets, starts)
    order = np.lexsort((values, text))  # ascending within each text, so `text` stays as it is
    sizes = np.bincount(text, minlength=len(offsets) - 1)[text]
    rank = np.arange(len(text)) - np.searchsorted(text, text)
    worst = rank >= sizes - -(-sizes // _WORST)
    middle = (rank == (sizes - 1) // 2) | (rank == sizes // 2)
    kept = worst if level == "word" else middle
    return starts[order[kept]], values[order[kept]]


def _text_of(offsets: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(offsets, starts, side="right") - 1


def _mean(offsets: np.ndarray, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 [B], the mean of each text's values."""
    text = _text_of(offsets, starts)
    texts = len(offsets) - 1
    return np.bincount(text, weights=values, minlength=texts) / np.bincount(text, minlength=texts)
