"""Token surprisals + units -> the perplexity of each level."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .units import Units


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
