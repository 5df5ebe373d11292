"""From surprisals to perplexities: sums by hand, the invariants of the definition one by one, the calculator's face."""

import math

import brute_force
import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from mlppl.config import AGGREGATIONS
from mlppl.scoring.levels import level_perplexities, unit_sums
from mlppl.scoring.surprisal import SurprisalScorer
from mlppl.scoring.tokens import TextEncoder
from mlppl.scoring.units import segment
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator

TEXT = 'Once upon a time, there was a small fox. It said: "I am hungry!"\nThe end.'


@pytest.fixture(scope="module")
def calculator(tokenizer):
    return MultiLevelPPLCalculator(tokenizer)


def by_hand(text, chars, surprisals):
    values = level_perplexities(segment([text]), [np.array(chars)], [np.array(surprisals)])
    return dict(zip(LEVELS, values[0], strict=True))


# --- sums ------------------------------------------------------------------------------------------------------


def test_a_unit_sums_the_tokens_that_start_in_it():
    counts, sums = unit_sums(np.array([0, 4, 9]), np.array([0, 2, 4, 11]), np.array([1.0, 2.0, 4.0, 8.0]))
    assert counts.tolist() == [2, 1, 1]
    assert sums.tolist() == [3, 4, 8]


def test_a_unit_that_no_token_starts_in_holds_nothing():
    counts, sums = unit_sums(np.array([0, 4, 9]), np.array([0, 9]), np.array([1.0, 2.0]))
    assert (counts.tolist(), sums.tolist()) == ([1, 0, 1], [1, 0, 2])


def test_every_unit_has_one_vote():
    # "Go now." is one sentence and one phrase of two words, of three tokens and one: rates (1+2+3)/3 = 2 and 8/1 = 8
    found = by_hand("Go now.", [0, 0, 1, 3], [1.0, 2.0, 3.0, 8.0])
    assert found["word"] == pytest.approx(math.exp((2 + 8) / 2))
    assert found["phrase"] == found["sentence"] == pytest.approx(math.exp((1 + 2 + 3 + 8) / 4))


@given(
    surprisals=st.lists(st.floats(0, 20), min_size=12, max_size=12),
    more=st.floats(0, 20),
    index=st.integers(0, 11),
)
def test_no_level_falls_when_a_token_becomes_more_surprising(surprisals, more, index):
    text = "A fox, a crow and I. Yes, we can go home."
    chars = [0, 2, 5, 7, 9, 14, 18, 21, 26, 29, 33, 36]
    before = by_hand(text, chars, surprisals)
    surprisals[index] += more
    after = by_hand(text, chars, surprisals)
    assert all(after[level] >= before[level] * (1 - 1e-12) for level in LEVELS)


def test_a_unit_without_a_token_has_no_vote():
    # three words; no token starts in "and ": rates 1 and 3
    assert by_hand("Go and run", [0, 7], [1.0, 3.0])["word"] == pytest.approx(math.exp((1 + 3) / 2))


def test_a_text_without_a_scored_token_is_nan_and_leaves_its_neighbours_alone():
    texts, chars = ["Go", "", "Go"], [np.array([0]), np.array([], dtype=int), np.array([1])]
    values = level_perplexities(segment(texts), chars, [np.array([1.0]), np.array([]), np.array([2.0])])
    assert np.isnan(values[1]).all()
    np.testing.assert_allclose(values[[0, 2]], np.exp([[1] * 3, [2] * 3]))


def test_levels_by_hand():
    text = "A fox, a crow. Yes."
    # tokens:  A   fox  ,   a   crow .   Yes .      chars 0 2 5 7 9 13 15 18
    # words:   A:1 | fox,:2+6=8/2=4 | a:3 | crow.:1+5=6/2=3 | Yes.:7+1=8/2=4      mean (1+4+3+3+4)/5 = 3
    # phrases: A fox,: 9/3=3 | a crow.: 9/3=3 | Yes.: 4                           mean 10/3
    # sentences: 18/6=3 | 8/2=4                                                   mean 3.5
    found = by_hand(text, [0, 2, 5, 7, 9, 13, 15, 18], [1.0, 2, 6, 3, 1, 5, 7, 1])
    assert found == pytest.approx({"word": math.exp(3), "phrase": math.exp(10 / 3), "sentence": math.exp(3.5)})


