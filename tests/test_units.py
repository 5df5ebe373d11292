"""Words, phrases and sentences: facts written out by hand, and the slow twin on hard text."""

import brute_force
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from mlppl.config import LEVELS
from mlppl.scoring.units import code_points, segment, starts_segment


def cut(text, level, language="en", max_phrase_words=4):
    """The units of one text as strings."""
    starts = segment([text], language, max_phrase_words).starts[level].tolist()
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


# --- sentences -------------------------------------------------------------------------------------------------------


def test_a_sentence_keeps_the_space_that_follows_it():
    assert cut("One day. It rained! Why?", "sentence") == ["One day. ", "It rained! ", "Why?"]


def test_an_abbreviation_does_not_end_a_sentence():
    assert cut("Mr. Brown left. He ran.", "sentence") == ["Mr. Brown left. ", "He ran."]


@pytest.mark.parametrize("line_break", ["\n", "\v", "\f", "\r", "\r\n", "\x85", "\u2028", "\u2029"])
def test_a_line_break_ends_a_sentence_and_belongs_to_it(line_break):
    text = f"no full stop{line_break}next line"
    assert cut(text, "sentence") == [f"no full stop{line_break}", "next line"]


def test_a_blank_line_is_no_part_of_a_sentence_with_words():
    assert cut("one\n\ntwo", "sentence") == ["one", "\n", "\n", "two"]


@pytest.mark.parametrize("text", ["one\n\ntwo", "One.\n\n\nTwo. Three\n\n", "one\n \ntwo\n", "\n\none"])
def test_a_windows_line_break_divides_as_any_other(text):
    windows = cut(text.replace("\n", "\r\n"), "sentence")
    assert [unit.replace("\r\n", "\n") for unit in windows] == cut(text, "sentence")


def test_the_language_decides_what_an_abbreviation_is():
    text = "Das gilt z.B. Hunden. Und Katzen."
    assert cut(text, "sentence", "de") == ["Das gilt z.B. Hunden. ", "Und Katzen."]


def test_a_full_stop_behind_a_space_outside_ascii_does_not_crash():
    assert "".join(cut("Plan Z\xa0. Then home.", "sentence")) == "Plan Z\xa0. Then home."


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The quick fox.", ["The ", "quick ", "fox."]),
        ("wait, what?!", ["wait, ", "what?!"]),
        ("don't stop", ["don't ", "stop"]),
        ("don’t stop", ["don’t ", "stop"]),
        ("1,000 and 3.14", ["1,000 ", "and ", "3.14"]),
        ("snake_case x-ray", ["snake_case ", "x-", "ray"]),
        ("a  b\tc", ["a  ", "b\t", "c"]),
        ("e\u0301te\u0301 fini", ["e\u0301te\u0301 ", "fini"]),  # combining accents stay with their letter
        ("ein\u00adfach", ["ein\u00adfach"]),  # so does a soft hyphen
        ("我们走", ["我", "们", "走"]),  # UAX #29 has no dictionary: each ideograph is a segment
        ("カタカナ です", ["カタカナ ", "で", "す"]),  # Katakana runs join, Hiragana do not
        ("שלום עולם", ["שלום ", "עולם"]),
        ("٣٤ كتب", ["٣٤ ", "كتب"]),
        ("hi 👩‍👩‍👧 there", ["hi 👩‍👩‍👧 ", "there"]),  # an emoji has no letter: it trails the word before it
        ("go 🇩🇪🇫🇷 go", ["go 🇩🇪🇫🇷 ", "go"]),
        ("Ⅷ ½", ["Ⅷ ", "½"]),
        ("a \U0003d000", ["a ", "\U0003d000"]),  # a seal character, a letter since Unicode 18
    ],
)
def test_words_with_what_trails_them(text, words):
    assert cut(text, "word") == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"Come here," he said.', ['"Come ', 'here," ', "he ", "said."]),
        ("'Apple' is a word.", ["'Apple' ", "is ", "a ", "word."]),
        ("’Tis so.", ["’Tis ", "so."]),
        ("  (Well) then", ["  (Well) ", "then"]),
        ("— Yes.", ["— Yes."]),
    ],
)
def test_what_stands_before_the_first_word_belongs_to_it(text, words):
    assert cut(text, "word") == words


