"""From improvement to reward: thresholds, weights, normalization."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from written_down import MODEL, TOKENIZER, levels, of_improvement, reward

from mlppl.config import LEVELS, checked_weights
from mlppl.reward.terms import normalized, threshold_rewards
from multi_level_ppl_trl import DEFAULT_THRESHOLDS, MultiLevelPPLRewardFunction

# --- from improvement to reward --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(-50, 0), (0, 0), (0.04, 0), (0.05, 0.2), (0.06, 0.2), (0.49, 0.2), (0.5, 0.5), (0.99, 0.5), (1, 0.7), (1.99, 0.7),
     (2, 0.9), (2.99, 0.9), (3, 1), (3.01, 1), (99, 1)],
)  # fmt: skip
def test_the_default_thresholds(percent, expected):
    assert of_improvement(percent) == pytest.approx(expected)


def test_thresholds_in_any_order():
    shuffled = [DEFAULT_THRESHOLDS[index] for index in (3, 0, 4, 2, 1)]
    for percent, expected in [(0.04, 0), (0.05, 0.2), (1.5, 0.7), (2, 0.9), (4, 1)]:
        assert of_improvement(percent, reward_thresholds=shuffled) == pytest.approx(expected)


@pytest.mark.parametrize("baseline", [7.3, 37.123, 1e4, 3.3e-3])
@pytest.mark.parametrize(("percent", "expected"), DEFAULT_THRESHOLDS)
def test_a_threshold_is_reached_exactly_there_whatever_the_last_bit_of_a_float_says(baseline, percent, expected):
    function = reward({"text": baseline * (1 - percent / 100)}, baselines={"id": levels(baseline)})
    assert function(["p"], ["text"], id=["id"]) == [pytest.approx(expected)]


def test_a_threshold_may_be_negative():
    thresholds = [(-1, -0.5), (0, 0.1)]
    for percent, expected in [(-2, 0), (-1, -0.5), (-0.1, -0.5), (0, 0.1)]:
        assert of_improvement(percent, reward_thresholds=thresholds) == pytest.approx(expected)


@given(st.floats(-1e6, 100), st.floats(-1e6, 100))
def test_more_improvement_never_earns_less(a, b):
    low, high = threshold_rewards(np.array(sorted([a, b])), DEFAULT_THRESHOLDS)
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize(
    ("points", "message"),
    [([], "empty"), ([(1, math.nan)], "finite"), ([(math.inf, 1)], "finite"), ([(1, 0.5), (1, 0.7)], "1 % twice")],
)
def test_thresholds_that_make_no_sense_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        MultiLevelPPLRewardFunction(MODEL, TOKENIZER, reward_thresholds=points)


@pytest.mark.parametrize(
    ("weights", "average"),
    [((0.2, 0.3, 0.5), 2.8), ((1, 0, 0), 1), ((0, 0, 2), 4), ((1, 1, 2), (1 + 2 + 2 * 4) / 4)],
)
def test_the_average_is_weighted_by_word_phrase_sentence_over_their_sum(weights, average):
    # improvements 1, 2 and 4 %: 0.2 * 1 + 0.3 * 2 + 0.5 * 4 = 2.8
    function = reward({"text": (99, 98, 96)}, baselines={"id": levels(100)}, weights=weights)
    _, details = function.compute_rewards(["text"], ids=["id"], return_details=True)
    assert {level: value.item() for level, value in details["improvements"].items()} == pytest.approx(
        {"word": 1, "phrase": 2, "sentence": 4, "avg": average}
    )


@pytest.mark.parametrize("weights", [(1, 2), (0, 0, 0), (-1, 1, 1), (1, 1, math.nan), (1, 1, 1, 1)])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(ValueError, match="weights are"):
        checked_weights(weights, LEVELS)


@pytest.mark.parametrize("option", [{"target": "prompt"}, {"missing": "ignore"}, {"aggregation": "median"}])
def test_an_unknown_choice_is_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is '"):
        MultiLevelPPLRewardFunction(MODEL, TOKENIZER, **option)


# --- normalize -------------------------------------------------------------------------------------------------------


def test_normalized_rewards_have_mean_0_and_standard_deviation_1():
    texts = {"a": 100, "b": 99.5, "c": 99, "d": 90}  # rewards 0, 0.5, 0.7, 1
    function = reward(texts, baselines={"id": levels(100)}, normalize=True)
    found = function.compute_rewards(list(texts), ids=["id"] * 4)
    plain = torch.tensor([0, 0.5, 0.7, 1])
    torch.testing.assert_close(found, (plain - plain.mean()) / plain.std())
    assert (found.mean().item(), found.std().item()) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_equal_rewards_normalize_to_0(n):
    function = reward({"a": 98.9}, baselines={"id": levels(100)}, normalize=True)
    assert function(["p"] * n, ["a"] * n, id=["id"] * n) == [0] * n


def test_skipped_rows_are_no_part_of_the_normalization():
    function = reward({"a": 100, "b": 90}, baselines={"id": levels(100)}, normalize=True, missing="skip")
    found = function(["p"] * 3, ["a", "b", "a"], id=["id", "id", "none"])
    # 0 and 1: mean 0.5, standard deviation sqrt(0.5)
    assert found == [pytest.approx(-math.sqrt(0.5)), pytest.approx(math.sqrt(0.5)), None]


def test_details_keep_the_rewards_before_normalization():
    function = reward({"a": 100, "b": 90}, baselines={"id": levels(100)}, normalize=True)
    _, details = function.compute_rewards(["a", "b"], ids=["id"] * 2, return_details=True)
    assert details["rewards"].tolist() == [0, 1]


@given(st.lists(st.floats(-5, 5), max_size=8))
def test_normalized_is_finite(values):
    assert np.isfinite(normalized(np.array(values))).all()
