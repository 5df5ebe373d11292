"""How often texts say the same again."""

from collections.abc import Sequence

from .data import message_text


def distinct(texts: Sequence[str], n: int) -> float:
    """Mean over texts of their distinct runs of n words over all their runs of n words: 1 says nothing twice.

    Source: Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055, within each text.
    nan if no text has n words.
    """
    shares = []
    for text in texts:
        words = message_text(text).lower().split()
        runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        if runs:
            shares.append(len(set(runs)) / len(runs))
    return sum(shares) / len(shares) if shares else float("nan")


def described(texts: Sequence[str]) -> dict[str, float]:
    """What held-out tables say of texts themselves.

    >>> described(["a b a b a", "c d"])
    {'distinct-2': 0.75, 'repetition': 0.33333333333333337, 'words': 3.5}
    """
    return {
        "distinct-2": distinct(texts, 2),
        "repetition": 1 - distinct(texts, 3),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }
