"""What completions do for their references: perplexities with and without them."""

from collections.abc import Sequence

import numpy as np

from ..data import Text, message_text
from ..definitions import LEVELS
from .earned import HIGHEST


def measured(
    reward_fn, contexts: Sequence[str], texts: Sequence[str], references: Sequence[Text | None], absent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Sequence[bool]]:
    """(perplexities of the references behind prompt and completion, the same behind the prompt alone where `absent`,
    float64 [B, 3] each; whether a completion has the part that `extract` wants)

    contexts: the prompts as the scorer reads them. absent: bool [B], rows without a baseline.
    """
    put = reward_fn.reference_context
    targets = [message_text(reference or "") for reference in references]
    parts, has_part = zip(*map(put.extracted, texts), strict=True) if texts else ((), ())
    with_text = list(zip(map(put.context, contexts, parts), targets, strict=True))
    without = list(zip(map(put.context, contexts), targets, strict=True))
    alone = np.full((len(texts), len(LEVELS)), np.nan)
    # One call, so that they share the prompts' forward passes.
    unknown = [pair for pair, wanted in zip(without, absent, strict=True) if wanted]
    values = np.minimum(reward_fn.perplexities(with_text + unknown), HIGHEST)
    current, alone[absent] = values[: len(texts)], values[len(texts) :]
    return current, alone, has_part
