"""Which tokens of a reference count: most of a text does not depend on what a completion says, and drowns what does.

Tokens are chosen by the character that they stand for, since behind another context a text's first tokens can be
others. Those of one character, as byte-level tokenizers have them, go together. A fifth of a text is chosen, rounded
up; of equals the first. That most of a reference does not depend on what stands before it: arXiv 2602.03979,
2602.11549; the tokens that vary within the group: arXiv 2506.13351.
"""

from collections.abc import Sequence

import numpy as np

SHARE = 5  # one in so many


def hardest(chars: np.ndarray, surprisal: np.ndarray) -> np.ndarray:
    """bool [n], the tokens of the fifth of the characters with the highest surprisal.

    chars: int64 [n], ascending, the character that each token stands for. surprisal: float64 [n], nats.

    >>> hardest(np.array([0, 3, 3, 5, 8, 9, 11]), np.array([2.0, 1.5, 1.0, 0.1, 0.2, 2.4, 0.3])).tolist()
    [False, True, True, False, False, True, False]
    """
    starts, values = by_character(chars, surprisal)
    return of_characters(chars, starts, _highest(values))


def most_varied(chars: np.ndarray, group: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(characters of the text, bool whether each is of the fifth whose surprisal varies most within the group)

    chars: int64 [n], of the text without a completion. group: per completion (chars, surprisal), as `hardest` has them.
    """
    starts = np.unique(chars)
    values = np.zeros((len(group), len(starts)))
    for row, (of_row, surprisal) in zip(values, group, strict=True):
        np.add.at(row, _character(of_row, starts), surprisal)
    return starts, _highest(values.var(axis=0))


def by_character(chars: np.ndarray, surprisal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(characters that tokens stand for, int64 [m]; the sum of each one's tokens, float64 [m])"""
    starts = np.unique(chars)
    return starts, np.bincount(_character(chars, starts), weights=surprisal, minlength=len(starts))


def of_characters(chars: np.ndarray, starts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """bool [n], which tokens are of a chosen character: of the last one that starts where they do, or before."""
    return chosen[_character(chars, starts)] if len(starts) else np.zeros(len(chars), dtype=bool)


def _character(chars: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.maximum(np.searchsorted(starts, chars, side="right") - 1, 0)


def _highest(values: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[: -(-len(values) // SHARE)]] = True
    return chosen
