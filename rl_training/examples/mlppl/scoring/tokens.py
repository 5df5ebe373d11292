"""Context and target -> token ids, which of them are scored, and the character each scored token stands for."""

import codecs
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise, takewhile
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import InputError
from ..prompts import Turn, added_ids, of_text
from .units import code_points

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character (yet)
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte's token, beside tokens of characters
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # in tokens that are all made of bytes


class Decoding:
    """Token ids -> their text, and where in it each token begins: what offsets are to a text that was tokenized.

    A completion is decoded behind its prompt: alone, it would lose its first space where the decoder strips that.
    backend: of the `tokenizers` library. Special tokens have no text.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        # A token's text depends on what stands before it; for most decoders only on whether anything does. So each is
        # decoded behind a token that has a text. A vocabulary of whole words may not know the letter a.
        of_a = backend.encode("a", add_special_tokens=False).ids[-1:]
        anchors = ((ids, self._text(ids)) for ids in chain([of_a], ([id_] for id_ in range(backend.get_vocab_size()))))
        self._anchor, self._anchor_text = next(((ids, text) for ids, text in anchors if text.strip()), ([], ""))
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
        self._learn([*{*chain(*prompts, *completions)} - self._pieces.keys()])
        texts = self.texts(prompts, completions)
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

    def _text(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def _texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return self._backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=True)

    def _learn(self, tokens: Sequence[int]) -> None:
        texts = self._texts([[*self._anchor, token] for token in tokens])
        for token, text in zip(tokens, texts, strict=True):
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
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if self._all_or_none:  # a byte a token, and none is part of a character, not even those before the fault
                settled = {error.start, *(at for at in range(error.start) if data[at] & 0xC0 != 0x80)}
                return _UNFINISHED * len(data), [0 if at in settled else at for at in range(len(data))]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, begins = "", []
        for part in parts:
            begins.append((len(text), decoder.getstate()[0]))
            text += decoder.decode(part)
        text += decoder.decode(b"", final=True)
        # What is no character with fewer of its bytes is none with all of them: the text goes on behind it.
        return text, [begin + bool(open_bytes and text[begin] == _UNFINISHED) for begin, open_bytes in begins]


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    # Decoded prefixes of a text are that text but for their end.
    same = next((len(head) for head in (a, a.rstrip(_UNFINISHED)) if b.startswith(head)), 0)
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last one; U+3001 stands for the rest


class Sampled(NamedTuple):
    """A completion as a model sampled it. Its text is a view of it that can be another completion's, too.

    prompt:     the ids the model was given, special tokens and all
    completion: the ids it wrote, up to its end token, which is left out; every one is scored
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


Pair = Turn | Sampled  # of (context, target), the target is what is scored


@dataclass(frozen=True)
class Encoded:
    """One text as a model reads it.

    ids:       int64 [T], context and target, BOS first where the tokenizer has one
    positions: int64 [n], where in `ids` the scored tokens are: ascending, never 0
    chars:     int64 [n], offset in the target of each scored token's first visible character
    """

    ids: np.ndarray
    positions: np.ndarray
    chars: np.ndarray


class TextEncoder:
    """Tokenizes context and target as one string and aligns the target's tokens to its characters.

    tokenizer: any fast tokenizer of transformers. It is read once and never changed. eos_for_bos: where it has no BOS
    token, its EOS token stands before a text without a context. Raises `InputError` for a slow tokenizer, which has no
    character offsets.

    start: the ids that stand before a text: what the tokenizer itself puts there, else BOS, if it has one.
    """

    def __init__(self, tokenizer, eos_for_bos: bool = False) -> None:
        tokenizer = of_text(tokenizer)
        if not hasattr(tokenizer, "is_fast"):
            raise InputError(
                f"the tokenizer is {str(tokenizer)!r:.60}, expected a loaded one, as mlppl.models.load_model(name) and "
                "AutoTokenizer.from_pretrained(name) give it"
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} is a slow tokenizer and has no character offsets: load it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        # A copy without post-processor: no special tokens, and no trimming of the space from a token's offsets.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self.decoding = Decoding(self._backend)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.start = added_ids(tokenizer)[0] or ([] if bos is None else [bos])
        self._eos_for_bos = eos_for_bos and not self.start and eos is not None
        if self._eos_for_bos:
            self.start = [eos]
        # Those included that were added as special and have no role of their own.
        added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special_ids = {*added, *tokenizer.all_special_ids}
        self._special = np.array(sorted(self.special_ids), dtype=np.int64)

    def encode_pairs(self, pairs: Sequence[Pair]) -> tuple[list[Encoded], list[str]]:
        """(each pair as the model reads it, the targets as text)"""
        texts = [pair for pair in pairs if not isinstance(pair, Sampled)]
        targets = [target for _, target in texts]
        of_texts = zip(self.encode([context for context, _ in texts], targets), targets, strict=True)
        of_ids = iter(self.encode_sampled([pair for pair in pairs if isinstance(pair, Sampled)]))
        both = [next(of_ids if isinstance(pair, Sampled) else of_texts) for pair in pairs]
        return [encoded for encoded, _ in both], [target for _, target in both]

    def encode_sampled(self, sampled: Sequence[Sampled]) -> list[tuple[Encoded, str]]:
        """The ids as they are, BOS only where nothing else stands before them; and the completions as text."""
        if not sampled:
            return []
        decoded = self.decoding.behind([one.prompt for one in sampled], [one.completion for one in sampled])
        texts, starts = zip(*decoded, strict=True)
        ends = [np.append(start, len(text))[1:] for text, start in decoded]
        encoded = _aligned(
            [one.prompt or self.start for one in sampled],
            np.fromiter(chain.from_iterable(one.completion for one in sampled), np.int64),
            np.array([len(one.completion) for one in sampled]),
            np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1),
            True,
            texts,
        )
        return list(zip(encoded, texts, strict=True))

    def encode(self, contexts: Sequence[str], targets: Sequence[str]) -> list[Encoded]:
        """`contexts` and `targets` of equal length, "" for no context. A blank target has no scored token."""
        if not targets:
            return []
        joined = [context + target for context, target in zip(contexts, targets, strict=True)]
        encodings = self._backend.encode_batch(joined, add_special_tokens=False)
        own = [encoding.ids for encoding in encodings]
        before = [
            [] if ids[:1] == self.start[:1] or (self._eos_for_bos and context) else self.start
            for ids, context in zip(own, contexts, strict=True)
        ]
        sizes = np.array([len(ids) for ids in own])
        ids = np.fromiter(chain.from_iterable(own), np.int64, sizes.sum())
        offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        spans = np.fromiter(offsets, np.int64, 2 * len(ids)).reshape(-1, 2)
        spans -= np.repeat([len(context) for context in contexts], sizes)[:, None]
        # A token that straddles the border ends in the target and so belongs to it.
        scored = (spans[:, 1] > 0) & ~np.isin(ids, self._special)
        return _aligned(before, ids, sizes, np.maximum(spans, 0), scored, targets)


