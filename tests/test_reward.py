"""The reward function: baselines in their order, both targets, what cannot be scored, its calls."""

import copy
import json
import math

import brute_force
import pytest
import torch
import toys
from heard import Heard
from written_down import COLUMNS, MODEL, TOKENIZER, baseline_of, levels, reward

from mlppl.data import stable_id
from mlppl.errors import BaselineError, InputError
from multi_level_ppl_trl import LEVELS, MultiLevelPPLRewardFunction

# --- where a baseline comes from, in order ---------------------------------------------------------------------------


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
    assert {level: value.item() for level, value in function.found["improvements"].items()} == pytest.approx(
        {"word": 0, "phrase": 50, "sentence": 75, "avg": 0.3 * 50 + 0.5 * 75}
    )


def test_a_row_without_columns_falls_through_to_the_next_source():
    function = reward({"text": 5}, baselines={"p": levels(30)})
    columns = {name: [None, 10.0] for name in COLUMNS}
    function(["p", "p"], ["text"] * 2, **columns)
    assert function.found["baselines"]["word"].tolist() == [30, 10]


def test_a_row_whose_columns_are_empty_is_an_error_or_skipped_and_no_first_visit():
    columns = {name: [None, 10.0] for name in COLUMNS}
    with pytest.raises(BaselineError, match="the data set has no baseline for 1 of 2 rows"):
        reward({"text": 5})(["p", "p"], ["text"] * 2, **columns)
    function = reward({"text": 5}, missing="skip")
    assert function(["p", "p"], ["text"] * 2, **columns) == [None, 1]
    assert function.skips(["p", "p"], ["text"] * 2, **columns) == [True, False]


def test_first_visits_of_another_measure_are_no_baselines(model, tokenizer):
    def made(**options):
        return MultiLevelPPLRewardFunction(model, tokenizer, **options)

    first = made()
    first(["Once"] * 2, [" upon a time", " there was"])
    state = json.loads(json.dumps(first.state_dict()))
    made(form="nats", weights=(1, 1, 1)).load_state_dict(state)  # what is paid for them may change
    shown = {"examples": [("A crow sat.", "It sang.")]}
    for options, name in (({"aggregation": "nested"}, "aggregation geometric"), (shown, "examples None")):
        with pytest.raises(InputError, match=f"first completions of 1 prompts.*measured with {name}"):
            made(**options).load_state_dict(state)
    levels_of_old = {"first_visits": {"a": [2.0]}}  # a checkpoint of before says nothing of itself
    with pytest.raises(InputError, match="measured with levels 1 of them"):
        made().load_state_dict(levels_of_old)


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


def test_a_baseline_of_another_prompt_under_the_same_id_is_refused():
    function = reward({"text": 5}, baselines={"a": {**levels(70), "prompt_id": stable_id("p")}}, missing="skip")
    assert baseline_of(function, id=["a"]) == 70
    with pytest.raises(BaselineError, match=r"row 1 with the id 'a' has a prompt that begins 'q'"):
        function(["p", "q"], ["text"] * 2, id=["a", "a"])


def test_a_changed_reference_is_scored_anew_and_not_measured_against_the_old_one():
    """Its baseline is PPL(reference | prompt): 200, not the 100 that another reference had behind this prompt."""
    old = {**levels(100), "prompt_id": stable_id("p"), "reference_id": stable_id("old")}
    perplexities = {("p", "new"): 200, ("p plan", "new"): 199}
    for baselines in ({stable_id("p", "old"): old}, {"p": levels(100)}):
        function = reward(perplexities, target="reference", baselines=baselines)
        assert function(["p"], [" plan"], reference=["new"]) == pytest.approx([0.5])  # 0.5 %
    with pytest.raises(BaselineError, match="another reference under this id"):
        reward(perplexities, target="reference", baselines={"a": old})(["p"], [" plan"], reference=["new"], id=["a"])


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


def test_the_first_visit_is_measured_against_the_others_of_its_group_and_later_ones_against_their_mean():
    function = reward({"a": 90, "b": 110, "c": 99.5, "d": 98, "e": 101})
    assert function(["p", "p"], ["a", "b"]) == [1, 0]  # 90 against 110 and 110 against 90; the mean is 100
    assert function(["p", "p", "p"], ["c", "d", "e"]) == pytest.approx([0.5, 0.9, 0])
    assert function(["p"], ["a"]) == [1]  # what was read in the first visit is measured too


def test_each_prompt_has_a_first_visit_of_its_own():
    function = reward({"a": 100, "b": 50})
    assert function(["p", "q"], ["a", "b"]) == [0, 0]  # alone in their groups
    assert function(["p", "q", "r"], ["b", "a", "b"]) == [1, 0, 0]