def test_a_quote_inside_a_sentence_trails_the_word_before_it():
    assert cut('He said "no" twice', "word") == ["He ", 'said "', 'no" ', "twice"]


@pytest.mark.parametrize("word", ["apples", "bananas", "Every", "étude", "it"])
@pytest.mark.parametrize("mark", ["'", "’", '"'])
def test_a_quote_before_a_word_is_no_part_of_it_vowel_or_not(word, mark):
    assert cut(f"He said {mark}{word}{mark} twice", "word") == ["He ", f"said {mark}", f"{word}{mark} ", "twice"]


@pytest.mark.parametrize(
    ("text", "segments"),
    [  # out of Unicode's own WordBreakTest
        ("a\u2060'\u2060a", ["a\u2060'\u2060a"]),
        ("1\u0308.\u03081", ["1\u0308.\u03081"]),
        ("\u0308A", ["\u0308", "A"]),
        ("🛑\u200d🛑 a\u200d🛑", ["🛑\u200d🛑", " ", "a\u200d🛑"]),
        ("a🇦🇧\u200d🇨🇩b", ["a", "🇦🇧\u200d", "🇨🇩", "b"]),
        ("א\"א א' a' \u3000 x", ['א"א', " ", "א'", " ", "a", "'", " \u3000 ", "x"]),
        (
            "A__A 1_a a.b 1,2 a,b 1.a",
            ["A__A", " ", "1_a", " ", "a.b", " ", "1,2", " ", "a", ",", "b", " ", "1", ".", "a"],
        ),
    ],
)
def test_word_boundaries_written_out(text, segments):
    found = starts_segment(code_points(text), np.array([0]))
    assert np.flatnonzero(found).tolist() == np.cumsum([0, *map(len, segments)])[:-1].tolist()
    assert brute_force.word_segments(text) == segments


def test_a_word_never_reaches_into_the_next_sentence():
    assert cut("one\ntwo", "word") == ["one\n", "two"]


@pytest.mark.parametrize("text", ["...", "?!", "— —", "😀😀", "   ", "\n", "*,*"])
def test_a_sentence_without_a_word_is_one_unit_at_every_level(text):
    assert [cut(text, level) for level in LEVELS] == [[text]] * 3


# --- phrases ---------------------------------------------------------------------------------------------------------


def test_a_phrase_has_at_most_four_words():
    assert cut("a b c d e f g h i", "phrase") == ["a b c d ", "e f g h ", "i"]


def test_a_phrase_has_at_most_max_phrase_words():
    assert cut("a b c d e", "phrase", max_phrase_words=2) == ["a b ", "c d ", "e"]
    assert cut("a b c", "phrase", max_phrase_words=1) == cut("a b c", "word")


@pytest.mark.parametrize("mark", [*",;:)]、，；：（）【】", " —", " –", " (", " ["])
def test_clause_punctuation_ends_a_phrase(mark):
    assert cut(f"one two{mark} three four five", "phrase") == [f"one two{mark} ", "three four five"]


@pytest.mark.parametrize("mark", ["-", "/", '"', "”", "*", " & "])
def test_other_punctuation_inside_a_sentence_does_not(mark):
    assert cut(f"one two{mark} three", "phrase") == [f"one two{mark} three"]


def test_clause_punctuation_inside_a_number_does_not_end_a_phrase():
    assert cut("pay 1,000 at once, please", "phrase") == ["pay 1,000 at once, ", "please"]


