"""Three rewards over one cache: each is its level's, and what is vetoed is the last of its group."""

import json

import numpy as np
import peft
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st
from training_runs import SHORT, log_history, refusal, train
from written_down import MODEL, TOKENIZER, levels, reward

from mlppl.config import DEFAULT_THRESHOLDS, NATS_KNEE
from mlppl.errors import InputError
from mlppl.reward.loop_guard import loop_veto
from mlppl.training.diagnostics import Diagnostics
from mlppl.training.rewards import perplexity_rewards
from mlppl.training.trainer import RewardState
from multi_level_ppl_trl import LEVELS, MultiLevelPPLRewardFunction

TEXTS = [" fox", " mill", " the old crow laughed", ""]
ROWS = {"id": ["x"] * len(TEXTS)}


def alone(index):
    return tuple(float(index == column) for column in range(3))


@pytest.mark.parametrize("form", ["thresholds", "nats"])
def test_each_level_earns_what_it_earns_with_all_the_weight(form):
    perplexities = {" fox": (99, 98, 101), " mill": (60, 99.7, 500), " the old crow laughed": (99.4, 30, 97)}
    perplexities |= {"": np.nan}
    options = {"baselines": {"x": levels(100)}, "form": form}
    together = [one(["p"] * 4, TEXTS, **ROWS) for one in reward(perplexities, **options).per_level()]
    lowest = -2 * NATS_KNEE if form == "nats" else 0.0
    for index, earned in enumerate(together):
        single = reward(perplexities, weights=alone(index), **options)(["p"] * 4, TEXTS, **ROWS)
        assert earned == pytest.approx(single) and earned[-1] == lowest
    assert together[0] != together[1] != together[2]


def test_a_blank_completion_is_the_lowest_at_every_level_also_where_thresholds_take():
    thresholds = [(-50, -2.0), (0, 1.0)]
    function = reward({" fox": 120.0, "": np.nan}, baselines={"x": levels(100)}, reward_thresholds=thresholds)
    for one in function.per_level():
        assert one(["p"] * 2, [" fox", ""], id=["x"] * 2) == [-2.0, -2.0]
    for one in function.per_level(lambda **columns: [True, False]):
        assert one(["p"] * 2, [" fox", ""], id=["x"] * 2) == [pytest.approx(-2.3), -2.0]


def test_the_scorer_is_asked_once_and_a_first_visit_is_one_for_all_three():
    function = reward({" fox": (10, 20, 30), " mill": (20, 10, 40)})
    views, logged = function.per_level(), []
    columns = {"log_metric": lambda name, value: logged.append(name)}
    first = [one(["p"] * 2, [" fox", " mill"], **columns) for one in views]
    assert first == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]  # 10 against 20, 20 against 10, ...
    second = [one(["p"] * 2, [" fox", " mill"], **columns) for one in views]
    assert second == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert [pair for asked in function.asked for pair in asked] == [("p", " fox"), ("p", " mill")]
    visits = views[0].state_dict()
    assert visits["first_visits"] and all(one.state_dict() == visits for one in views[1:])
    assert logged.count("reward_word") == logged.count("reward_time") == 2
    assert [one.__name__ for one in views] == [f"multi_level_ppl_{level}" for level in LEVELS]


def test_a_resumed_run_takes_up_the_first_visits_of_all_three(tmp_path):
    perplexities = {" fox": (10, 20, 30), " mill": (20, 10, 40)}
    views = reward(perplexities).per_level()
    for one in views:
        one(["p"] * 2, [" fox", " mill"])
    (tmp_path / "reward_state.json").write_text(json.dumps(views[0].state_dict()))
    resumed = reward(perplexities).per_level()
    RewardState(resumed, Diagnostics(resumed[0]), str(tmp_path))
    assert [one(["p"], [" fox"]) for one in resumed] == [one(["p"], [" fox"]) for one in views] == [[1.0], [0.0], [1.0]]


def test_a_skipped_row_is_none_at_every_level_vetoed_or_not():
    function = reward({" fox": 10.0}, baselines={"x": levels(100)}, missing="skip")
    views = function.per_level(lambda completions, **columns: [True] * len(completions))
    logged = {}
    columns = {"id": ["x", "y"], "log_metric": logged.__setitem__}
    assert [one(["p"] * 2, [" fox"] * 2, **columns) for one in views] == [[pytest.approx(-0.1), None]] * 3
    views = function.per_level(lambda completions, **columns: [False, True])
    assert [one(["p"] * 2, [" fox"] * 2, **columns)[1] for one in views] == [None] * 3
    assert logged["diagnostics/vetoed"] == 0  # of the rows that are not skipped


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(InputError, match="leave out normalize=True"):
        reward({}, normalize=True).per_level()

    class Own(MultiLevelPPLRewardFunction):
        def compute_rewards(self, texts, **kwargs):
            return super().compute_rewards(texts, **kwargs) + 1

    with pytest.raises(InputError, match="Own has a compute_rewards of its own"):
        Own(MODEL, TOKENIZER).per_level()
    views = [(one, 1.0) for one in reward({}).per_level()]
    assert perplexity_rewards([*views, (loop_veto, 1.0)]) == [one for one, _ in views]
    with pytest.raises(InputError, match="the first reward is multi_level_ppl_word, expected the perplexity reward"):
        perplexity_rewards(views[:2])


# --- the guarantee ---------------------------------------------------------------------------------------------------

FUNCTIONS = {form: MultiLevelPPLRewardFunction(MODEL, TOKENIZER, form=form) for form in ("nats", "thresholds")}


