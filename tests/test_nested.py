"""Nested levels against their slow twin, which runs every unit alone; what must hold whatever the model."""

import math

import brute_force
import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from mlppl.config import LEVELS
from mlppl.errors import InputError
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.surprisal import SurprisalScorer

TEXTS = [
    *toys.SENTENCES,
    " ".join(toys.SENTENCES),
    "The fox. The fox said. The fox.\nOnce upon a time, once upon a time there was a crow;",
    "Go.",
    "a",
    "😀 ﬁ x</s>y, then 中文。ひら",
]
PAIRS = [(context, text) for context in ("", "Once upon a time ") for text in TEXTS]


def scored(model, tokenizer, pairs, **options):
    return MultiLevelPPLCalculator(tokenizer, aggregation="nested", **options).score_pairs(model, pairs)


def test_every_unit_run_alone_gives_the_same(any_tokenizer, model):
    expected = [brute_force.nested_levels(model, any_tokenizer, text, context) for context, text in PAIRS]
    np.testing.assert_allclose(scored(model, any_tokenizer, PAIRS), expected, rtol=1e-4)


def test_learned_positions(tokenizer, gpt2_model):
    expected = [brute_force.nested_levels(gpt2_model, tokenizer, text, context) for context, text in PAIRS]
    np.testing.assert_allclose(scored(gpt2_model, tokenizer, PAIRS), expected, rtol=1e-4)


def test_a_window_shorter_than_a_sentence(tokenizer):
    model = toys.llama(max_position_embeddings=8)
    expected = [brute_force.nested_levels(model, tokenizer, text, context, window=8) for context, text in PAIRS]
    np.testing.assert_allclose(scored(model, tokenizer, PAIRS), expected, rtol=1e-4)


@given(text=toys.texts, context=st.sampled_from(["", "The fox, "]))
def test_any_text(text, context, model, tokenizer):
    expected = brute_force.nested_levels(model, tokenizer, text, context)
    np.testing.assert_allclose(scored(model, tokenizer, [(context, text)])[0], expected, rtol=1e-4)


def test_the_product_of_the_levels_is_the_ordinary_perplexity(model, tokenizer):
    values = scored(model, tokenizer, PAIRS)
    for (context, text), levels in zip(PAIRS, values, strict=True):
        tokens = [value for _, value in brute_force.token_surprisals(model, tokenizer, text, context)]
        assert levels.prod() == pytest.approx(math.exp(math.fsum(tokens) / len(tokens)), rel=1e-5)


def test_a_uniform_model_has_its_vocabulary_at_the_word_level_and_gains_nothing_above(tokenizer):
    values = scored(toys.uniform(), tokenizer, PAIRS)
    np.testing.assert_allclose(values, [[toys.VOCABULARY, 1, 1]] * len(PAIRS), rtol=1e-6)


@pytest.mark.parametrize("bos", [True, False])  # without BOS the EOS token stands before a unit, and before the text
def test_one_phrase_is_no_more_than_its_words_and_one_sentence_no_more_than_its_phrases(model, bos):
    tokenizer = toys.byte_level(bos=bos)
    phrase, sentence = scored(model, tokenizer, [("", "Once upon a time"), ("", toys.SENTENCES[0])])
    assert phrase[1:] == pytest.approx([1, 1], rel=1e-6)
    assert sentence[2] == pytest.approx(1, rel=1e-6)
    assert abs(sentence[1] - 1) > 0.01


def test_a_context_moves_the_sentence_level_only(model, tokenizer):
    alone, behind = scored(model, tokenizer, [("", TEXTS[4]), ("The crow laughed. ", TEXTS[4])])
    assert behind[:2] == pytest.approx(alone[:2], rel=1e-6)
    assert abs(behind[2] / alone[2] - 1) > 0.001


