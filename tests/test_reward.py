"""The reward function: thresholds, baselines in their order, both targets, what GRPOTrainer sees."""

import copy
import json
import math
import pickle
import warnings

import brute_force
import numpy as np
import peft
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from multi_level_ppl_trl import DEFAULT_THRESHOLDS, LEVELS, MultiLevelPPLCalculator, MultiLevelPPLRewardFunction
from ppl.baselines import BaselineError, write
from ppl.data import stable_id
from ppl.thresholds import Thresholds, checked_weights, normalized

MODEL, TOKENIZER = toys.llama(), toys.byte_level(chat=True)


def levels(value):
    """A baseline that is the same at every level."""
    return dict.fromkeys(LEVELS, value)


def reward(perplexities, **options):
    """A reward whose scorer gives the perplexities written down, by (context, text) or by text: a number or three."""
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, **options)
    function.asked = []

    def score_pairs(model, pairs):
        assert model is MODEL
        function.asked.append(list(pairs))
        found = [perplexities[pair] if pair in perplexities else perplexities[pair[1]] for pair in pairs]
        return np.array([np.broadcast_to(one, 3) for one in found], dtype=float).reshape(-1, 3)

    function.calculator.score_pairs = score_pairs
    return function


def of_improvement(percent, **options):
    """The reward of a completion so much below its baseline."""
    return reward({"text": 100 - percent}, baselines={"id": levels(100)}, **options)(["p"], ["text"], id=["id"])[0]


# --- from improvement to reward --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(-50, 0), (0, 0), (0.04, 0), (0.05, 0.2), (0.06, 0.2), (0.49, 0.2), (0.5, 0.5), (0.99, 0.5), (1, 0.7), (1.99, 0.7),
     (2, 0.9), (2.99, 0.9), (3, 1), (3.01, 1), (99, 1)],
)  # fmt: skip
def test_the_default_thresholds(percent, expected):
    assert of_improvement(percent) == pytest.approx(expected)


def test_thresholds_in_any_order():
    shuffled = [DEFAULT_THRESHOLDS[place] for place in (3, 0, 4, 2, 1)]
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


def test_interpolation_is_linear_between_the_points():
    line = [(0.0, 0.0), (1.0, 0.25), (2.0, 0.5), (3.0, 0.75), (4.0, 1.0)]
    for percent, expected in [(-1, 0), (0, 0), (0.5, 0.125), (2.4, 0.6), (4, 1), (9, 1)]:
        assert of_improvement(percent, reward_thresholds=line, interpolate=True) == pytest.approx(expected)


def test_interpolation_starts_at_the_lowest_threshold():
    # 0.275 is half way from 0.05 to 0.5, so half way from 0.2 to 0.5
    for percent, expected in [(0.04, 0), (0.05, 0.2), (0.275, 0.35), (2.5, 0.95), (3, 1)]:
        assert of_improvement(percent, interpolate=True) == pytest.approx(expected)


@given(st.floats(-1e6, 100), st.floats(-1e6, 100), st.booleans())
def test_more_improvement_never_earns_less(a, b, interpolate):
    low, high = Thresholds(DEFAULT_THRESHOLDS, interpolate).rewards(np.array(sorted([a, b])))
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
        checked_weights(weights)


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


# --- where a baseline comes from, in order ---------------------------------------------------------------------------

COLUMNS = {f"baseline_{level}": [10.0] for level in LEVELS}


def baseline_of(function, prompts=("p",), completions=("text",), **columns):
    function(list(prompts), list(completions), **columns)
    return function._last.details["baselines"]["word"][0].item()


def test_columns_come_before_ids_before_prompts():
    function = reward({"text": 5}, baselines={"id": levels(20), "p": levels(30), "other": levels(40)})
    assert baseline_of(function, id=["id"], **COLUMNS) == 10
    assert baseline_of(function, id=["id"]) == 20
    assert baseline_of(function, id=["unknown"]) == 30
    assert baseline_of(function) == 30


def test_each_column_is_its_levels_baseline():
    columns = {"baseline_word": [10.0], "baseline_phrase": [20.0], "baseline_sentence": [40.0]}
    function = reward({"text": 10})
    function(["p"], ["text"], **columns)
    # (10 - 10) / 10, (20 - 10) / 20, (40 - 10) / 40
    assert {level: value.item() for level, value in function._last.details["improvements"].items()} == pytest.approx(
        {"word": 0, "phrase": 50, "sentence": 75, "avg": 0.3 * 50 + 0.5 * 75}
    )