def advantages(rewards: np.ndarray, weights: np.ndarray, group: int) -> np.ndarray:
    """TRL's, with `normalize_then_sum`: float64 [B] from [B, functions]."""
    grouped = rewards.reshape(-1, group, rewards.shape[1])
    normalized = (grouped - grouped.mean(axis=1, keepdims=True)) / (grouped.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    total = normalized.reshape(rewards.shape) @ weights
    return (total - total.mean()) / (total.std(ddof=1) + 1e-4)


@given(data=st.data(), group=st.integers(2, 8), groups=st.integers(1, 3), form=st.sampled_from(["nats", "thresholds"]))
def test_what_is_vetoed_is_the_last_of_its_group_whatever_the_perplexities_say(data, group, groups, form):
    function = FUNCTIONS[form]
    values = st.floats(-2 * NATS_KNEE, 2 * NATS_KNEE)
    if form == "thresholds":
        values = st.sampled_from([0.0, *(value for _, value in DEFAULT_THRESHOLDS)])
    size = group * groups
    drawn = np.array(data.draw(st.lists(st.tuples(values, values, values), min_size=size, max_size=size)))
    vetoed = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    weights = np.array(data.draw(st.tuples(*[st.floats(0.01, 1)] * 3)))
    rewards = np.where(vetoed[:, None], function.config.vetoed, drawn)
    for start in range(0, size, group):
        mine = slice(start, start + group)
        if 0 < vetoed[mine].sum() < group:
            of_group = advantages(rewards, weights, group)[mine]
            assert of_group[vetoed[mine]].max() < of_group[~vetoed[mine]].min()
            for column in range(3):  # and on every objective
                alone = rewards[mine][:, column]
                assert alone[vetoed[mine]].max() < alone[~vetoed[mine]].min()


def test_the_penalty_of_the_loop_guard_does_not_guarantee_that():
    """Why there is a veto: with a weight of 1 beside the levels', the one that loops most has the largest advantage."""
    of_levels = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    penalty = np.array([[0.0], [-0.05], [-0.1], [-0.16]])
    looped = advantages(np.hstack([of_levels, penalty]), np.array([1.0, 1.0, 1.0, 1.0]), 4)
    assert looped[3] == looped.max()


def test_it_is_what_trl_computes(tmp_path):
    """The real trainer, a policy that loops at a low temperature: its advantages, and who was vetoed."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = peft.get_peft_model(toys.llama(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    function = MultiLevelPPLRewardFunction(
        policy, TOKENIZER, {"Once upon a time": levels(200.0)}, form="nats", weights=(1, 1, 2)
    )
    veto, seen = loop_veto(tokenizer=TOKENIZER), []

    def noted(**columns):
        # Every second one is taken for a loop, as a real one would be.
        seen.append([any(pair) for pair in zip(veto(**columns), [True, False] * 4, strict=True)])
        return seen[-1]

    trainer = GRPOTrainer(
        model=policy,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, num_generations=4, logging_steps=1,
            max_completion_length=12, report_to="none", use_cpu=True, multi_objective_aggregation="normalize_then_sum",
            reward_weights=[1.0, 1.0, 2.0],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["Once upon a time"] * 2}),
        processing_class=TOKENIZER,
        reward_funcs=function.per_level(noted),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 3 and seen == seen[:1] * 3
    rewards = np.array([trainer._logs["rewards"][f"multi_level_ppl_{level}"] for level in LEVELS]).T[:8]
    logged = np.array(trainer._logs["advantages"])[:8]
    assert logged == pytest.approx(advantages(rewards, np.array([1.0, 1.0, 2.0]), 4), abs=1e-3)
    for start in (0, 4):
        vetoed, of_group = np.array(seen[0][start : start + 4]), logged[start : start + 4]
        assert of_group[vetoed].max() < of_group[~vetoed].min()
    [entry] = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entry["diagnostics/vetoed"] == pytest.approx(np.mean(seen)) and "reward_sentence" in entry


# --- the script ------------------------------------------------------------------------------------------------------


def test_a_run_logs_three_rewards_and_the_table_has_a_row_for_each(tmp_path):
    out = tmp_path / "out"
    printed = train(
        *SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "2", "--save_steps", "2", "--per_level",
        "--aggregation", "nested", "--reward_form", "nats", "--ppl_weights", "0.3", "0.3", "0.4", "--output_dir", out,
    ).stdout  # fmt: skip
    names = [f"multi_level_ppl_{level}" for level in LEVELS]
    for entry in (entry for entry in log_history(out, 2) if "reward" in entry):
        total = sum(w * entry[f"rewards/{name}/mean"] for w, name in zip((0.3, 0.3, 0.4), names, strict=True))
        assert entry["reward"] == pytest.approx(total, abs=1e-5)
        assert entry["diagnostics/vetoed"] == 0 and "diagnostics/no_spread" in entry and "reward_word" in entry
    scores = json.loads((out / "heldout.json").read_text())["after"]["scores"]
    assert scores["reward"] == pytest.approx(sum(scores[name] for name in names)) and scores["reward"] != 0
    assert all(name in printed for name in names)
    settings = (out / "training_config.yaml").read_text()
    assert "per_level: true" in settings and "multi_objective_aggregation: normalize_then_sum" in settings


def test_a_guard_that_would_not_hold_is_refused(tmp_path):
    flags = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--output_dir", tmp_path / "out"]
    line = refusal(*flags, "--multi_objective_aggregation", "normalize_then_sum")
    assert "add --per_level" in line and "--loop_penalty 0" in line
    assert not (tmp_path / "out").exists()