# --- invariants (DESIGN.md, section 1) -------------------------------------------------------------------------------


@given(text=toys.texts, context=toys.texts)
def test_units_cover_every_scored_token_once_and_in_order(any_tokenizer, text, context):
    """At each level the tokens, in order, fall into units, in order: all of them, none twice."""
    [one] = TextEncoder(any_tokenizer).encode([context], [text])
    for starts in segment([text]).starts.values():
        unit = np.searchsorted(starts, one.chars, side="right") - 1
        assert (np.diff(unit) >= 0).all()
        counts, _ = unit_sums(starts, one.chars, np.ones(len(one.chars)))
        assert len(counts) == len(starts)
        assert counts.sum() == len(one.chars)


@settings(max_examples=25)
@given(text=toys.texts, context=st.sampled_from(["", "The fox said: "]))
def test_token_counts_and_total_surprisal_are_the_same_at_all_levels(model, calculator, text, context):
    explained = calculator.explain(model, text, context)
    [one] = calculator.encoder.encode([context], [text])
    total = sum(surprisal for _, surprisal in brute_force.token_surprisals(model, calculator.tokenizer, text, context))
    for level in LEVELS:
        assert sum(unit["n_tokens"] for unit in explained[level]) == len(one.positions)
        assert sum(unit["surprisal"] for unit in explained[level]) == pytest.approx(total, rel=1e-4)


def test_units_of_equal_length_give_the_ordinary_token_perplexity(model, calculator):
    text = "The fox walked home. The fox walked home."  # two sentences, two phrases, of equally many tokens
    [one] = calculator.encoder.encode([""], [text])
    surprisals = [surprisal for _, surprisal in brute_force.token_surprisals(model, calculator.tokenizer, text)]
    explained = calculator.explain(model, text)
    for level in ("phrase", "sentence"):
        first, second = (unit["n_tokens"] for unit in explained[level])
        assert first == second
    ordinary = math.exp(sum(surprisals) / len(one.positions))
    found = calculator.compute_all_levels(model, text)
    assert (found["phrase"], found["sentence"]) == pytest.approx((ordinary, ordinary), rel=1e-4)


@given(surprisals=st.lists(st.floats(0, 20), min_size=1, max_size=12))
def test_one_token_a_word_gives_the_ordinary_token_perplexity_of_words(surprisals):
    found = by_hand("x " * len(surprisals), [2 * index for index in range(len(surprisals))], surprisals)
    assert found["word"] == found["sentence"] == pytest.approx(math.exp(math.fsum(surprisals) / len(surprisals)))


@settings(max_examples=20)
@given(text=toys.texts, context=toys.texts)
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(any_tokenizer, text, context):
    calculator = MultiLevelPPLCalculator(any_tokenizer)
    [one] = calculator.encoder.encode([context], [text])
    expected = toys.VOCABULARY if len(one.positions) else math.nan
    found = calculator.compute_all_levels(UNIFORM, text, context)
    assert found == pytest.approx(dict.fromkeys(LEVELS, expected), rel=1e-6, nan_ok=True)


UNIFORM = toys.uniform()

TEXTS = [TEXT, "Yes.", "The fox and the crow walked home, slowly.", "", "你好 fox!", "  ", "Why?\nBecause."]
CONTEXTS = ["", "They said", "Once", "The", "", "x", "The fox said: "]


def close(found, expected):
    for level in LEVELS:
        np.testing.assert_allclose(found[level], expected[level], rtol=1e-4)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"max_batch_tokens": 16}])