def test_a_row_without_columns_falls_through_to_the_next_source():
    function = reward({"text": 5}, baselines={"p": levels(30)})
    columns = {name: [None, 10.0] for name in COLUMNS}
    function(["p", "p"], ["text"] * 2, **columns)
    assert function._last.details["baselines"]["word"].tolist() == [30, 10]


def test_a_row_without_an_id_column_is_found_by_the_hash_of_prompt_and_reference():
    function = reward({"text": 5}, baselines={stable_id("p", "ref"): levels(50), stable_id("p"): levels(60)})
    assert baseline_of(function, reference=["ref"]) == 50
    assert baseline_of(function) == 60


def test_a_record_is_found_by_its_prompts_hash_if_that_names_one_row():
    records = {"a": {**levels(70), "prompt_id": stable_id("p")}, "b": {**levels(80), "prompt_id": stable_id("q")}}
    assert baseline_of(reward({"text": 5}, baselines=records)) == 70
    twice = {**records, "c": {**levels(90), "prompt_id": stable_id("p")}}
    with pytest.raises(BaselineError, match="no baseline for 1 of 1 rows"):
        baseline_of(reward({"text": 5}, baselines=twice))


def test_a_chat_prompt_is_found_by_its_hash():
    prompt = [{"role": "user", "content": "p"}]
    function = reward({"text": 5}, baselines={stable_id(prompt): levels(50)})
    assert baseline_of(function, prompts=[prompt]) == 50


@pytest.mark.parametrize("row_id", ["id", 7])
def test_ids_may_be_strings_or_numbers(row_id):
    assert baseline_of(reward({"text": 5}, baselines={row_id: levels(20)}), id=[row_id]) == 20


def test_a_row_that_baselines_lack_is_an_error_that_lists_it():
    function = reward({"text": 5}, baselines={"id": levels(20)})
    with pytest.raises(BaselineError, match=r"no baseline for 2 of 3 rows, the first are \['x', 'y'\].*missing='skip'"):
        function(["p"] * 3, ["text"] * 3, id=["id", "x", "y"])


def test_a_row_that_baselines_lack_is_skipped_with_none_on_request():
    function = reward({"text": 5}, baselines={"id": levels(20)}, missing="skip")
    assert function(["p"] * 2, ["text"] * 2, id=["x", "id"]) == [None, 1]
    assert math.isnan(function.compute_rewards(["text"], ids=["x"])[0])


def test_empty_baselines_are_not_zero_shot():
    with pytest.raises(BaselineError):
        reward({"text": 5}, baselines={})(["p"], ["text"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"baseline_word": [1.0]}, "baseline_word.* are needed"),
        ({"baseline_phrase": [1.0], "baseline_sentence": [1.0]}, "baseline_phrase, baseline_sentence.* are needed"),
        ({**COLUMNS, "baseline_phrase": [0.0]}, "phrase is 0.0, expected a finite positive number"),
        ({**COLUMNS, "baseline_word": [math.nan]}, "word is nan"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns, message):
    with pytest.raises(BaselineError, match=message):
        reward({"text": 5})(["p"], ["text"], **columns)


@pytest.mark.parametrize(
    "record", [5, {"word": 1.0, "phrase": 1.0}, *map(levels, ["1", -1.0, 0, math.inf, math.nan, True, None])]
)
def test_a_baseline_that_is_no_positive_number_is_refused(record):
    with pytest.raises(BaselineError, match="'id'"):
        reward({}, baselines={"id": record})


# --- zero-shot -------------------------------------------------------------------------------------------------------


def test_the_first_visit_to_a_prompt_gives_0_and_later_ones_are_measured_against_its_mean():
    function = reward({"a": 90, "b": 110, "c": 99.5, "d": 98, "e": 101})
    assert function(["p", "p"], ["a", "b"]) == [0, 0]  # the mean is 100
    assert function(["p", "p", "p"], ["c", "d", "e"]) == pytest.approx([0.5, 0.9, 0])
    assert function(["p"], ["a"]) == [1]  # what was read in the first visit is measured too


def test_each_prompt_has_a_first_visit_of_its_own():
    function = reward({"a": 100, "b": 50})
    assert function(["p", "q"], ["a", "b"]) == [0, 0]
    assert function(["p", "q", "r"], ["b", "a", "b"]) == [1, 0, 0]


