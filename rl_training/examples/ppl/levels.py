"""Token surprisals + units -> the perplexity of each level."""

from collections.abc import Sequence

import numpy as np

from .units import Units

AGGREGATIONS = ("geometric", "arithmetic")


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
    """float64 [B, 3], each text's perplexity at each level of `units.starts`: one vote a unit.

    geometric: exp(mean_u S_u / n_u). arithmetic: mean_u exp(S_u / n_u). nan for a text without a scored token.

    chars, surprisals: per text int64 [n] offsets into it and float64 [n] nats.
    """
    all_chars = np.concatenate([offset + one for offset, one in zip(units.offsets, chars, strict=False)])
    all_surprisals = np.concatenate(surprisals)
    result = np.empty((len(chars), len(units.starts)))
    # A surprisal beyond 709 nats a token is a perplexity of inf; 0 / 0 is the nan of a text without units.
    with np.errstate(over="ignore", invalid="ignore"):
        for column, starts in enumerate(units.starts.values()):
            counts, sums = unit_sums(starts, all_chars, all_surprisals)
            held = np.flatnonzero(counts)
            rates = sums[held] / counts[held]
            text = np.searchsorted(units.offsets, starts[held], side="right") - 1
            votes = np.bincount(text, minlength=len(chars))
            if aggregation == "geometric":
                result[:, column] = np.exp(np.bincount(text, weights=rates, minlength=len(chars)) / votes)
            else:
                result[:, column] = np.bincount(text, weights=np.exp(rates), minlength=len(chars)) / votes
    return result