def test_the_others_of_a_first_visit_are_left_out_one_by_one():
    function = reward({"a": (100, 30, 50), "b": (98, 10, 60), "c": (102, 20, 40), "": math.nan}, weights=(1, 0, 0))
    assert function(["p"] * 4, ["a", "b", "c", ""]) == pytest.approx([0, 0.9, 0, 0])  # 98 against 101
    found = {level: values.tolist() for level, values in function.found["baselines"].items()}
    assert found["word"] == [100, 101, 99, 100] and found["phrase"] == [15, 25, 20, 20]  # a blank one is no part of it
    assert found["sentence"] == [50, 45, 55, 50]


def test_the_mean_of_the_first_visit_is_taken_per_level():
    function = reward({"a": (10, 20, 30), "b": (30, 40, 50)})
    function(["p", "p"], ["a", "b"])
    assert {level: values.tolist() for level, values in function.found["baselines"].items()} == {
        "word": [30, 10], "phrase": [40, 20], "sentence": [50, 30],
    }  # fmt: skip
    function(["p"], ["a"])
    assert {level: values.item() for level, values in function.found["baselines"].items()} == {
        "word": 20, "phrase": 30, "sentence": 40,
    }  # fmt: skip


def test_a_first_visit_gives_0_even_if_an_improvement_of_0_has_a_reward():
    assert reward({"a": 100}, reward_thresholds=[(0, 0.1)])(["p"], ["a"]) == [0]


def test_a_blank_completion_of_a_first_visit_has_an_improvement_of_0():
    function = reward({"a": 90, "b": 110, "": math.nan})
    logged = {}
    function(["p"] * 3, ["a", "b", ""], log_metric=logged.__setitem__)
    # 100 (110 - 90) / 110, 100 (90 - 110) / 90
    assert function.found["improvements"]["avg"].tolist() == pytest.approx([200 / 11, -200 / 9, 0])
    assert (logged["reward_word"], logged["ppl/word"]) == (pytest.approx((200 / 11 - 200 / 9) / 2), 100)


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
    function = Heard(MODEL, TOKENIZER, target="reference")
    _, details = function.compute_rewards(plans, prompts=prompts, references=references, return_details=True)
    completion = Heard(MODEL, TOKENIZER)
    _, own = completion.compute_rewards(plans, prompts=prompts, return_details=True)
    for index, (prompt, plan, reference) in enumerate(zip(prompts, plans, references, strict=True)):
        for found, text, context in [
            (details["ppls"], reference, prompt + plan),
            (details["baselines"], reference, prompt),
            (own["ppls"], plan, prompt),
        ]:
            twin = brute_force.all_levels(MODEL, TOKENIZER, text, context)
            assert {level: found[level][index].item() for level in LEVELS} == pytest.approx(twin, rel=1e-4)


# --- what cannot be scored, what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["", " \n", "</s>"])
@pytest.mark.parametrize("baselines", [None, {"p": levels(100)}])
def test_a_blank_completion_gives_0_even_when_every_threshold_is_below_0(blank, baselines):
    function = Heard(MODEL, TOKENIZER, baselines, reward_thresholds=[(-100, 0.5), (-50, 1)])
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


def test_a_completion_that_is_no_text_is_named():
    with pytest.raises(InputError, match="completion 1 is 5, expected a string or chat messages"):
        Heard(MODEL, TOKENIZER).compute_rewards(["fox", 5])


def test_a_nan_from_the_model_is_an_error():
    model = toys.llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        Heard(model, TOKENIZER)(["p"], ["The fox"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_subclass_cannot_return_what_is_not_finite(bad):
    class Bad(MultiLevelPPLRewardFunction):
        def compute_rewards(self, texts, **kwargs):
            return torch.tensor([1.0, bad])

    with pytest.raises(FloatingPointError, match="expected a finite number"):
        Bad(MODEL, TOKENIZER)(["p"] * 2, ["a", "b"])


def test_no_completions_give_no_rewards():
    assert Heard(MODEL, TOKENIZER)([], []) == []
    assert Heard(MODEL, TOKENIZER, normalize=True).compute_rewards([]).shape == (0,)


# --- compute_rewards and __call__ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["completion", "reference"])
def test_details_have_one_number_a_text(target):
    function = Heard(MODEL, TOKENIZER, target=target)
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
    rewards, details = Heard(MODEL, TOKENIZER).compute_rewards(texts=["The fox.", "The end."], return_details=True)
    assert sorted(rewards.tolist()) == [0, 1]  # each against the other
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