def test_the_mean_of_the_first_visit_is_taken_per_level():
    function = reward({"a": (10, 20, 30), "b": (30, 40, 50)})
    function(["p", "p"], ["a", "b"])
    assert {level: values.tolist() for level, values in function._last.details["baselines"].items()} == {
        "word": [20, 20], "phrase": [30, 30], "sentence": [40, 40],
    }  # fmt: skip


def test_a_first_visit_gives_0_even_if_an_improvement_of_0_has_a_reward():
    assert reward({"a": 100}, reward_thresholds=[(0, 0.1)])(["p"], ["a"]) == [0]


def test_a_first_visit_and_a_blank_completion_have_an_improvement_of_0():
    function = reward({"a": 90, "b": 110, "": math.nan})
    logged = {}
    function(["p"] * 3, ["a", "b", ""], log_metric=logged.__setitem__)
    assert function._last.details["improvements"]["avg"].tolist() == [0, 0, 0]
    assert (logged["reward_word"], logged["ppl/word"]) == (0, 100)


def test_blank_completions_do_not_count_as_a_visit():
    function = reward({"": math.nan, "a": 100, "b": 98})
    assert function(["p"], [""]) == [0]
    assert function(["p", "p"], ["a", ""]) == [0, 0]
    assert function(["p", "p"], ["b", ""]) == pytest.approx([0.9, 0])


def test_chat_prompts_have_first_visits_by_content():
    function = reward({"a": 100, "b": 98})
    prompt = [{"role": "user", "content": "p"}]
    assert function([prompt], ["a"]) == [0]
    assert function([copy.deepcopy(prompt)], ["b"]) == [pytest.approx(0.9)]


def test_first_visits_survive_a_resume():
    first = reward({"a": 100, "b": 98})
    first(["p"], ["a"])
    resumed = reward({"a": 100, "b": 98})
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed(["p"], ["b"]) == [pytest.approx(0.9)]
    assert resumed.state_dict() == first.state_dict()


# --- target="reference" ----------------------------------------------------------------------------------------------


def test_a_reference_is_scored_behind_prompt_and_completion_against_itself_behind_the_prompt():
    function = reward({("p", "ref"): 100, ("p plan", "ref"): 98, ("p no", "ref"): 120}, target="reference")
    assert function(["p", "p"], [" plan", " no"], reference=["ref", "ref"]) == pytest.approx([0.9, 0])
    assert len(function.asked) == 1  # one call, so that all share the prompt


def test_given_baselines_come_before_the_reference_alone():
    perplexities = {("p", "ref"): 100, ("p plan", "ref"): 98}
    function = reward(perplexities, target="reference", baselines={"id": levels(99)})
    found = function(["p"] * 3, [" plan"] * 3, reference=["ref"] * 3, id=["id", "unknown", "id"])
    assert found == pytest.approx([0.7, 0.9, 0.7])  # 1.01 % of 99, 2 % of 100


def test_the_reference_alone_is_scored_once():
    function = reward({("p", "ref"): 100, ("p a", "ref"): 98, ("p b", "ref"): 99}, target="reference")
    function(["p"], [" a"], reference=["ref"])
    function(["p"], [" b"], reference=["ref"])
    assert function.asked == [[("p a", "ref"), ("p", "ref")], [("p b", "ref")]]


def test_a_blank_completion_leaves_the_reference_as_it_was():
    assert reward({("p", "ref"): 100}, target="reference")(["p"], [""], reference=["ref"]) == [0]


def test_the_reference_column_is_needed():
    with pytest.raises(ValueError, match="needs a column `reference`"):
        reward({}, target="reference")(["p"], ["text"])


@pytest.mark.parametrize("blank", ["", None])
def test_a_blank_reference_is_an_error_or_skipped(blank):
    perplexities = {"": math.nan, "ref": 100}
    arguments = {"prompts": ["p"] * 2, "completions": ["a"] * 2, "reference": ["ref", blank]}
    with pytest.raises(ValueError, match="row 1 of this call has a blank reference"):
        reward(perplexities, target="reference")(**arguments)
    assert reward(perplexities, target="reference", missing="skip")(**arguments) == [0, None]
    given = {name: [100.0] * 2 for name in COLUMNS}
    assert reward(perplexities, target="reference", missing="skip")(**arguments, **given) == [0, None]


