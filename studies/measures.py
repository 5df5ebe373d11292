"""Measures of completions that no reward contains: what is copied, how common the words are, a second model's view."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import common  # noqa: F401 (with it, mlppl is found)
import numpy as np

from mlppl.config import LEVELS
from mlppl.data import Text, message_text

RUN = 4  # words
COMMONEST = 100


def words_of(text: Text) -> list[str]:
    """Lower case, without punctuation.

    >>> words_of('"Go!" said the fox.')
    ['go', 'said', 'the', 'fox']
    """
    stripped = ("".join(filter(str.isalnum, word)) for word in message_text(text).lower().split())
    return [word for word in stripped if word]


def copied(
    prompts: Sequence[Text], texts: Sequence[str], n: int = RUN, split: Callable[[Text], Sequence] = words_of
) -> float:
    """Share of the texts' runs of `n` words that stand in their prompts, over all texts together; 0 without a run.

    split: what divides a text; with `tokens_of(tokenizer)` the runs are of tokens.

    >>> copied(["The fox ran to the sea."], ["Then the fox ran to the hill."])
    0.5
    >>> copied(["The fox ran to the sea."], ["Then the fox ran to the hill."], n=2)
    0.6666666666666666
    """
    total = inside = 0
    for prompt, text in zip(prompts, texts, strict=True):
        there = set(_runs(split(prompt), n))
        runs = _runs(split(text), n)
        total += len(runs)
        inside += sum(run in there for run in runs)
    return inside / total if total else 0.0


def _runs(units: Sequence, n: int) -> list[tuple]:
    return [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]


def tokens_of(tokenizer) -> Callable[[Text], list[int]]:
    """A function that divides a text into token ids, the first one as behind a space, as it is inside another text."""
    return lambda text: tokenizer(f" {message_text(text).strip()}", add_special_tokens=False)["input_ids"]


TALK = re.compile(r"\b(story|stories|narrative|tale|version|I'd|I'm|I love|your)\b", re.IGNORECASE)
SPEECH = re.compile(r"""["\u201c][^"\u201d]*(["\u201d]|$)""")  # of somebody in the story


def talks(prompts: Sequence[Text], texts: Sequence[str]) -> list[bool]:
    """Of each text whether it talks about the story instead of telling it: whether it has a word of `TALK`'s that its
    prompt has not, outside of direct speech. A curly apostrophe counts as a straight one.

    >>> talks(["A fox ran.", "She told a story."], ["I\u2019d love to go on.", "The story was long."])
    [True, False]
    >>> talks(["A fox ran."], ['"I love your tail," he said. "I'])
    [False]
    """
    return [bool(_talk(text) - _talk(prompt)) for prompt, text in zip(prompts, texts, strict=True)]


def _talk(text: Text) -> set[str]:
    return {word.lower() for word in TALK.findall(SPEECH.sub("", message_text(text).replace("\u2019", "'")))}


def two_sample_accuracy(human: np.ndarray, generated: np.ndarray) -> float:
    """How well texts of two kinds are told apart by their nearest neighbour among all others: 0.5 where the kinds are
    alike, 1 where each text's nearest is of its own kind. (Lopez-Paz & Oquab 2017, https://arxiv.org/abs/1610.06545.)

    human, generated: embeddings, float [texts, size]; near is a high cosine. The mean of both kinds' shares, so that
    kinds of other sizes are alike at 0.5, too. Take one text of each kind for a prompt: texts of one prompt are near
    because of what they are about, which makes two of one kind look told apart, and one of each look less so.

    >>> two_sample_accuracy(np.array([[1.0, 0.0], [0.9, 0.1]]), np.array([[0.0, 1.0], [0.1, 0.9]]))
    1.0
    """
    cosines = _cosines(np.concatenate([human, generated]))
    np.fill_diagonal(cosines, -np.inf)
    kinds = np.arange(len(cosines)) < len(human)
    right = kinds[cosines.argmax(1)] == kinds
    return float((right[kinds].mean() + right[~kinds].mean()) / 2)


def semantic_variety(embeddings: np.ndarray) -> float:
    """The mean distance of two texts, 1 minus the cosine of their embeddings, float [texts, size]: 0 if all say one
    thing.

    >>> semantic_variety(np.array([[1.0, 0.0], [0.0, 2.0]]))
    1.0
    """
    cosines = _cosines(embeddings)
    return float(1 - cosines[np.triu_indices(len(cosines), 1)].mean())


def _cosines(embeddings: np.ndarray) -> np.ndarray:
    directions = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return directions @ directions.T


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
    from mlppl.scoring.calculator import MultiLevelPPLCalculator

    calculator = MultiLevelPPLCalculator(tokenizer, aggregation="nested")
    levels = calculator.compute_all_levels(model, list(texts), list(prompts))
    logs = {level: float(np.nanmean(levels[level].log().numpy())) for level in LEVELS}
    return {"PPL": float(np.exp(sum(logs.values()))), **{level: float(np.exp(logs[level])) for level in LEVELS}}