def test_batch_size_does_not_matter(model, tokenizer, calculator, options):
    close(
        MultiLevelPPLCalculator(tokenizer, **options).compute_all_levels(model, TEXTS, CONTEXTS),
        calculator.compute_all_levels(model, TEXTS, CONTEXTS),
    )


def test_neighbours_do_not_matter(model, calculator):
    together = calculator.compute_all_levels(model, TEXTS, CONTEXTS)
    alone = [calculator.compute_all_levels(model, text, context) for text, context in zip(TEXTS, CONTEXTS, strict=True)]
    close(together, {level: [one[level] for one in alone] for level in LEVELS})


def test_order_does_not_matter(model, calculator):
    forward = calculator.compute_all_levels(model, TEXTS, CONTEXTS)
    backward = calculator.compute_all_levels(model, TEXTS[::-1], CONTEXTS[::-1])
    close(backward, {level: forward[level].flip(0) for level in LEVELS})


def test_padding_side_and_pad_token_do_not_matter(model, calculator):
    expected = calculator.compute_all_levels(model, TEXTS, CONTEXTS)
    for side in ("left", "right"):
        for pad in (True, False):
            other = toys.byte_level(pad=pad)
            other.padding_side = side
            close(MultiLevelPPLCalculator(other).compute_all_levels(model, TEXTS, CONTEXTS), expected)


def test_levels_equal_the_slow_twin(model, any_tokenizer):
    pairs = [("", 'The fox said: "No, 1,000!"'), ("The fo", "x ate  ﬁsh.\n\u200bYes"), ("你", "好 😀 walked\n ")]
    found = MultiLevelPPLCalculator(any_tokenizer).compute_all_levels(
        model, [text for _, text in pairs], [context for context, _ in pairs]
    )
    twins = [brute_force.all_levels(model, any_tokenizer, text, context) for context, text in pairs]
    close(found, {level: [twin[level] for twin in twins] for level in LEVELS})