def _aligned(
    before: Sequence[Sequence[int]],
    ids: np.ndarray,
    sizes: np.ndarray,
    spans: np.ndarray,
    scored: np.ndarray | bool,
    targets: Sequence[str],
) -> list[Encoded]:
    """Texts as a model reads them, and which character of its target each scored token stands for.

    before: the ids in front of each text. ids, sizes: int64 [n] and [B], all texts' own ids, and how many each has.
    spans: int64 [n, 2], a token's characters in its target. scored: bool [n], the tokens that are scored if anything
    visible is.
    """
    text = np.repeat(np.arange(len(sizes)), sizes)
    first_token = np.cumsum(sizes) - sizes
    in_front = np.array([len(front) for front in before], dtype=np.int64)
    # Nothing stands before the first of all tokens, so it has no probability.
    scored = np.flatnonzero(scored & (np.arange(len(ids)) + in_front[text] > first_token[text]))
    # From here on, characters are counted in the concatenation of all targets.
    text = text[scored]
    target_starts = np.cumsum([0, *map(len, targets)])
    starts, ends = (spans[scored] + target_starts[text, None]).T
    chars = _first_visible(starts, ends, text, targets)
    seen = chars >= 0
    scored, chars, cuts = scored[seen], chars[seen], np.searchsorted(text[seen], np.arange(len(targets) + 1))
    return [
        Encoded(
            ids=np.concatenate([np.array(front, dtype=np.int64), ids[first : first + size]]),
            positions=scored[cut:end] - first + len(front),
            chars=chars[cut:end] - start,
        )
        for front, first, size, start, (cut, end) in zip(
            before, first_token, sizes, target_starts[:-1], pairwise(cuts), strict=True
        )
    ]


def _first_visible(start: np.ndarray, end: np.ndarray, text: np.ndarray, targets: Sequence[str]) -> np.ndarray:
    """First visible character of each token; a token of white space alone takes its successor's, at the end the last's.

    start, end, text: int64 [n], a token's characters, counted in the concatenation of `targets`, and the target it is
    of. Returns int64 [n], -1 for the tokens of a blank target.
    """
    codes = code_points("".join(targets))
    visible = np.flatnonzero(~_SPACE[np.minimum(codes, len(_SPACE) - 1)])
    first = np.append(visible, len(codes))[np.searchsorted(visible, start)]
    owned = np.flatnonzero(first < end)
    if len(owned) == 0:
        return np.full(len(start), -1)
    successor = np.searchsorted(owned, np.arange(len(start)))
    after = owned[np.minimum(successor, len(owned) - 1)]
    before = owned[np.maximum(successor - 1, 0)]
    nearest = np.where((text[after] == text) & (successor < len(owned)), after, before)
    return np.where(text[nearest] == text, first[nearest], -1)


def restore_spaces(
    encoder: TextEncoder,
    score: Callable[[list[Encoded]], list[np.ndarray]],
    pairs: Sequence[tuple[str, str]],
    decoding: Decoding,
) -> list[str]:
    """The targets of (context, target), as they were before decoding took a space from their front.

    Tokenizers like those of Llama 2, Mistral and Phi-3 decode the ids of " there" alone as "there". Where the ids are
    known they are scored (`Sampled`); this is for callers who have nothing but the text.

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
    # 32 characters of a first word are enough to tell.
    words = [space + targets[index].split()[0][:32] for index in open_ones for space in ("", " ")]
    totals = np.array([surprisal.sum() for surprisal in score(encoder.encode(contexts, words))]).reshape(-1, 2)
    for index, (glued, apart) in zip(open_ones, totals, strict=True):
        if apart < glued:
            targets[index] = " " + targets[index]
    return targets
