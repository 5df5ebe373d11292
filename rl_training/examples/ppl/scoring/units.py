"""Texts -> their sentences, words and phrases, as character offsets.

The units of a level lie end to end: together they are the text, so a level is the sorted array of the offsets at
which its units start, and a unit ends where the next one starts. Texts are segmented together, as one concatenation.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

from ..definitions import DEFAULT_LANGUAGE, DEFAULT_PHRASE_WORDS
from ..sentences import LINE_BREAKS, sentence_starts

_CLAUSE_ENDS = ",;:—–()[]、，；：（）【】"

_BOUNDARY = regex.compile(r"(?w)\b")  # (?w): by the default word boundaries of UAX #29

# What the word boundary rules need to know of a character of the Basic Multilingual Plane. Sentences with a mark,
# Hebrew, Katakana or a character beyond that plane (OTHER_RULES) go through the regular expression.
_TABLE_SIZE = 0x10000
_LETTER, _DIGIT, _JOINER, _IN_WORD, _IN_NUMBER, _APOSTROPHE, _ALNUM, _CLAUSE, _BREAK, _OTHER_RULES = (
    1 << bit for bit in range(10)
)
_PROPERTIES = {
    r"\p{WB=ALetter}": _LETTER,
    r"\p{WB=Numeric}": _DIGIT,
    r"\p{WB=ExtendNumLet}": _JOINER,
    r"[\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}]": _IN_WORD,
    r"[\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}]": _IN_NUMBER,
    r"['’]": _APOSTROPHE,
    r"[\p{L}\p{N}]": _ALNUM,
    rf"[{regex.escape(_CLAUSE_ENDS)}]": _CLAUSE,
    rf"[{LINE_BREAKS}]": _BREAK,
    r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}\p{WB=Hebrew_Letter}\p{WB=Katakana}]": _OTHER_RULES,
}


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
    properties = _properties_of(text)
    sentences = _sentence_starts(texts, offsets, text, properties, language)
    words, clause_ends = _words(text, properties, sentences)

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
    place = np.arange(len(word_starts))
    place_in_run = place - np.maximum.accumulate(np.where(starts_run[word_starts], place, 0))
    phrase_starts = word_starts[place_in_run % max_phrase_words == 0]
    return Units(offsets, {"word": word_starts, "phrase": phrase_starts, "sentence": sentences})


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]"""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


@functools.cache
def _character_properties() -> np.ndarray:
    """uint16 [_TABLE_SIZE + 1], by code point; the last entry stands for all beyond."""
    table = np.zeros(_TABLE_SIZE + 1, dtype=np.uint16)
    table[-1] = _OTHER_RULES | _ALNUM  # asked of each such character
    characters = "".join(map(chr, range(_TABLE_SIZE)))
    for pattern, bit in _PROPERTIES.items():
        table[[match.start() for match in regex.finditer(pattern, characters)]] |= bit
    return table


def _properties_of(text: str) -> np.ndarray:
    """uint16 [len(text)]"""
    codes = code_points(text)
    properties = _character_properties()[np.minimum(codes, _TABLE_SIZE)]
    for place in np.flatnonzero(codes >= _TABLE_SIZE).tolist():
        if not text[place].isalnum():
            properties[place] = _OTHER_RULES
    return properties


def _sentence_starts(texts, offsets, text: str, properties: np.ndarray, language: str) -> np.ndarray:
    found = []
    for offset, one in zip(offsets.tolist(), texts, strict=False):
        found += [offset + start for start in sentence_starts(one, language)]
    breaks = np.flatnonzero(properties & _BREAK)
    ends = [place + 1 for place in breaks.tolist() if text[place : place + 2] != "\r\n"]
    # A text is whole, whatever sentencex makes of its beginning.
    starts = [*offsets[:-1].tolist(), *found, *ends]
    return np.flatnonzero(_flags(len(text) + 1, np.array(starts, dtype=np.int64))[:-1])


def _words(text: str, properties: np.ndarray, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where words start, where clause punctuation stands that is not inside a word), int64, ascending."""
    starts_sentence = _flags(len(text), sentences)
    starts_segment = ~_joined(properties, starts_sentence)
    # regex joins an apostrophe that opens a word to it if a vowel follows ("'Apple"), which UAX #29 does not.
    opens = starts_segment & ((properties & _APOSTROPHE) != 0)
    opens[:-1] &= (properties[1:] & _LETTER) != 0
    special = np.flatnonzero(opens | ((properties & _OTHER_RULES) != 0))
    ends = np.append(sentences[1:], len(text))
    numbers = np.flatnonzero(_flags(len(sentences), np.searchsorted(sentences, special, side="right") - 1))
    for start, end in zip(sentences[numbers].tolist(), ends[numbers].tolist(), strict=True):
        boundaries = np.array([match.start() for match in _BOUNDARY.finditer(text[start:end])])
        starts_segment[start:end] = _flags(end - start + 1, boundaries)[:-1]

    segment_of = np.maximum.accumulate(np.where(starts_segment, np.arange(len(text)), 0))
    is_word = _flags(len(text), segment_of[(properties & _ALNUM) != 0])
    is_clause_end = ((properties & _CLAUSE) != 0) & ~is_word[segment_of]
    return np.flatnonzero(is_word), np.flatnonzero(is_clause_end)


def _flags(size: int, places: np.ndarray) -> np.ndarray:
    """bool [size], true at `places`."""
    flags = np.zeros(size, dtype=bool)
    flags[places] = True
    return flags


def _joined(properties: np.ndarray, starts_sentence: np.ndarray) -> np.ndarray:
    """bool [n]: no word boundary before the character, by UAX #29 rules WB5 to WB13b within one sentence."""
    core = (properties & (_LETTER | _DIGIT | _JOINER)) != 0
    joined = np.zeros(len(properties), dtype=bool)
    joined[1:] = core[:-1] & core[1:]  # WB5, WB8 to WB10, WB13a, WB13b
    for outer, inner in ((_LETTER, _IN_WORD), (_DIGIT, _IN_NUMBER)):  # WB6 and WB7, WB11 and WB12
        sides = (properties & outer) != 0
        middle = np.flatnonzero(sides[:-2] & sides[2:] & ((properties[1:-1] & inner) != 0)) + 1
        middle = middle[~(starts_sentence[middle] | starts_sentence[middle + 1])]
        joined[middle] = joined[middle + 1] = True
    return joined & ~starts_sentence