def test_both_targets_on_a_real_model_equal_the_slow_twin():
    prompts, plans, references = ["The fox", "Once"], [" said", " upon a time"], [" I am hungry.", " there was."]
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, target="reference")
    _, details = function.compute_rewards(plans, prompts=prompts, references=references, return_details=True)
    completion = MultiLevelPPLRewardFunction(MODEL, TOKENIZER)
    _, own = completion.compute_rewards(plans, prompts=prompts, return_details=True)
    for place, (prompt, plan, reference) in enumerate(zip(prompts, plans, references, strict=True)):
        for found, text, context in [
            (details["ppls"], reference, prompt + plan),
            (details["baselines"], reference, prompt),
            (own["ppls"], plan, prompt),
        ]:
            twin = brute_force.all_levels(MODEL, TOKENIZER, text, context)
            assert {level: found[level][place].item() for level in LEVELS} == pytest.approx(twin, rel=1e-4)


# --- what cannot be scored, what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["", " \n", "</s>"])
@pytest.mark.parametrize("baselines", [None, {"p": levels(100)}])
def test_a_blank_completion_gives_0_even_when_every_threshold_is_below_0(blank, baselines):
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, baselines, reward_thresholds=[(-100, 0.5), (-50, 1)])
    assert function(["p"], [blank]) == [0]
    assert function(["p"], [blank]) == [0]


def test_a_perplexity_of_infinity_gives_the_lowest_reward_and_finite_numbers():
    function = reward({"a": math.inf, "b": 100})
    logged = {}
    for completions in (["a", "b"], ["a", "b"], ["b", "b"]):
        found = function(["p"] * 2, completions, log_metric=logged.__setitem__)
        assert all(math.isfinite(value) for value in [*found, *logged.values()])
    assert reward({"a": math.inf}, baselines={"p": levels(9)})(["p"], ["a"], log_metric=logged.__setitem__) == [0]
    assert logged["reward_word"] == -1e9  # percent: the floor, so that a mean stays readable