@pytest.mark.parametrize("limits", [{}, {"batch_size": 1}, {"max_batch_tokens": 16}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_company_and_order_change_nothing(tokenizer, limits, attention):
    model = toys.llama(attn_implementation=attention)
    alone = np.concatenate([scored(model, tokenizer, [pair]) for pair in PAIRS])
    order = np.random.default_rng(0).permutation(len(PAIRS))
    np.testing.assert_allclose(scored(model, tokenizer, [PAIRS[i] for i in order], **limits), alone[order], rtol=1e-4)


def test_what_is_equal_runs_once_and_what_begins_another_sequence_not_at_all(model, tokenizer):
    asked = []

    class Listening(SurprisalScorer):
        def score(self, encoded):
            asked.extend(encoded)
            return super().score(encoded)

    calculator, model = MultiLevelPPLCalculator(tokenizer, aggregation="nested"), Listening(model)
    first, second = "Once upon a time there was a small fox.", " Once upon a time it lived near the old mill."
    calculator.score_pairs(model, [("", first + second), ("", first), ("The crow:", first + second)])
    sequences = sorted(tokenizer.decode(one.ids[1:]) for one in asked)
    # A space belongs to the token behind it. Behind a context the first sentence begins with one token more.
    assert sequences == sorted(
        [
            *(first + second, "The crow:" + first + second),
            second,
            *(" there was a small", " fox.", " it lived near the", " old mill."),
        ]
    )


def test_explain_says_what_each_unit_has_alone_and_in_its_place(model, tokenizer):
    calculator = MultiLevelPPLCalculator(tokenizer, aggregation="nested")
    context, text = PAIRS[-5]
    explained = calculator.explain(model, text, context)
    values = calculator.score_pairs(model, [(context, text)])[0]
    outer = {"word": "a", "phrase": "b", "sentence": "c"}
    inner = {"phrase": "a", "sentence": "b"}
    for level, value in zip(LEVELS, values, strict=True):
        units = explained[level]
        tokens = sum(unit["n_tokens"] for unit in units)
        measured = [unit[outer[level]] - (unit[inner[level]] if level in inner else 0) for unit in units]
        assert math.exp(sum(measured) / tokens) == pytest.approx(value, rel=1e-6)
        assert [unit["surprisal"] for unit in units] == pytest.approx([unit["c"] for unit in units])
        for unit, nats in zip(units, measured, strict=True):
            assert unit["perplexity"] == pytest.approx(math.exp(nats / unit["n_tokens"]), rel=1e-6)


def test_blank_texts_have_no_perplexity(model, tokenizer):
    assert np.isnan(scored(model, tokenizer, [("", ""), ("x", "  ")])).all()
    assert scored(model, tokenizer, []).shape == (0, 3)


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused():
    tokenizer = toys.byte_level(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"nested.*BOS or EOS token.*neither.*geometric"):
        MultiLevelPPLCalculator(tokenizer, aggregation="nested")


def test_half_precision_agrees_with_itself(model, tokenizer):
    half = toys.llama().to(torch.bfloat16)
    np.testing.assert_allclose(scored(half, tokenizer, PAIRS), scored(model, tokenizer, PAIRS), rtol=0.1)


def test_without_weights_a_nested_reward_is_that_of_the_ordinary_perplexity(model, tokenizer):
    """ln of the product of the levels, a third of it: what equal weights make of the log-likelihood ratio."""
    text, other = toys.SENTENCES[0], toys.SENTENCES[1]
    calculator = MultiLevelPPLCalculator(tokenizer, aggregation="nested")
    before, now = (math.log(np.prod(list(calculator.compute_all_levels(model, one).values()))) for one in (other, text))
    baselines = {"p": calculator.compute_all_levels(model, other)}
    function = MultiLevelPPLRewardFunction(model, tokenizer, baselines, aggregation="nested", form="nats")
    [reward] = function.compute_rewards([text], prompts=[""], ids=["p"]).tolist()
    assert abs(reward) < 0.49
    assert reward == pytest.approx((before - now) / 3, abs=1e-5)
