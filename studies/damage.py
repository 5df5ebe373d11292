"""Texts, damaged in ways that each belong to one level: what a perplexity at that level should notice."""

import random
import re
from collections.abc import Callable, Sequence

import common  # noqa: F401 (with it, ppl is found)

from ppl.scoring.units import segment

_AROUND_WORD = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)
_AROUND_SENTENCE = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
REPLACED = 12  # one word in as many


def units_of(text: str, level: str, language: str = "en", max_phrase_words: int = 4) -> list[str]:
    """The units of a level, as strings that together are the text."""
    starts = segment([text], language, max_phrase_words).starts[level].tolist()
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


class Damages:
    """Seeded damages to `texts`; words and sentences from outside a text come from the others.

    `all(index)` gives {name: damaged text} for the text at that place; a damage that cannot change it (one sentence has
    no order) is left out. Capital letters, punctuation and white space stay where they are, so that they do not give
    the damage away.
    """

    def __init__(self, texts: Sequence[str], seed: int | str, language: str = "en", max_phrase_words: int = 4) -> None:
        self.texts = texts
        self.seed = seed
        self.options = {"language": language, "max_phrase_words": max_phrase_words}
        self._sentences = [units_of(text, "sentence", **self.options) for text in texts]
        # Not the first word of a sentence, whose capital letter would tell.
        self._words = [
            [_core(word) for sentence in sentences for word in units_of(sentence, "word", **self.options)[1:]]
            for sentences in self._sentences
        ]

    def all(self, index: int) -> dict[str, str]:
        damaged_texts = {}
        for name, damage in DAMAGES.items():
            damaged = damage(self, index, random.Random(f"{self.seed} {index} {name}"))
            if damaged is not None and damaged != self.texts[index]:
                damaged_texts[name] = damaged
        return damaged_texts

    def _stranger(self, index: int, rng: random.Random, of: list[list[str]]) -> str | None:
        others = [number for number, units in enumerate(of) if number != index and units]
        return rng.choice(of[rng.choice(others)]) if others else None

    def words_replaced(self, index: int, rng: random.Random) -> str | None:
        """One word in `REPLACED`, at least one, by a word of another text."""
        words = units_of(self.texts[index], "word", **self.options)
        for chosen in rng.sample(range(len(words)), max(1, round(len(words) / REPLACED))):
            before, old, after = _split(_AROUND_WORD, words[chosen])
            new = self._stranger(index, rng, self._words)
            if new is None:
                return None
            words[chosen] = before + (new[:1].upper() + new[1:] if old[:1].isupper() else new) + after
        return "".join(words)

    def words_shuffled(self, index: int, rng: random.Random) -> str:
        """The words inside each phrase in another order; a sentence's first word stays."""
        parts = []
        for sentence in self._sentences[index]:
            words = [_split(_AROUND_WORD, word) for word in units_of(sentence, "word", **self.options)]
            at = 0
            for phrase in units_of(sentence, "phrase", **self.options):
                size = len(units_of(phrase, "word", **self.options))
                indices = list(range(max(at, 1), at + size))
                for (before, _, after), to, core in zip(
                    [words[i] for i in indices], indices, _shuffled([words[i][1] for i in indices], rng), strict=True
                ):
                    words[to] = (before, core, after)
                at += size
            parts += ["".join(word) for word in words]
        return "".join(parts)

    def sentences_shuffled(self, index: int, rng: random.Random) -> str:
        """The sentences in another order."""
        split = [_split(_AROUND_SENTENCE, sentence) for sentence in self._sentences[index]]
        order = _shuffled([core for _, core, _ in split], rng)
        return "".join(before + core + after for (before, _, after), core in zip(split, order, strict=True))

    def stranger(self, index: int, rng: random.Random) -> str | None:
        """One sentence, not the first, replaced by a sentence of another text."""
        sentences = list(self._sentences[index])
        new = self._stranger(index, rng, self._sentences)
        if len(sentences) < 2 or new is None:
            return None
        chosen = rng.randrange(1, len(sentences))
        before, _, after = _split(_AROUND_SENTENCE, sentences[chosen])
        sentences[chosen] = before + new.strip() + after
        return "".join(sentences)

    def loop(self, index: int, rng: random.Random) -> str | None:
        """One sentence of the first half, repeated until the text is as long as it was."""
        sentences = self._sentences[index]
        if len(sentences) < 4:
            return None
        chosen = rng.randrange(1, len(sentences) // 2)
        kept, again = "".join(sentences[: chosen + 1]).rstrip(), sentences[chosen].strip()
        missing = len(self.texts[index]) - len(kept)
        return kept + f" {again}" * max(1, -(-missing // (len(again) + 1)))


DAMAGES: dict[str, Callable] = {
    "words replaced": Damages.words_replaced,
    "words shuffled in phrases": Damages.words_shuffled,
    "sentences shuffled": Damages.sentences_shuffled,
    "a stranger's sentence": Damages.stranger,
    "a loop": Damages.loop,
}


def _split(pattern: re.Pattern, text: str) -> tuple[str, str, str]:
    return pattern.fullmatch(text).groups()


def _core(word: str) -> str:
    return _split(_AROUND_WORD, word)[1]


def _shuffled(items: list[str], rng: random.Random) -> list[str]:
    """In another order, if there is one that differs."""
    shuffled = list(items)
    while len(set(items)) > 1 and shuffled == items:
        rng.shuffle(shuffled)
    return shuffled
