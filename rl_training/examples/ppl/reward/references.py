"""What completions do for their references: perplexities with and without them."""

from collections.abc import Sequence

import numpy as np

from ..data import Text, message_text
from ..definitions import LEVELS
from ..errors import InputError
from .earned import HIGHEST
from .reference_tokens import of_some_tokens

CHOSEN_ANEW = (
    "reference_tokens='group' chooses the tokens anew in each call, so that no baseline computed before is of the same "
    "ones: leave out baselines (the reward computes them), or use reference_tokens='hard'"
)


def measured(
    reward_fn, contexts: Sequence[str], texts: Sequence[str], references: Sequence[Text | None], absent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Sequence[bool]]:
    """(perplexities of the references behind prompt and completion, the same behind the prompt alone where `absent`,
    float64 [B, 3] each; whether a completion has the part that `extract` wants)

    contexts: the prompts as the scorer reads them. absent: bool [B], rows without a baseline.
    """
    put, tokens = reward_fn.reference_context, reward_fn.reference_tokens
    targets = [message_text(reference or "") for reference in references]
    parts, has_part = zip(*map(put.extracted, texts), strict=True) if texts else ((), ())
    with_text = list(zip(map(put.context, contexts, parts), targets, strict=True))
    without = list(zip(map(put.context, contexts), targets, strict=True))
    alone = np.full((len(texts), len(LEVELS)), np.nan)
    # One call, so that they share the prompts' forward passes.
    if tokens == "all":
        unknown = [pair for pair, wanted in zip(without, absent, strict=True) if wanted]
        values = np.minimum(reward_fn.perplexities(with_text + unknown), HIGHEST)
        current, alone[absent] = values[: len(texts)], values[len(texts) :]
    elif tokens == "group" and not absent.all():
        raise InputError(CHOSEN_ANEW)
    else:
        values = of_some_tokens(reward_fn.calculator, reward_fn.model, tokens, with_text, without)
        current, alone = (np.minimum(one, HIGHEST) for one in values)
    return current, alone, has_part
