"""References measured by some of their tokens: which ones, and what they give with and without a completion."""

from collections.abc import Sequence

import numpy as np

from ..chat import Turn
from ..errors import InputError
from ..processes import from_all
from ..scoring.calculator import MultiLevelPPLCalculator, Viewed
from ..scoring.selection import by_character, hardest, most_varied, of_characters


def of_some_tokens(
    calculator: MultiLevelPPLCalculator, model, tokens: str, behind: Sequence[Turn], alone: Sequence[Turn]
) -> tuple[np.ndarray, np.ndarray]:
    """(perplexities of references behind prompt and completion, the same behind the prompt alone), float64 [B, 3] each,
    both over the same tokens.

    tokens: "hard", the fifth that surprises most behind the prompt alone; "group", the fifth whose surprisal varies
    most over the completions of a prompt with a reference, those of this call in all processes. behind, alone:
    (context, reference) of each row. Raises `InputError` for a group of one completion.
    """
    viewed = calculator.view(model, [*behind, *alone])
    with_text, without = viewed[: len(behind)], viewed[len(behind) :]
    if tokens == "hard":
        chosen = {pair: _hardest(one) for pair, one in zip(alone, without, strict=True)}
    else:
        chosen = _varied(alone, with_text, without)
    targets = [target for _, target in alone]

    def measured(rows: Sequence[Viewed]) -> np.ndarray:
        kept = [one.only(of_characters(one.chars, *chosen[pair])) for one, pair in zip(rows, alone, strict=True)]
        return calculator.perplexities_of(targets, kept)

    return measured(with_text), measured(without)


def _hardest(one: Viewed) -> tuple[np.ndarray, np.ndarray]:
    starts, counts = by_character(one.chars, hardest(one.chars, one.views[-1]).astype(float))
    return starts, counts > 0


def _varied(alone: Sequence[Turn], with_text: Sequence[Viewed], without: Sequence[Viewed]) -> dict[Turn, tuple]:
    groups: dict[Turn, list] = {}
    mine = [(pair, (one.chars, one.views[-1])) for pair, one in zip(alone, with_text, strict=True)]
    for pair, row in from_all(mine):  # a group may be split over processes
        groups.setdefault(pair, []).append(row)
    chars = {pair: one.chars for pair, one in zip(alone, without, strict=True)}
    for pair, of_text in chars.items():
        if len(of_text) and len(groups[pair]) < 2:
            raise InputError(
                "reference_tokens='group' needs several completions of a prompt in one call, and here is one of "
                f"{pair[0]!r:.60}: use reference_tokens='hard'"
            )
    return {pair: most_varied(of_text, groups[pair]) for pair, of_text in chars.items()}
