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

# The default word boundaries of Unicode (UAX #29), rule by rule. `\b` of the package regex differs: it joins an
# apostrophe to a vowel behind it, and does not look through accents where a rule is about three characters.

_NAMES = [
    *("CR", "LF", "Newline", "Extend", "ZWJ", "Format", "Katakana", "Hebrew_Letter", "ALetter", "Single_Quote"),
    *("Double_Quote", "MidNumLet", "MidLetter", "MidNum", "Numeric", "ExtendNumLet", "WSegSpace", "Regional_Indicator"),
]
_KINDS = {name: rf"\p{{WB={name}}}" for name in _NAMES}
_KINDS |= {"pictograph": r"\p{Extended_Pictographic}", "alphanumeric": r"[\p{L}\p{N}]", "known": ""}
_KINDS["clause end"] = rf"[{regex.escape(',;:—–()[]、，；：（）【】')}]"
_PATTERNS = list(map(regex.compile, _KINDS.values()))
_BIT = {name: 1 << index for index, name in enumerate(_KINDS)}  # so that a mask stands for several kinds
_LINE_END = _BIT["CR"] | _BIT["LF"] | _BIT["Newline"]
_ABSORBED = _BIT["Extend"] | _BIT["Format"] | _BIT["ZWJ"]
_HEBREW, _APOSTROPHE, _QUOTE = _BIT["Hebrew_Letter"], _BIT["Single_Quote"], _BIT["Double_Quote"]
_LETTER, _DIGIT, _KANA, _LOW_LINE = _BIT["ALetter"] | _HEBREW, _BIT["Numeric"], _BIT["Katakana"], _BIT["ExtendNumLet"]
_IN_WORD, _IN_NUMBER = (_BIT[name] | _BIT["MidNumLet"] | _APOSTROPHE for name in ("MidLetter", "MidNum"))
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


def _kinds_of(codes: np.ndarray) -> np.ndarray:
    """uint32 [n], the bits of code points [n]."""
    for code in np.unique(codes[_kinds[codes] == 0]).tolist():
        _kinds[code] = sum(1 << index for index, pattern in enumerate(_PATTERNS) if pattern.match(chr(code)))
    return _kinds[codes]


def starts_segment(codes: np.ndarray, text_starts: np.ndarray) -> np.ndarray:
    """bool [n], where a segment starts. codes: uint32 [n], code points. text_starts: int64, ascending, where texts
    start that are apart from each other, the first one at 0.
    """
    kinds = np.insert(_kinds_of(codes), text_starts, _BIT["LF"])  # a line end before a text keeps it apart
    joined = np.zeros(len(kinds), dtype=bool)
    for left, right in (("CR", "LF"), ("WSegSpace", "WSegSpace"), ("ZWJ", "pictograph")):  # WB3, 3d, 3c
        joined[1:] |= _are(kinds[:-1], _BIT[left]) & _are(kinds[1:], _BIT[right])
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
    # A text's first sentence starts where the text does, whatever sentencex makes of its beginning.
    found = [*offsets[:-1].tolist(), *(match.end() for match in _LINE_BREAK.finditer(text))]
    for offset, one in zip(offsets.tolist(), texts, strict=False):
        found += [offset + start for start in sentence_starts(one, language)]
    sentences = np.unique(np.array(found, dtype=np.int64))
    sentences = sentences[sentences < len(text)]

    codes = code_points(text)
    starts = starts_segment(codes, sentences)
    kinds, segment_of = _kinds_of(codes), np.cumsum(starts) - 1
    is_word = np.bincount(segment_of, _are(kinds, _BIT["alphanumeric"])) > 0
    words = np.flatnonzero(starts)[is_word]
    clause_ends = np.flatnonzero(_are(kinds, _BIT["clause end"]) & ~is_word[segment_of])

    # A unit of a sentence's first word also holds what stands before that word, so it starts with the sentence.
    first = np.diff(np.searchsorted(sentences, words, side="right"), prepend=-1) != 0
    word_starts = np.union1d(sentences, words[~first])
    # A clause ends before the word that follows the punctuation, if another word of the sentence stands before it.
    following = np.unique(np.searchsorted(words, clause_ends))
    following = following[following < len(words)]
    run_starts = np.union1d(sentences, words[following[~first[following]]])
    run = np.searchsorted(run_starts, word_starts, side="right") - 1
    index_in_run = np.arange(len(word_starts)) - np.searchsorted(word_starts, run_starts)[run]
    phrase_starts = word_starts[index_in_run % max_phrase_words == 0]
    return Units(offsets, {"word": word_starts, "phrase": phrase_starts, "sentence": sentences})


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]"""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