def test_a_nan_from_the_model_is_an_error():
    model = toys.llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        MultiLevelPPLRewardFunction(model, TOKENIZER)(["p"], ["The fox"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_subclass_cannot_return_what_is_not_finite(bad):
    class Bad(MultiLevelPPLRewardFunction):
        def compute_rewards(self, texts, **kwargs):
            return torch.tensor([1.0, bad])

    with pytest.raises(FloatingPointError, match="expected a finite number"):
        Bad(MODEL, TOKENIZER)(["p"] * 2, ["a", "b"])


def test_no_completions_give_no_rewards():
    assert MultiLevelPPLRewardFunction(MODEL, TOKENIZER)([], []) == []
    assert MultiLevelPPLRewardFunction(MODEL, TOKENIZER, normalize=True).compute_rewards([]).shape == (0,)


# --- compute_rewards and __call__ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["completion", "reference"])
def test_details_have_one_number_a_text(target):
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, target=target)
    texts = [" said", " ran home", " sat"]
    found, details = function.compute_rewards(
        texts, prompts=["The fox"] * 3, references=[" The end."] * 3, return_details=True
    )
    assert (found.shape, found.dtype) == ((3,), torch.float32)
    assert set(details["improvements"]) == {*LEVELS, "avg"}
    assert set(details["ppls"]) == set(details["baselines"]) == set(LEVELS)
    for group in ("improvements", "ppls", "baselines"):
        for values in details[group].values():
            assert (values.shape, values.dtype) == ((3,), torch.float64)
    torch.testing.assert_close(function.compute_rewards(texts, references=["x"] * 3).shape, found.shape)


def test_texts_alone_are_enough():
    """`compute_rewards(texts=..., return_details=True)`, as the guide has it."""
    rewards, details = MultiLevelPPLRewardFunction(MODEL, TOKENIZER).compute_rewards(
        texts=["The fox.", "The end."], return_details=True
    )
    assert rewards.tolist() == [0, 0]
    twin = brute_force.all_levels(MODEL, TOKENIZER, "The fox.")
    assert details["ppls"]["word"][0].item() == pytest.approx(twin["word"], rel=1e-4)


def test_a_call_returns_python_floats():
    assert [type(one) for one in reward({"a": 100})(["p"], ["a"])] == [float]


def test_what_else_trl_passes_is_ignored():
    assert reward({"a": 100})(
        prompts=["p"], completions=["a"], completion_ids=[[1]], trainer_state=None, log_extra=print, topic=["x"]
    ) == [0]


@pytest.mark.parametrize("column", ["prompts", "references", "ids", "baselines"])
def test_a_column_of_another_length_is_refused(column):
    with pytest.raises(ValueError, match=f"3 {column} for 2 texts"):
        reward({}).compute_rewards(["a", "b"], **{column: ["x"] * 3})


def test_chat_messages_are_read_through_the_template():
    prompt = [{"role": "user", "content": "The fox?"}]
    rendered = "<s><|user|>The fox?</s><|assistant|>"
    texts = [
        [{"role": "assistant", "content": "Yes."}],
        [{"role": "assistant", "content": [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]}],
    ]
    function = reward({(rendered, "Yes."): 5}, baselines={stable_id(prompt): levels(10)})
    assert function([prompt] * 2, texts) == [1, 1]


def test_a_prompt_that_ends_with_the_assistant_is_continued():
    prompt = [{"role": "user", "content": "The fox?"}, {"role": "assistant", "content": "It"}]
    assert reward({("<s><|user|>The fox?</s><|assistant|>It", " is."): 5})([prompt], [" is."]) == [0]


def test_chat_references_are_read_too():
    reference = [{"role": "assistant", "content": "ref"}]
    assert reward({("p", "ref"): 100, ("pa", "ref"): 98}, target="reference")(["p"], ["a"], reference=[reference]) == [
        pytest.approx(0.9)
    ]


class CustomMultiLevelReward(MultiLevelPPLRewardFunction):
    """As the guide has it, word for word."""

    def compute_rewards(self, texts, **kwargs):
        # Get base multi-level rewards
        base_rewards, details = super().compute_rewards(texts, return_details=True, **kwargs)  # noqa: RUF059

        # Add custom logic
        custom_rewards = []
        for text, base_reward in zip(texts, base_rewards):  # noqa: B905
            # Example: Bonus for longer responses
            length_bonus = min(len(text) / 1000, 0.2)

            # Example: Penalty for repetition
            words = text.split()
            unique_ratio = len(set(words)) / len(words) if words else 1.0
            repetition_penalty = (1 - unique_ratio) * 0.3

            final_reward = base_reward + length_bonus - repetition_penalty
            custom_rewards.append(final_reward)

        return torch.tensor(custom_rewards, device=self.device)


@pytest.mark.parametrize(
    "columns", [{}, {"id": ["x"] * 3}, {"reference": ["r"] * 3}, {name: [10.0] * 3 for name in COLUMNS}]
)
def test_the_guides_subclass_works_through_a_call(columns):
    function = CustomMultiLevelReward(MODEL, TOKENIZER)
    texts = ["fox fox fox fox", "", "The fox said nothing at all."]
    base = MultiLevelPPLRewardFunction(MODEL, TOKENIZER)(["p"] * 3, texts, **columns)
    # 15 characters, 1 of 4 words is unique; nothing; 28 characters, all unique
    expected = [base[0] + 0.015 - 0.75 * 0.3, base[1], base[2] + 0.028]
    logged = {}
    assert function(["p"] * 3, texts, log_metric=logged.__setitem__, **columns) == pytest.approx(expected)
    assert "reward_word" in logged


def test_a_subclass_keeps_skipped_rows_skipped():
    function = CustomMultiLevelReward(MODEL, TOKENIZER, {"id": levels(1e9)}, missing="skip")
    assert function(["p"] * 2, ["fox", "fox"], id=["none", "id"]) == [None, pytest.approx(1.003)]


def test_a_subclass_need_not_ask_its_base():
    class Length(MultiLevelPPLRewardFunction):
        def compute_rewards(self, texts, **kwargs):
            return torch.tensor([float(len(text)) for text in texts])

    assert Length(MODEL, TOKENIZER)(["p"] * 2, ["a", "bcd"], log_metric=None) == [1, 3]


# --- what the trainer sees -------------------------------------------------------------------------------------------


def test_it_has_a_name_and_is_no_module():
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER)
    assert function.__name__ == "multi_level_ppl"
    assert callable(function)
    assert not isinstance(function, torch.nn.Module)
    assert function.device == MODEL.device == torch.device("cpu")