def test_a_colon_between_digits_is_no_part_of_a_number():
    assert cut("at 10:30 sharp", "phrase") == ["at 10:", "30 sharp"]  # UAX #29 joins digits over , ; and . alone


def test_clause_punctuation_before_the_first_word_does_not_end_a_phrase():
    assert cut("(one) two", "phrase") == ["(one) ", "two"]
    assert cut("(one two", "phrase") == ["(one two"]


def test_four_words_count_anew_after_clause_punctuation():
    assert cut("a, b c d e f", "phrase") == ["a, ", "b c d e ", "f"]


def test_a_phrase_ends_with_its_sentence():
    assert cut("One day. It rained.", "phrase") == ["One day. ", "It rained."]


# --- many texts, any text --------------------------------------------------------------------------------------------


def test_no_texts_and_empty_texts_have_no_units():
    for texts in ([], [""], ["", ""]):
        units = segment(texts)
        assert units.offsets.tolist() == [0] * (len(texts) + 1)
        assert [starts.tolist() for starts in units.starts.values()] == [[], [], []]


def test_texts_side_by_side_do_not_join():
    units = segment(["one", "", "two", "1,", "000"])
    assert units.offsets.tolist() == [0, 3, 3, 6, 8, 11]
    assert [units.starts[level].tolist() for level in LEVELS] == [[0, 3, 6, 8]] * 3


@settings(max_examples=400)
@given(
    st.lists(toys.texts, min_size=1, max_size=4),
    st.sampled_from(["en", "de", "fr", "es", "ru", "ja", "zh", "ar", "he", "hi", "th", "xx"]),
    st.integers(1, 5),
)
def test_units_equal_the_slow_twin_among_any_neighbours(texts, language, max_phrase_words):
    units = segment(texts, language, max_phrase_words)
    expected = {level: [] for level in LEVELS}
    for offset, text in zip(units.offsets, texts, strict=False):
        for level, spans in brute_force.units(text, language, max_phrase_words).items():
            expected[level] += [offset + start for start, _ in spans]
    assert {level: starts.tolist() for level, starts in units.starts.items()} == expected


@settings(max_examples=300)
@given(
    st.lists(st.text("ae1٣אבカ_.:,;'\"’·\u0308\u00ad\u200d \u3000😀Ⓜ🇩🇪\r\n\v中", max_size=9), min_size=1, max_size=3)
)
def test_word_boundaries_are_those_of_unicodes_rules(texts):
    texts = [text for text in texts if text]
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    expected = [len(segment) for text in texts for segment in brute_force.word_segments(text)]
    found = np.flatnonzero(starts_segment(code_points("".join(texts)), starts))
    assert found.tolist() == np.cumsum([0, *expected])[:-1].tolist()


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_units_equal_the_slow_twin_on_any_unicode(text):
    expected = {level: [start for start, _ in spans] for level, spans in brute_force.units(text).items()}
    assert {level: starts.tolist() for level, starts in segment([text]).starts.items()} == expected


@given(toys.texts)
def test_levels_nest(text):
    """Every phrase starts where a word does, every sentence where a phrase does."""
    starts = segment([text]).starts
    assert np.isin(starts["phrase"], starts["word"]).all()
    assert np.isin(starts["sentence"], starts["phrase"]).all()
    assert all(list(one) == sorted(set(one)) for one in starts.values())
    assert not text or all(one[0] == 0 for one in starts.values())


def test_a_long_text_with_blank_lines_is_segmented_whole():
    # sentencex 1.0.32 leaves out 6 of these 80 line breaks.
    text = ("One fox ran. " * 40 + "\n\n") * 40
    units = segment([text])
    assert sum(text[start].isalpha() for start in units.starts["word"]) == 40 * 40 * 3
    assert sum(text[start] == "O" for start in units.starts["sentence"]) == 40 * 40
    assert units.starts["sentence"].tolist() == [start for start, _ in brute_force.units(text)["sentence"]]
