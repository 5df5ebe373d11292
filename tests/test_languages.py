"""Codes of languages: regions are cut off, and what is no code is refused with the nearest."""

import pytest
import sentencex
from langcodes.registry_parser import parse_registry

from mlppl.config import checked_language
from mlppl.errors import InputError
from multi_level_ppl_trl import MultiLevelPPLCalculator, main


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
        ("tl", "tl"),  # and not fil, which is another code to sentencex
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
        ("deu", "did you mean 'de' (German)"),  # sentencex knows the shortest code only
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
    codes = [one["Subtag"] for one in parse_registry() if one["Type"] == "language" and "Deprecated" not in one]
    short = [code for code in codes if len(code) == 2]
    assert len(short) > 180
    for code in [*short, "gsw", "yue", "nds", "sah"]:
        assert checked_language(code) == code
        assert "".join(sentencex.segment(code, "A fox. It ran.")) == "A fox. It ran."


def test_german_is_not_split_as_english_is():
    text = "Das war am 3. Mai in Berlin."
    assert list(sentencex.segment("de", text)) != list(sentencex.segment("en", text))
