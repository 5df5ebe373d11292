"""Texts -> their sentences, words and phrases, as character offsets.

The units of a level lie end to end: together they are the text, so a level is the sorted array of the offsets at
which its units start, and a unit ends where the next one starts. Texts are segmented together, as one concatenation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

from ..definitions import DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS
from ..sentences import LINE_BREAKS, sentence_starts
from .word_breaks import starts_segment

_CLAUSE_ENDS = ",;:—–()[]、，；：（）【】"

_ALPHANUMERIC = regex.compile(r"[\p{L}\p{N}]+")
_CLAUSE_END = regex.compile(rf"[{regex.escape(_CLAUSE_ENDS)}]")
_LINE_BREAK = regex.compile(rf"\r\n|[{LINE_BREAKS}]")


@dataclass(frozen=True)
class Units:
    """The units of some texts, as offsets into their concatenation.

    offsets: int64 [B + 1], where each text starts, and the total length
    starts:  {"word": int64 [U_w], "phrase": int64 [U_p], "sentence": int64 [U_s]}, ascending. Every phrase starts
             where a word starts, every sentence where a phrase does, every text but an empty one where a sentence does.
    """

    offsets: np.ndarray
    starts: dict[str, np.ndarray]


def segment(
    texts: Sequence[str], language: str = DEFAULT_LANGUAGE, max_phrase_words: int = DEFAULT_PHRASE_WORDS
) -> Units:
    """Divide texts into units. Sources: sentencex (sentences), Unicode UAX #29 (word boundaries)."""
    offsets = np.cumsum([0, *map(len, texts)])
    text = "".join(texts)
    sentences = _sentence_starts(texts, offsets, text, language)
    words, clause_ends = _words(text, sentences)

    # A unit of a sentence's first word also holds what stands before that word, so it starts with the sentence.
    sentence_of = np.searchsorted(sentences, words, side="right")
    first = np.diff(sentence_of, prepend=-1) != 0
    starts_word = _flags(len(text), sentences)
    starts_word[words[~first]] = True
    # A clause ends before the word that follows the punctuation, if another word of the sentence stands before it.
    following = np.searchsorted(words, clause_ends)
    following = following[following < len(words)]
    starts_run = _flags(len(text), sentences)
    starts_run[words[following[~first[following]]]] = True

    word_starts = np.flatnonzero(starts_word)
    index = np.arange(len(word_starts))
    index_in_run = index - np.maximum.accumulate(np.where(starts_run[word_starts], index, 0))
    phrase_starts = word_starts[index_in_run % max_phrase_words == 0]
    return Units(offsets, {"word": word_starts, "phrase": phrase_starts, "sentence": sentences})


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]"""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _sentence_starts(texts: Sequence[str], offsets: np.ndarray, text: str, language: str) -> np.ndarray:
    """int64 [U_s], ascending. text: the texts' concatenation."""
    # A text's first sentence starts where the text does, whatever sentencex makes of its beginning.
    starts = offsets[:-1].tolist()
    for offset, one in zip(offsets.tolist(), texts, strict=False):
        starts += [offset + start for start in sentence_starts(one, language)]
    starts += [match.end() for match in _LINE_BREAK.finditer(text)]
    return np.flatnonzero(_flags(len(text) + 1, starts)[:-1])


def _words(text: str, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where words start, where clause punctuation stands that is not inside a word), int64, ascending."""
    starts = starts_segment(code_points(text), sentences)
    segment_of = np.maximum.accumulate(np.where(starts, np.arange(len(text)), 0))

    turns = np.zeros(len(text) + 1, dtype=np.int8)  # 1 where letters and digits begin, -1 behind their last one
    spans = np.array([match.span() for match in _ALPHANUMERIC.finditer(text)], dtype=np.int64).reshape(-1, 2)
    turns[spans[:, 0]], turns[spans[:, 1]] = 1, -1
    is_word = _flags(len(text), segment_of[np.cumsum(turns[:-1]) > 0])
    clause_ends = np.array([match.start() for match in _CLAUSE_END.finditer(text)], dtype=np.int64)
    return np.flatnonzero(is_word), clause_ends[~is_word[segment_of[clause_ends]]]


def _flags(size: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """bool [size], true at `indices`."""
    flags = np.zeros(size, dtype=bool)
    flags[np.asarray(indices, dtype=np.int64)] = True
    return flags