def test_metrics_are_means_over_the_rows_that_were_scored():
    perplexities = {"a": (99, 98, 96), "b": (97, 96, 94), "": math.nan}
    logged = {}
    reward(perplexities, baselines={"id": levels(100)}, missing="skip")(
        ["p"] * 4, ["a", "b", "", "a"], id=["id", "id", "id", "none"], log_metric=logged.__setitem__
    )
    assert logged == pytest.approx(
        {
            "reward_word": (1 + 3) / 2, "reward_phrase": (2 + 4) / 2, "reward_sentence": (4 + 6) / 2,
            "ppl/word": (99 + 97) / 2, "ppl/phrase": (98 + 96) / 2, "ppl/sentence": (96 + 94) / 2,
        }
    )  # fmt: skip


def test_metrics_have_the_same_names_at_every_call():
    perplexities = {"a": 99, "": math.nan, ("p", "r"): 100, ("pa", "r"): 90}
    names = []
    for options, completions, columns in [
        ({}, ["a"], {}),
        ({}, [""], {}),
        ({}, [], {}),
        ({"baselines": {"x": levels(100)}, "missing": "skip"}, ["a"], {}),
        ({"target": "reference"}, ["a"], {"reference": ["r"]}),
        ({"target": "reference", "missing": "skip"}, ["a"], {"reference": [""]}),
        ({"normalize": True}, ["a"], COLUMNS),
    ]:
        logged = {}
        prompts = ["p"] * len(completions)
        reward(perplexities, **options)(prompts, completions, log_metric=logged.__setitem__, **columns)
        names.append(list(logged))
        assert all(math.isfinite(value) for value in logged.values())
    assert set(names[0]) == {f"reward_{level}" for level in LEVELS} | {f"ppl/{level}" for level in LEVELS}
    assert names == [names[0]] * len(names)


def test_a_pickled_reward_gives_equal_rewards():
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, baselines={"x": levels(900.0)}, interpolate=True)
    arguments = {"prompts": ["The fox"] * 3, "completions": [" said", " ran", ""], "id": ["x"] * 3}
    expected = function(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was trained
        loaded = pickle.loads(pickle.dumps(function))
        assert loaded(**arguments) == expected
        loaded._cache.clear()
        assert loaded(**arguments) == pytest.approx(expected)
    assert loaded.__name__ == function.__name__


def test_a_pickled_zero_shot_reward_remembers_its_first_visits():
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER)
    function(["The fox"], [" said"])
    assert pickle.loads(pickle.dumps(function)).state_dict() == function.state_dict()


# --- cache -----------------------------------------------------------------------------------------------------------


def test_with_and_without_cache_the_numbers_are_the_same():
    arguments = {"prompts": ["The fox"] * 4, "completions": [" said", " ran", " said", ""]}
    cached = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, interpolate=True)
    fresh = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, interpolate=True, use_cache=False)
    for _ in range(3):
        assert cached(**arguments) == pytest.approx(fresh(**arguments), rel=1e-4)
        arguments["completions"] = [" ran", " sat", " said", " sat"]


def test_what_was_scored_is_not_scored_again():
    function = reward({"a": 1, "b": 2, "c": 3})
    function(["p"] * 3, ["a", "b", "a"])
    function(["p", "p", "q"], ["a", "c", "a"])
    assert function.asked == [[("p", "a"), ("p", "b")], [("p", "c"), ("q", "a")]]


