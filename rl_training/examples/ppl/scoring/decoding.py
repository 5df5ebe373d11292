"""Token ids -> their text, and where in it each token begins: what offsets are to a text that was tokenized."""

import functools
import re
from collections.abc import Sequence
from itertools import accumulate, chain, groupby, takewhile

import numpy as np
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character (yet)
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte's token, beside tokens of characters
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # in tokens that are all made of bytes


class Decoding:
    """Decodes a completion behind its prompt: alone, it would lose its first space where the decoder strips that.

    backend: of the `tokenizers` library. Special tokens have no text.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        # A token's text depends on what stands before it; for most decoders only on whether anything does.
        self._anchor, self._anchor_text = self._something()
        self._pieces: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}  # of tokens that can hold a part of a character
        # Llama 2's decoder: bytes in a row are characters if all of them are; otherwise none is.
        byte = backend.token_to_id("<0x41>")
        self._all_or_none = byte is not None and self._text([byte]) == "A"

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
        texts = self.texts(prompts, completions)
        self._learn([*prompts, *completions])
        return [
            (text, self._starts(prompt, completion, before + text, len(before)))
            for prompt, completion, (before, text) in zip(prompts, completions, texts, strict=True)
        ]

    def texts(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
        """Per completion (its prompt's text, what it adds to that)."""
        alone = dict(zip(unique := list(dict.fromkeys(map(tuple, prompts))), self._texts(unique), strict=True))
        whole = self._texts([[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)])
        borders = [_common(alone[tuple(prompt)], text) for prompt, text in zip(prompts, whole, strict=True)]
        return [(text[:border], text[border:]) for text, border in zip(whole, borders, strict=True)]

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

    def _learn(self, sequences: Sequence[Sequence[int]]) -> None:
        new = [token for token in set(chain.from_iterable(sequences)) if token not in self._pieces]
        texts = self._texts([[*self._anchor, token] for token in new])
        for token, text in zip(new, texts, strict=True):
            self._pieces[token] = piece = text.removeprefix(self._anchor_text)
            name = self._backend.id_to_token(token) or ""
            if self._all_or_none and (byte := _BYTE.fullmatch(name)):
                self._bytes[token] = bytes.fromhex(byte[1])
            elif _UNFINISHED in piece and not self._all_or_none and _BYTE_OF.keys() >= set(name):
                self._bytes[token] = bytes(_BYTE_OF[letter] for letter in name)

    def _starts(self, prompt: Sequence[int], completion: Sequence[int], whole: str, border: int) -> np.ndarray:
        # Bytes that the prompt ends in can be of the completion's first character.
        open_bytes = [*takewhile(lambda token: token in self._bytes or not self._pieces[token], reversed(prompt))][::-1]
        text, starts = self._laid_out([*open_bytes, *completion])
        starts = np.maximum.accumulate(starts[len(open_bytes) :])
        behind = starts + len(whole) - len(text) - border
        if text == " " + whole:  # behind nothing, the first space is stripped
            return np.maximum(behind, 0)
        if whole.endswith(text) and not behind[:1].any():
            return behind
        # Slow, and for any decoder: a token begins where the text of all before it ceases to be the whole one's.
        same = 0 if open_bytes else _common(text, whole[border:])
        first = max(0, int(np.searchsorted(starts, same, side="right")) - 1)
        for index in range(first, len(completion)):
            before = self._text([*prompt, *completion[:index]])
            starts[index] = max(_common(before, whole) - border, starts[index - 1] if index else 0)
        return starts

    def _laid_out(self, ids: Sequence[int]) -> tuple[str, np.ndarray]:
        """(the tokens' text, int64 [n], where in it each begins), of which each character is decoded once."""
        has_text = [index for index, token in enumerate(ids) if self._pieces[token] or token in self._bytes]
        texts, starts, size = [], [], 0
        for of_bytes, run in groupby([ids[index] for index in has_text], self._bytes.__contains__):
            if of_bytes:
                text, inside = self._of_bytes([self._bytes[token] for token in run])
            else:
                pieces = [self._pieces[token] for token in run]
                text, inside = "".join(pieces), [*accumulate(map(len, pieces), initial=0)][:-1]
            texts.append(text)
            starts += [size + start for start in inside]
            size += len(text)
        # A token without a text begins where the next one does.
        following = np.searchsorted(has_text, np.arange(len(ids)))
        return "".join(texts), np.array([*starts, size])[following]

    def _of_bytes(self, parts: Sequence[bytes]) -> tuple[str, list[int]]:
        """(the text of tokens that hold bytes, the character in which each begins)"""
        data = b"".join(parts)
        begins = [*accumulate(map(len, parts), initial=0)][:-1]
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if self._all_or_none:  # none of the bytes is part of a character, not even those before the fault
                settled = {*accumulate(_sizes(data[: error.start].decode(), data), initial=0)}
                return _UNFINISHED * len(data), [0 if begin in settled else begin for begin in begins]
            text = data.decode(errors="replace")
        char_of: list[int] = []  # by byte
        for index, (char, size) in enumerate(zip(text, _sizes(text, data), strict=True)):
            # What is no character with fewer of its bytes is none with all of them: the text goes on behind it.
            char_of += [index] + [index + (char == _UNFINISHED)] * (size - 1)
        return text, [char_of[begin] for begin in begins]


def _sizes(text: str, data: bytes) -> list[int]:
    """How many of the bytes each character was made of."""
    sizes, at = [], 0
    for char in text:
        size = len(char.encode())
        if char == _UNFINISHED:
            try:
                data[at : at + 4].decode()
            except UnicodeDecodeError as error:
                size = size if error.start else error.end
        sizes.append(size)
        at += size
    return sizes


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    # Decoded prefixes of a text are that text but for their end.
    same = next((len(head) for head in (a, a.rstrip(_UNFINISHED)) if b.startswith(head)), 0)
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same
