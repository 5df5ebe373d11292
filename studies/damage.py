"""Texts, damaged in ways that each belong to one level: what a perplexity at that level should notice."""

import random
import re
from collections.abc import Callable, Sequence

import common  # noqa: F401 (with it, mlppl is found)

from mlppl.scoring.units import segment

_AROUND_WORD = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)
_AROUND_SENTENCE = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
REPLACED = 12  # one word in as many

# What a model finds likely anywhere.
BLAND = (
    "He was happy.", "She was very happy.", "It was a nice day.", "They were good friends.", "He was sad.",
    "She went home.", "They all laughed.", "It was very good.", "He said yes.", "They had a lot of fun.",
)  # fmt: skip
# In another register than a story.
OTHER_REGISTER = (
    "The parties shall bear their own costs under section four.",
    "Please find attached the minutes of the quarterly meeting.",
    "The results differ significantly at the level of five percent.",
    "Insert the cable into the port and restart the device.",
    "Shares of the company closed two percent higher on Tuesday.",
    "Simmer for twenty minutes, then season to taste.",
)


def units_of(text: str, level: str, language: str = "en", max_phrase_words: int = 4) -> list[str]:
    """The units of a level, as strings that together are the text."""
    starts = segment([text], language, max_phrase_words).starts[level].tolist()
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


class Damages:
    """Seeded damages to `texts`, each behind its prompt, if there is one; words and sentences from outside a text come
    from the others.

    `all(index)` gives {name: damaged text} for the text at that place; a damage that cannot change it (one sentence has
    no order) is left out. Capital letters, punctuation and white space stay where they are, so that they do not give
    the damage away.
    """

    def __init__(
        self,
        texts: Sequence[str],
        seed: int | str,
        language: str = "en",
        max_phrase_words: int = 4,
        prompts: Sequence[str] | None = None,
    ) -> None:
        self.texts = texts
        self.prompts = prompts or [""] * len(texts)
        self.seed = seed
        self.options = {"language": language, "max_phrase_words": max_phrase_words}
        self._sentences = [units_of(text, "sentence", **self.options) for text in texts]
        # Not the first word of a sentence, whose capital letter would tell.
        self._words = [
            [_core(word) for sentence in sentences for word in units_of(sentence, "word", **self.options)[1:]]
            for sentences in self._sentences
        ]

        # Words that keep their capital letter inside a sentence.
        self._names = {"I", *(word for words in self._words for word in words if word[:1].isupper())}

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

    def phrases_shuffled(self, index: int, rng: random.Random) -> str | None:
        """The phrases inside each sentence in another order; capital letters stay at the beginning, punctuation where
        it was."""
        parts, moved = [], False
        for sentence in self._sentences[index]:
            phrases = [_split(_AROUND_WORD, one) for one in units_of(sentence, "phrase", **self.options)]
            cores = [core for _, core, _ in phrases]
            if len(set(cores)) > 1:
                moved = True
                keeps_capital = _core(cores[0].split()[0]) in self._names
                first = cores[0] if keeps_capital else cores[0][:1].lower() + cores[0][1:]
                cores = _shuffled([first, *cores[1:]], rng)
                cores[0] = cores[0][:1].upper() + cores[0][1:]
            parts += [before + core + after for (before, _, after), core in zip(phrases, cores, strict=True)]
        return "".join(parts) if moved else None

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

    def bland(self, index: int, rng: random.Random) -> str | None:
        """Half of the sentences, not the first, replaced by what could stand anywhere."""
        return self._replaced(index, rng, BLAND, len(self._sentences[index]) // 2)

    def register(self, index: int, rng: random.Random) -> str | None:
        """One sentence in six, not the first, replaced by one of a contract, a manual, the news."""
        return self._replaced(index, rng, OTHER_REGISTER, max(1, len(self._sentences[index]) // 6))

    def _replaced(self, index: int, rng: random.Random, by: Sequence[str], count: int) -> str | None:
        sentences = list(self._sentences[index])
        if len(sentences) < 2 or not count:
            return None
        for chosen in rng.sample(range(1, len(sentences)), min(count, len(sentences) - 1)):
            before, _, after = _split(_AROUND_SENTENCE, sentences[chosen])
            sentences[chosen] = before + rng.choice(by) + after
        return "".join(sentences)

    def prompt_copied(self, index: int, rng: random.Random) -> str | None:
        """The prompt said again in place of about as much of the text's beginning."""
        prompt = self.prompts[index].strip()
        if not prompt:
            return None
        left = self._sentences[index]
        while left and sum(map(len, left)) > len(self.texts[index]) - len(prompt):
            left = left[1:]
        return f" {prompt} {''.join(left).lstrip()}"

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
    "phrases shuffled": Damages.phrases_shuffled,
    "sentences shuffled": Damages.sentences_shuffled,
    "a stranger's sentence": Damages.stranger,
    "another register": Damages.register,
    "bland sentences": Damages.bland,
    "the prompt copied": Damages.prompt_copied,
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