def test_the_cache_is_bounded():
    function = reward({str(n): n + 1 for n in range(50)})
    function.CACHE_ENTRIES = 10
    for start in (0, 20):
        numbers = range(start, start + 20)
        _, details = function.compute_rewards([str(n) for n in numbers], return_details=True)
        assert details["ppls"]["word"].tolist() == [n + 1 for n in numbers]
        assert len(function._cache) == 10
    assert not reward({"a": 1}, use_cache=False)._cache


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_scorer_that_is_trained_gives_fresh_numbers_and_one_warning(use_cache):
    model = toys.llama()
    function = MultiLevelPPLRewardFunction(model, TOKENIZER, use_cache=use_cache)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def train():
        model(torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
        optimizer.step()

    def ppl():
        _, details = function.compute_rewards([" said nothing."], prompts=["The fox"], return_details=True)
        return details["ppls"]["word"].item()

    before = ppl()
    train()
    with pytest.warns(UserWarning, match="the scorer's own weights change during training"):
        after = ppl()
    assert after != pytest.approx(before, rel=1e-3)
    twin = brute_force.all_levels(model, TOKENIZER, " said nothing.", "The fox")
    assert after == pytest.approx(twin["word"], rel=1e-4)
    train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ppl() != pytest.approx(after, rel=1e-3)


def test_a_policy_with_adapters_is_its_own_frozen_reference():
    policy = peft.get_peft_model(toys.llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    function = MultiLevelPPLRewardFunction(policy, TOKENIZER, use_cache=False)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            _, details = function.compute_rewards([" said"], prompts=["The fox"], return_details=True)
            found.append(details["ppls"]["word"].item())
            policy(torch.tensor([[5, 6, 7]])).logits.logsumexp(-1).sum().backward()
            optimizer.step()
    assert found == [pytest.approx(brute_force.all_levels(MODEL, TOKENIZER, " said", "The fox")["word"], rel=1e-4)] * 3
    assert function.model is policy


# --- baselines from a file -------------------------------------------------------------------------------------------


def identity(**options):
    return json.loads(json.dumps(MultiLevelPPLRewardFunction(MODEL, TOKENIZER, **options).identity))


@pytest.mark.parametrize("suffix", [".pkl", ".json", ".parquet"])
@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_file_of_the_same_scorer_is_used(suffix, as_path, tmp_path):
    path = tmp_path / f"baselines{suffix}"
    write(path, {"id": levels(20.0)}, {**identity(), "dataset": {"name": "anything"}})
    assert baseline_of(reward({"text": 5}, baselines=as_path(path)), id=["id"]) == 20


@pytest.mark.parametrize(
    ("change", "key", "theirs"),
    [
        ({"target": "reference"}, "target", "reference"),
        ({"definitions": {"max_phrase_words": 3}}, "max_phrase_words", "3"),
        ({"definitions": {"language": "de"}}, "language", "de"),
        ({"definitions": {"aggregation": "arithmetic"}}, "aggregation", "arithmetic"),
        ({"tokenizer": "other"}, "tokenizer", "other"),
        ({"model": {"weights": "other"}}, "weights", "other"),
        ({"model": {"dtype": "bfloat16"}}, "dtype", "bfloat16"),
        ({"model": {"quantization": "4bit"}}, "quantization", "4bit"),
    ],
)
def test_a_file_made_otherwise_is_refused_unless_insisted_on(change, key, theirs, tmp_path):
    path = tmp_path / "baselines.pkl"
    write(path, {"id": levels(20.0)}, {**identity(), **change})
    with pytest.raises(BaselineError, match=rf"baselines\.pkl was made .*{key}.{theirs}.*compute_baselines_trl\.py"):
        reward({}, baselines=path)
    assert baseline_of(reward({"text": 5}, baselines=path, allow_baseline_mismatch=True), id=["id"]) == 20


def test_a_file_of_another_model_is_refused_and_of_an_adapter_on_the_same_one_is_not(tmp_path):
    path = tmp_path / "baselines.pkl"
    write(path, {"id": levels(20.0)}, identity())
    other = toys.llama()
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    with pytest.raises(BaselineError, match="weights"):
        MultiLevelPPLRewardFunction(other, TOKENIZER, baselines=path)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(toys.llama(), lora)
    MultiLevelPPLRewardFunction(adapted, TOKENIZER, baselines=path)


def test_a_file_without_meta_is_taken_at_its_word(tmp_path):
    path = tmp_path / "baselines.pkl"
    path.write_bytes(pickle.dumps({"id": levels(20.0)}))
    assert baseline_of(reward({"text": 5}, baselines=path), id=["id"]) == 20


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BaselineError, match=r"none\.pkl.*make it with compute_baselines_trl\.py"):
        reward({}, baselines=tmp_path / "none.pkl")


def test_baselines_made_by_the_calculator_give_an_improvement_of_0():
    """What compute_baselines_trl.py does for target="completion": the perplexity of the reference given the prompt."""
    ppl = MultiLevelPPLCalculator(TOKENIZER).compute_all_levels(MODEL, " said: I am hungry.", "The fox")
    thresholds = [(0, 0.3), (1e-6, 1)]
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, baselines={"x": ppl}, reward_thresholds=thresholds)
    assert function(["The fox"], [" said: I am hungry."], id=["x"]) == [pytest.approx(0.3)]
