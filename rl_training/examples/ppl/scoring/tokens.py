"""Context and target -> token ids, which of them are scored, and the character each scored token stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..chat import Turn, added_ids, of_text
from ..errors import InputError
from .decoding import Decoding
from .units import code_points

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
        if not getattr(tokenizer, "is_fast", False):
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
        sampled = [isinstance(pair, Sampled) for pair in pairs]
        texts = [pair for pair, ids in zip(pairs, sampled, strict=True) if not ids]
        of_texts = iter(zip(self.encode([c for c, _ in texts], [t for _, t in texts]), texts, strict=True))
        of_ids = iter(self.encode_sampled([pair for pair, ids in zip(pairs, sampled, strict=True) if ids]))
        encoded, targets = [], []
        for ids in sampled:
            one, text = next(of_ids) if ids else next(of_texts)
            encoded.append(one)
            targets.append(text if ids else text[1])
        return encoded, targets

    def encode_sampled(self, sampled: Sequence[Sampled]) -> list[tuple[Encoded, str]]:
        """The ids as they are, BOS only where nothing else stands before them; and the completions as text."""
        if not sampled:
            return []
        decoded = self.decoding.behind([one.prompt for one in sampled], [one.completion for one in sampled])
        texts, begins = zip(*decoded, strict=True)
        sizes = [len(one.completion) for one in sampled]
        offsets = np.cumsum([0, *map(len, texts)])
        text = np.repeat(np.arange(len(sampled)), sizes)
        ends = np.concatenate([np.append(start, len(t))[1:] for start, t in zip(begins, texts, strict=True)])
        starts = np.concatenate(begins)
        chars = np.split(
            _first_visible(starts + offsets[text], ends + offsets[text], text, texts), np.cumsum(sizes)[:-1]
        )
        result = []
        for index, one in enumerate(sampled):
            before = list(one.prompt or self.start)
            # Nothing stands before the first of all tokens, so it has no probability.
            scored = np.flatnonzero((chars[index] >= 0) & (np.arange(sizes[index]) + len(before) > 0))
            ids = np.array([*before, *one.completion], dtype=np.int64)
            encoded = Encoded(ids, scored + len(before), chars[index][scored] - offsets[index])
            result.append((encoded, texts[index]))
        return result

    def encode(self, contexts: Sequence[str], targets: Sequence[str]) -> list[Encoded]:
        """`contexts` and `targets` of equal length, "" for no context. A blank target has no scored token."""
        if not targets:
            return []
        joined = [context + target for context, target in zip(contexts, targets, strict=True)]
        encodings = self._backend.encode_batch(joined, add_special_tokens=False)
        sizes = np.array([len(encoding) for encoding in encodings])
        text = np.repeat(np.arange(len(targets)), sizes)
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, len(text))
        spans = np.fromiter(
            chain.from_iterable(chain.from_iterable(e.offsets for e in encodings)), np.int64, 2 * len(text)
        ).reshape(-1, 2)

        # From here on, characters are counted in the concatenation of all targets.
        target_starts = np.cumsum([0, *map(len, targets)])
        starts = target_starts[text]
        spans += (starts - np.array([len(context) for context in contexts])[text])[:, None]
        # A token that straddles the border ends in the target and so belongs to it.
        scored = (spans[:, 1] > starts) & ~np.isin(ids, self._special)
        first_token = np.cumsum(sizes) - sizes
        prepend = np.full(len(targets), len(self.start) > 0)
        prepend[sizes > 0] &= ids[first_token[sizes > 0]] != (self.start or [-1])[0]
        if self._eos_for_bos:
            prepend &= np.array([not context for context in contexts])
        # Nothing stands before the first of all tokens, so it has no probability.
        scored[first_token[(sizes > 0) & ~prepend]] = False

        scored = np.flatnonzero(scored)
        chars = _first_visible(np.maximum(spans[scored, 0], starts[scored]), spans[scored, 1], text[scored], targets)
        scored, chars = scored[chars >= 0], chars[chars >= 0]
        cuts = np.searchsorted(text[scored], np.arange(len(targets) + 1))
        result = []
        for index, (start, size) in enumerate(zip(first_token.tolist(), sizes.tolist(), strict=True)):
            mine = slice(cuts[index], cuts[index + 1])
            own = ids[start : start + size]
            shift = len(self.start) * int(prepend[index])
            result.append(
                Encoded(
                    ids=np.concatenate([self.start, own]) if shift else own,
                    positions=scored[mine] - start + shift,
                    chars=chars[mine] - target_starts[index],
                )
            )
        return result


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
