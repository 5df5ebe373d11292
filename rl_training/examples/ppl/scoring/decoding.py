"""Token ids -> their text, and where in it each token begins: what offsets are to a text that was tokenized."""

import functools
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character (yet)


class Decoding:
    """Decodes a completion behind its prompt: alone, it would lose its first space where the decoder strips that.

    backend: of the `tokenizers` library. Special tokens have no text.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        # A token's text depends on what stands before it; for most decoders only on whether anything does.
        self._anchor, self._anchor_text = self._something()
        self._pieces: dict[int, str] = {}

    @functools.cached_property
    def loses_a_space(self) -> bool:
        """Whether what stands in the middle of a text can have another text when it is decoded by itself."""
        ids = self._backend.encode("the fox, the fox", add_special_tokens=False).ids
        whole = self._text(ids)
        return any(self._text(ids[:cut]) + self._text(ids[cut:]) != whole for cut in range(1, len(ids)))

    def behind(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[str, np.ndarray]]:
        """Per completion (what it adds to its prompt's text, int64 [n], the offset in it at which each token begins).

        Ascending. A token that begins where the next one does has no text of its own: it is special, or holds some of
        the bytes of a character.
        """
        alone = dict(zip(unique := list(dict.fromkeys(map(tuple, prompts))), self._texts(unique), strict=True))
        whole = self._texts([[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)])
        self._learn(completions)
        decoded = []
        for prompt, completion, text in zip(prompts, completions, whole, strict=True):
            border = _common(alone[tuple(prompt)], text)
            decoded.append((text[border:], self._starts(prompt, completion, text, border)))
        return decoded

    def _something(self) -> tuple[list[int], str]:
        """(ids of a token that has a text, that text). A vocabulary of whole words may not know the letter a."""
        of_a = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        others = ([token] for token in range(self._backend.get_vocab_size()))
        named = ((ids, self._text(ids)) for ids in chain([of_a], others))
        return next(((ids, text) for ids, text in named if text.strip()), ([], ""))

    def _text(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def _texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return self._backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=True)

    def _behind_anchor(self, ids: Sequence[int]) -> str:
        return self._text([*self._anchor, *ids]).removeprefix(self._anchor_text)

    def _learn(self, completions: Sequence[Sequence[int]]) -> None:
        new = [token for token in {token for ids in completions for token in ids} if token not in self._pieces]
        texts = self._texts([[*self._anchor, token] for token in new])
        self._pieces.update(
            (token, text.removeprefix(self._anchor_text)) for token, text in zip(new, texts, strict=True)
        )

    def _starts(self, prompt: Sequence[int], completion: Sequence[int], whole: str, border: int) -> np.ndarray:
        pieces = self._whole_characters(completion)
        text, joined = whole[border:], "".join(pieces)
        starts = np.cumsum([0, *map(len, pieces)])[: len(completion)]
        if len(joined) == len(text) + 1 and joined.endswith(text):  # behind nothing, the first space is stripped
            joined, starts = text, np.maximum(starts - 1, 0)
        if joined != text:
            # Slow, and for any decoder: a token begins where the text of all before it ceases to be the whole one's.
            same = _common(joined, text)
            first = max(0, int(np.searchsorted(starts, same, side="right")) - 1)
            for index in range(first, len(completion)):
                before = self._text([*prompt, *completion[:index]])
                starts[index] = max(_common(before, whole) - border, starts[index - 1] if index else 0)
        return starts

    def _whole_characters(self, completion: Sequence[int]) -> list[str]:
        """Each token's text; where only several tokens make a character, the last of them has it."""
        pieces = [self._pieces[token] for token in completion]
        index = 0
        while index < len(pieces):
            start, text = index, pieces[index]
            while text.endswith(_UNFINISHED) and index + 1 < len(pieces) and _UNFINISHED in pieces[index + 1]:
                index += 1
                text = self._behind_anchor(completion[start : index + 1])
            index += 1
            if index > start + 1:
                before = [self._behind_anchor(completion[start:end]) for end in range(start, index)]
                settled = np.maximum.accumulate([_common(one, text) for one in before] + [len(text)]).tolist()
                pieces[start:index] = [text[begin:end] for begin, end in pairwise(settled)]
        return pieces


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    # Decoded prefixes of a text are that text but for their end.
    same = next((len(head) for head in (a, a.rstrip(_UNFINISHED)) if b.startswith(head)), 0)
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same
