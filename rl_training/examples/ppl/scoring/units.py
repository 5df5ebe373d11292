"""Texts -> their sentences, words and phrases, as character offsets.

The units of a level lie end to end: together they are the text, so a level is the sorted array of the offsets at
which its units start, and a unit ends where the next one starts. Texts are segmented together, as one concatenation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

from ..config import DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS
from ..data import LINE_BREAKS, sentence_starts

# --- word breaks -----------------------------------------------------------------------------------------------------

# The default word boundaries of Unicode (UAX #29), rule by rule.
#
# `\b` of the package regex differs from them: it joins an apostrophe to a vowel behind it, and does not look through
# accents where a rule is about three characters.

_NAMES = [
    *("CR", "LF", "Newline", "Extend", "ZWJ", "Format", "Katakana", "Hebrew_Letter", "ALetter", "Single_Quote"),
    *("Double_Quote", "MidNumLet", "MidLetter", "MidNum", "Numeric", "ExtendNumLet", "WSegSpace", "Regional_Indicator"),
]
_KIND = regex.compile("|".join(rf"(\p{{WB={name}}})" for name in _NAMES))
_PICTOGRAPH = regex.compile(r"\p{Extended_Pictographic}")

# A code point's kind is a bit, so that a mask stands for several kinds.
_BIT = {name: 1 << index for index, name in enumerate(_NAMES)}
_KNOWN, _PICT = 1 << 30, 1 << 31
_LINE_END = _BIT["CR"] | _BIT["LF"] | _BIT["Newline"]
_ABSORBED = _BIT["Extend"] | _BIT["Format"] | _BIT["ZWJ"]
_HEBREW, _APOSTROPHE, _QUOTE = _BIT["Hebrew_Letter"], _BIT["Single_Quote"], _BIT["Double_Quote"]
_LETTER, _DIGIT, _KANA, _LOW_LINE = _BIT["ALetter"] | _HEBREW, _BIT["Numeric"], _BIT["Katakana"], _BIT["ExtendNumLet"]
_IN_WORD = _BIT["MidLetter"] | _BIT["MidNumLet"] | _APOSTROPHE
_IN_NUMBER = _BIT["MidNum"] | _BIT["MidNumLet"] | _APOSTROPHE
_ANY = 0
# No boundary between the second and the third of four characters of these kinds.
_JOINED = [
    (_ANY, _LETTER, _LETTER, _ANY),  # WB5
    (_ANY, _LETTER, _IN_WORD, _LETTER),  # WB6
    (_LETTER, _IN_WORD, _LETTER, _ANY),  # WB7
    (_ANY, _HEBREW, _APOSTROPHE, _ANY),  # WB7a
    (_ANY, _HEBREW, _QUOTE, _HEBREW),  # WB7b
    (_HEBREW, _QUOTE, _HEBREW, _ANY),  # WB7c
    (_ANY, _DIGIT | _LETTER, _DIGIT, _ANY),  # WB8, 9
    (_ANY, _DIGIT, _LETTER, _ANY),  # WB10
    (_DIGIT, _IN_NUMBER, _DIGIT, _ANY),  # WB11
    (_ANY, _DIGIT, _IN_NUMBER, _DIGIT),  # WB12
    (_ANY, _KANA, _KANA, _ANY),  # WB13
    (_ANY, _LETTER | _DIGIT | _KANA | _LOW_LINE, _LOW_LINE, _ANY),  # WB13a
    (_ANY, _LOW_LINE, _LETTER | _DIGIT | _KANA, _ANY),  # WB13b
]
_kinds = np.zeros(0x110000, dtype=np.uint32)  # of each code point that was met


def starts_segment(codes: np.ndarray, text_starts: np.ndarray) -> np.ndarray:
    """bool [n], where a segment starts. codes: uint32 [n], code points. text_starts: int64, ascending, where texts
    start that are apart from each other, the first one at 0.
    """
    for code in np.unique(codes[_kinds[codes] == 0]).tolist():
        kind = _KIND.match(chr(code))
        pictograph = _PICT if _PICTOGRAPH.match(chr(code)) else 0
        _kinds[code] = _KNOWN | pictograph | (1 << kind.lastindex - 1 if kind else 0)
    kinds = np.insert(_kinds[codes], text_starts, _BIT["LF"])  # a line end before a text keeps it apart

    joined = np.zeros(len(kinds), dtype=bool)
    for left, right in (("CR", "LF"), ("WSegSpace", "WSegSpace")):  # WB3, 3d
        joined[1:] |= _are(kinds[:-1], _BIT[left]) & _are(kinds[1:], _BIT[right])
    joined[1:] |= _are(kinds[:-1], _BIT["ZWJ"]) & _are(kinds[1:], _PICT)  # WB3c
    absorbed = np.zeros(len(kinds), dtype=bool)  # WB4: what follows looks through them
    absorbed[1:] = _are(kinds[1:], _ABSORBED) & ~_are(kinds[:-1], _LINE_END)
    joined |= absorbed

    seen = np.flatnonzero(~absorbed)
    padded = np.pad(kinds[seen], (2, 1))
    four = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    for masks in _JOINED:
        joined[seen] |= np.logical_and.reduce([_are(k, mask) for k, mask in zip(four, masks, strict=True) if mask])
    # WB15, 16: regional indicators are joined two by two.
    index, indicator = np.arange(len(seen)), _are(kinds[seen], _BIT["Regional_Indicator"])
    place = index - np.maximum.accumulate(np.where(indicator, 0, index))
    joined[seen] |= indicator & (place % 2 == 0)
    return np.delete(~joined, text_starts + np.arange(len(text_starts)))


def _are(kinds: np.ndarray, mask: int) -> np.ndarray:
    return kinds & mask != 0


# --- units -----------------------------------------------------------------------------------------------------------

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
