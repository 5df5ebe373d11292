"""Which completions are scored as the ids that were sampled: those whose text is that of the ids."""

from collections.abc import Sequence

from ..data import Text
from ..sampling import up_to_end
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.tokens import Sampled


def those_of(
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    given_ids: Sequence[Sequence[int]],
    prompts: Sequence[Text | None],
    ends: Sequence[int],
    calculator: MultiLevelPPLCalculator,
) -> dict[int, tuple[Sampled, str]]:
    """By index, the completions whose ids are those of their text, up to the first end token, which is left out; and
    what they add to their prompt's text.

    The others were written by a policy with another tokenizer, or were edited on their way here. ends: end tokens.
    """
    completion_ids = [list(map(int, ids)) for ids in completion_ids]
    every = [
        Sampled(tuple(map(int, given)), tuple(up_to_end(ids, ends)))
        for given, ids in zip(given_ids, completion_ids, strict=True)
    ]
    # As TRL decodes them; or as they stand behind their prompt, where a space or a mark of continuation is another.
    alone = calculator.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    views = zip(texts, alone, calculator.written(every), prompts, strict=True)
    return {
        index: (every[index], written)
        for index, (text, decoded, written, prompt) in enumerate(views)
        if any(_is_of(text, one, isinstance(prompt, list)) for one in (decoded, written))
    }


def _is_of(text: str, decoded: str, is_message: bool) -> bool:
    """Decoding may lose or add white space; and a message may be the part that a template calls its content."""
    text, decoded = "".join(text.split()), "".join(decoded.split())
    return text == decoded or bool(is_message and text and text in decoded)
