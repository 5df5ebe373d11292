"""The default word boundaries of Unicode (UAX #29), rule by rule.

`\\b` of the package regex differs from them: it joins an apostrophe to a vowel behind it, and does not look through
accents where a rule is about three characters.
"""

import numpy as np
import regex

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
