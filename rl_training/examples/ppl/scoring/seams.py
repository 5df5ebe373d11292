"""The space between a prompt and a completion that was decoded by itself, where the tokenizer's decoder strips it.

Tokenizers like those of Llama 2, Mistral and Phi-3 decode the ids of " there" alone as "there". Where the ids are known
they are scored (`ppl.scoring.tokens.Sampled`); this is for callers who have nothing but the text.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .decoding import Decoding
from .tokens import Encoded, TextEncoder

_MOST = 32  # characters of a first word


def restore_spaces(
    encoder: TextEncoder,
    score: Callable[[list[Encoded]], list[np.ndarray]],
    pairs: Sequence[tuple[str, str]],
    decoding: Decoding,
) -> list[str]:
    """The targets of (context, target), as they were before decoding took a space from their front.

    "Once upon a time" + "there was" cannot be told from "Once upon a ti" + "me": of both readings, with a space and
    without, the one whose first word surprises the scorer less is taken. Nothing is changed where the decoder keeps
    spaces, behind nothing, or beside other white space.

    score: surprisals of encoded texts. It is asked also for none, since a model that is spread over processes has to be
    asked in each of them. decoding: of the tokenizer that decoded the targets.
    """
    targets = [target for _, target in pairs]
    if not decoding.loses_a_space:
        return targets
    open_ones = [
        index
        for index, (context, target) in enumerate(pairs)
        if context and target and not context[-1].isspace() and not target[0].isspace()
    ]
    contexts = [pairs[index][0] for index in open_ones for _ in range(2)]
    words = [space + targets[index].split()[0][:_MOST] for index in open_ones for space in ("", " ")]
    totals = np.array([surprisal.sum() for surprisal in score(encoder.encode(contexts, words))]).reshape(-1, 2)
    for index, (glued, apart) in zip(open_ones, totals, strict=True):
        if apart < glued:
            targets[index] = " " + targets[index]
    return targets
