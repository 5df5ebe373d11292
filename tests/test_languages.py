"""Codes of languages: regions are cut off, and what is no code is refused with the nearest."""

import pytest
import sentencex

from multi_level_ppl_trl import MultiLevelPPLCalculator, main
from ppl.errors import InputError
from ppl.languages import NAMES, THREE_LETTERS, checked_language


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("de", "de"),
        ("DE", "de"),
        ("de-DE", "de"),
        ("pt_BR", "pt"),
        ("zh-Hans-CN", "zh"),
        (" en ", "en"),
        ("gsw", "gsw"),
    ],
)
def test_a_region_is_cut_off(tokenizer, given, code):
    assert checked_language(given) == code
    assert MultiLevelPPLCalculator(tokenizer, language=given).definitions["language"] == code


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("german", "'de' (German)"),
        ("Deutsch", "did you mean"),
        ("frnch", "'fr' (French)"),
        ("", "did you mean"),
        ("xx", "did you mean"),
    ],
)
def test_what_is_no_code_is_refused_with_the_nearest(tokenizer, capsys, given, near):
    with pytest.raises(InputError) as error:
        MultiLevelPPLCalculator(tokenizer, language=given)
    assert repr(given) in str(error.value) and near in str(error.value)
    assert main(["--text", "Ein Fuchs.", "--language", given]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert near in line


def test_every_code_splits_sentences():
    assert len(NAMES) == 183 and all(len(code) == 2 for code in NAMES)
    for code in [*NAMES, *THREE_LETTERS]:
        assert "".join(sentencex.segment(code, "A fox. It ran.")) == "A fox. It ran."


def test_german_is_not_split_as_english_is():
    text = "Das war am 3. Mai in Berlin."
    assert list(sentencex.segment("de", text)) != list(sentencex.segment("en", text))