@settings(max_examples=40)
@given(text=toys.texts, context=st.sampled_from(["", "The fox said: "]))
def test_levels_of_any_text_equal_the_slow_twin(model, calculator, text, context):
    twin = brute_force.all_levels(model, calculator.tokenizer, text, context)
    assert calculator.compute_all_levels(model, text, context) == pytest.approx(twin, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("max_phrase_words", [1, 3])
@pytest.mark.parametrize("language", ["en", "de"])
def test_options_reach_the_definition(model, tokenizer, aggregation, max_phrase_words, language):
    options = {"aggregation": aggregation, "max_phrase_words": max_phrase_words, "language": language}
    found = MultiLevelPPLCalculator(tokenizer, **options).compute_all_levels(model, TEXT + " Das gilt z.B. Hunden.")
    twin = brute_force.all_levels(model, tokenizer, TEXT + " Das gilt z.B. Hunden.", **options)
    assert found == pytest.approx(twin, rel=1e-4)


# --- the calculator's face -------------------------------------------------------------------------------------------


def test_one_text_gives_floats(model, calculator):
    found = calculator.compute_all_levels(model=model, texts=TEXT)
    assert {level: type(value) for level, value in found.items()} == dict.fromkeys(LEVELS, float)


@pytest.mark.parametrize("texts", [[], [TEXT], [TEXT, TEXT, "Yes."], (TEXT,)])
def test_a_list_gives_float64_tensors(model, calculator, texts):
    found = calculator.compute_all_levels(model=model, texts=texts)
    assert list(found) == list(LEVELS)
    for value in found.values():
        assert (value.shape, value.dtype) == ((len(texts),), torch.float64)


def test_equal_texts_have_equal_numbers(model, calculator):
    found = calculator.compute_all_levels(model, [TEXT, "Yes.", TEXT])
    assert all(found[level][0] == found[level][2] for level in LEVELS)


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_a_blank_text_has_the_perplexity_nan(model, calculator, blank):
    assert all(math.isnan(value) for value in calculator.compute_all_levels(model, blank).values())


def test_chat_messages_are_texts_and_contexts_too(model, chat_tokenizer):
    calculator = MultiLevelPPLCalculator(chat_tokenizer)
    user = [{"role": "user", "content": "The fox?"}]
    answers = [
        [{"role": "assistant", "content": "Yes."}],
        [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
    ]
    found = calculator.compute_all_levels(
        model, [*answers, "Yes."], [user, user, "<s><|user|>The fox?</s><|assistant|>"]
    )
    twin = brute_force.all_levels(model, chat_tokenizer, "Yes.", "<s><|user|>The fox?</s><|assistant|>")
    close(found, {level: [twin[level]] * 3 for level in LEVELS})


def test_chat_messages_need_a_chat_template(model, calculator):
    with pytest.raises(ValueError, match="no chat template"):
        calculator.compute_all_levels(model, ["Yes."], [[{"role": "user", "content": "The fox?"}]])


@pytest.mark.parametrize("contexts", [["a"], ["a", "b", "c"], "ab"])
def test_contexts_must_be_as_many_as_texts(model, calculator, contexts):
    with pytest.raises(ValueError, match="2 texts need a list of 2 contexts"):
        calculator.compute_all_levels(model, ["x", "y"], contexts)


@pytest.mark.parametrize(
    "option", [{"aggregation": "median"}, {"max_phrase_words": 0}, {"batch_size": 0}, {"max_batch_tokens": -1}]
)
def test_options_that_make_no_sense_are_refused_by_name(tokenizer, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        MultiLevelPPLCalculator(tokenizer, **option)


def test_explain_lists_the_units_with_their_numbers(model, calculator):
    explained = calculator.explain(model=model, text=TEXT, context="Well. ")
    assert [unit["text"] for unit in explained["phrase"]] == [
        "Once upon a time, ", "there was a small ", "fox. ", "It said: \"", "I am hungry!\"\n", "The end.",
    ]  # fmt: skip
    for level in LEVELS:
        assert "".join(unit["text"] for unit in explained[level]) == TEXT
        for unit in explained[level]:
            assert unit["text"] == TEXT[unit["start"] : unit["end"]]
            assert unit["perplexity"] == pytest.approx(math.exp(unit["surprisal"] / unit["n_tokens"]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_explain_has_the_levels_perplexities_from_the_same_pass(model, tokenizer, aggregation, monkeypatch):
    calculator = MultiLevelPPLCalculator(tokenizer, aggregation=aggregation)
    expected = calculator.compute_all_levels(model, TEXT, "Well. ")
    passes = []
    start = SurprisalScorer.start
    monkeypatch.setattr(SurprisalScorer, "start", lambda self, encoded: passes.append(1) or start(self, encoded))
    explained = calculator.explain(model, TEXT, "Well. ")
    assert explained.perplexities == pytest.approx(expected, rel=1e-9)
    assert len(passes) == 1


def test_scores_count_the_tokens_that_were_read(model, tokenizer):
    calculator = MultiLevelPPLCalculator(tokenizer)
    pairs = [("Well. ", TEXT), ("", "Once."), ("Well. ", TEXT), ("", "")]
    encoded = TextEncoder(tokenizer).encode(*zip(*pairs, strict=True))
    scores = calculator.score(model, pairs)
    assert scores.tokens.tolist() == [len(one.positions) for one in encoded]
    assert scores.read.tolist() == [len(one.ids) for one in encoded]
    assert scores.longest == max(len(one.ids) for one in encoded)


def test_explain_and_compute_all_levels_agree(model, calculator):
    explained = calculator.explain(model, TEXT)
    for level, value in calculator.compute_all_levels(model, TEXT).items():
        rates = [unit["surprisal"] / unit["n_tokens"] for unit in explained[level]]
        assert value == pytest.approx(math.exp(sum(rates) / len(rates)))


def test_explain_has_no_unit_for_a_blank_text(model, calculator):
    assert calculator.explain(model, " \n") == {"word": [], "phrase": [], "sentence": []}
