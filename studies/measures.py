"""Measures of completions that no reward contains: what is copied, how common the words are, a second model's view."""

from collections import Counter
from collections.abc import Collection, Sequence

import common  # noqa: F401 (with it, ppl is found)
import numpy as np

from ppl.config import LEVELS
from ppl.data import Text, message_text

RUN = 4  # words
COMMONEST = 100


def words_of(text: Text) -> list[str]:
    """Lower case, without punctuation.

    >>> words_of('"Go!" said the fox.')
    ['go', 'said', 'the', 'fox']
    """
    stripped = ("".join(filter(str.isalnum, word)) for word in message_text(text).lower().split())
    return [word for word in stripped if word]


def copied(prompts: Sequence[Text], texts: Sequence[str]) -> float:
    """Share of the texts' runs of `RUN` words that stand in their prompts, over all texts together; 0 without a run.

    >>> copied(["The fox ran to the sea."], ["Then the fox ran to the hill."])
    0.5
    """
    total = inside = 0
    for prompt, text in zip(prompts, texts, strict=True):
        there = set(_runs(words_of(prompt)))
        runs = _runs(words_of(text))
        total += len(runs)
        inside += sum(run in there for run in runs)
    return inside / total if total else 0.0


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]


def commonest_words(texts: Sequence[Text]) -> set[str]:
    """The `COMMONEST` words that the texts have most often."""
    counts = Counter(word for text in texts for word in words_of(text))
    return {word for word, _ in counts.most_common(COMMONEST)}


def common_share(texts: Sequence[str], commonest: Collection[str]) -> float:
    """Blandness: the share of the texts' words that are among the commonest; 0 without a word.

    >>> common_share(["The fox ran."], {"the", "ran", "a"})
    0.6666666666666666
    """
    words = [word for text in texts for word in words_of(text)]
    return sum(word in commonest for word in words) / len(words) if words else 0.0


def plain(prompt: Text, completion: str, form: str) -> tuple[str, str]:
    """What a model without chats is given: of a chat the text that was put into `form`, as for `--prompt_template`, and
    the completion with the space that a turn of its own does without. An assistant's message that the completion goes
    on with, and strings, are what they are.

    >>> plain([{"role": "user", "content": "Go on: The fox ran."}], "It fell.", "Go on: {prompt}")
    ('The fox ran.', ' It fell.')
    >>> plain([{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "The fox"}], " ran.", "{prompt}")
    ('The fox', ' ran.')
    """
    if isinstance(prompt, str):
        return prompt, completion
    if prompt[-1]["role"] == "assistant":
        return message_text(prompt[-1:]), completion
    before, _, after = form.partition("{prompt}")
    return message_text(prompt).removeprefix(before).removesuffix(after), " " + completion.lstrip()


def judged(model, tokenizer, prompts: Sequence[Text], texts: Sequence[str]) -> dict[str, float]:
    """Geometric means over the texts of their nested levels under a model, and of their product, the perplexity."""
    from ppl.scoring.calculator import MultiLevelPPLCalculator

    calculator = MultiLevelPPLCalculator(tokenizer, aggregation="nested")
    levels = calculator.compute_all_levels(model, list(texts), list(prompts))
    logs = {level: float(np.nanmean(levels[level].log().numpy())) for level in LEVELS}
    return {"PPL": float(np.exp(sum(logs.values()))), **{level: float(np.exp(logs[level])) for level in LEVELS}}
