"""What the policy wrote, as it is scored: the ids that were sampled, where the text is that of the ids."""

import itertools
from collections.abc import Sequence

from ..chat import Turn, Turns
from ..data import Text, check_text, message_text
from ..sampling import prompt_ids, up_to_end
from ..scoring.calculator import MultiLevelPPLCalculator
from ..scoring.tokens import Sampled


def as_scored(
    calculator: MultiLevelPPLCalculator,
    model,
    prompts: Sequence[Text | None],
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]] | None,
    given_ids: Sequence[Sequence[int]] | None,
    ends: Sequence[int],
) -> tuple[list[Turn | Turns | Sampled], list[str], bool]:
    """(each completion behind its prompt: ids where there are any; the completions' texts; whether all ids that were
    given are those of their text)

    given_ids: what the policy was given as prompts; None: what GRPOTrainer makes of them. ends: end tokens.
    """
    for index, completion in enumerate(completions):
        check_text(completion, f"completion {index}")
    texts = [message_text(completion) for completion in completions]
    pairs = list(map(calculator.turns, prompts, completions))
    one_turn = [index for index, one in enumerate(completions) if isinstance(one, str) or len(one) == 1]
    sampled = {}
    if completion_ids is not None:
        if given_ids is None:
            given_ids = prompt_ids(prompts, calculator.tokenizer, **calculator.chat)
        sampled = those_of(texts, completion_ids, given_ids, prompts, ends, calculator)
        sampled = {index: sampled[index] for index in one_turn if index in sampled}
    rest = [index for index in one_turn if index not in sampled]
    behind = dict(zip(rest, calculator.restore_spaces(model, [pairs[index] for index in rest]), strict=True))
    for index, text in behind.items():
        pairs[index] = (pairs[index][0], text)
    for index, (ids, text) in sampled.items():
        pairs[index], behind[index] = ids, text
    agree = completion_ids is None or len(sampled) == len(one_turn)
    return pairs, [behind.get(index, text) for index, text in enumerate(texts)], agree


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

    The others were written by a policy with another tokenizer, or were edited on their way here. ends: end tokens of
    the scorer; special tokens in the last places end a text, too: the policy may be another model.
    """
    completion_ids = [list(map(int, ids)) for ids in completion_ids]
    if not completion_ids:  # of which transformers would decode one text
        return {}
    every = [
        Sampled(
            tuple(map(int, given)),
            tuple(up_to_end(ids, {*ends, *itertools.takewhile(calculator.special_ids.__contains__, ids[::-1])})),
        )
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
