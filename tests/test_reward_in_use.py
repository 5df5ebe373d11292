"""The reward in a trainer and in a script: subclasses, metrics, cache, frozen scorer, files of baselines."""

import json
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import brute_force
import peft
import pytest
import torch
import toys
from baseline_files import write
from written_down import COLUMNS, MODEL, TOKENIZER, baseline_of, levels, reward

from mlppl.errors import BaselineError
from mlppl.reward.loop_guard import loop_guard
from multi_level_ppl_trl import LEVELS, MultiLevelPPLCalculator, MultiLevelPPLRewardFunction

# --- a reward of one's own -------------------------------------------------------------------------------------------


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


def test_the_guides_subclass_trains_under_trls_own_trainer(tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Kept(CustomMultiLevelReward):
        def __call__(self, prompts, completions, **columns):
            rewards = super().__call__(prompts, completions, **columns)
            calls.append((completions, rewards))
            return rewards

    calls = []
    policy = peft.get_peft_model(toys.llama(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = GRPOTrainer(
        model=policy,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, logging_steps=1,
            max_completion_length=8, report_to="none", use_cpu=True, learning_rate=1e-2, num_train_epochs=2,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["Once upon a time"]}),
        processing_class=TOKENIZER,
        reward_funcs=Kept(policy, TOKENIZER),
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(calls) == len(logs) == 2
    for (_, rewards), entry in zip(calls, logs, strict=True):
        assert entry["reward"] == pytest.approx(sum(rewards) / 4, abs=1e-4)
    assert logs[0]["reward_word"] != 0 != logs[1]["reward_word"]  # a first visit is measured, too
    assert 0 < logs[1]["reward_time"] < logs[1]["step_time"]


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
    assert logged.pop("reward_time") > 0
    assert logged == pytest.approx(
        {
            "reward_word": (1 + 3) / 2, "reward_phrase": (2 + 4) / 2, "reward_sentence": (4 + 6) / 2,
            "ppl/word": (99 + 97) / 2, "ppl/phrase": (98 + 96) / 2, "ppl/sentence": (96 + 94) / 2,
        }
    )  # fmt: skip


def test_metrics_have_the_same_names_at_every_call():
    perplexities = {"a": 99, "": math.nan, ("p", "r"): 100, ("pa", "r"): 90}
    names = []
    for options, completions, columns, scored in [
        ({}, ["a"], {}, True),
        ({}, [""], {}, False),
        ({}, [], {}, False),
        ({"baselines": {"x": levels(100)}, "missing": "skip"}, ["a"], {}, False),
        ({"target": "reference"}, ["a"], {"reference": ["r"]}, True),
        ({"target": "reference", "missing": "skip"}, ["a"], {"reference": [""]}, False),
        ({"normalize": True}, ["a"], COLUMNS, True),
    ]:
        logged = {}
        prompts = ["p"] * len(completions)
        reward(perplexities, **options)(prompts, completions, log_metric=logged.__setitem__, **columns)
        names.append(list(logged))
        assert math.isfinite(logged.pop("reward_time"))
        assert all(math.isfinite(value) == scored for value in logged.values())  # the mean of nothing is not 0
    per_level = {f"{name}{level}" for name in ("reward_", "ppl/") for level in LEVELS}
    assert set(names[0]) == per_level | {"reward_time"}
    assert names == [names[0]] * len(names)


def test_a_pickled_reward_gives_equal_rewards():
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, baselines={"x": levels(300.0)}, form="nats")
    arguments = {"prompts": ["The fox"] * 3, "completions": [" said", " ran", ""], "id": ["x"] * 3}
    expected = function(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was trained
        loaded = pickle.loads(pickle.dumps(function))
        assert loaded(**arguments) == expected
        loaded.cache.clear()
        assert loaded(**arguments) == pytest.approx(expected)
    assert loaded.__name__ == function.__name__


def test_a_pickled_zero_shot_reward_remembers_its_first_visits():
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER)
    function(["The fox"], [" said"])
    assert pickle.loads(pickle.dumps(function)).state_dict() == function.state_dict()


# --- cache -----------------------------------------------------------------------------------------------------------


def test_with_and_without_cache_the_numbers_are_the_same():
    arguments = {"prompts": ["The fox"] * 4, "completions": [" said", " ran", " said", ""]}
    cached = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, form="nats")
    fresh = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, form="nats", use_cache=False)
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
    function.cache.ENTRIES = 10
    for start in (0, 20):
        numbers = range(start, start + 20)
        _, details = function.compute_rewards([str(n) for n in numbers], return_details=True)
        assert details["ppls"]["word"].tolist() == [n + 1 for n in numbers]
        assert len(function.cache) == 10
    assert not reward({"a": 1}, use_cache=False).cache


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


@pytest.mark.parametrize("suffix", [".pkl", ".json"])
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


@pytest.mark.parametrize("way", ["AdamW", "AdamW8bit", "data"])
def test_a_scorer_that_is_trained_is_asked_anew_whoever_writes_its_weights(way):
    """bitsandbytes writes behind autograd's back, as does whoever writes `.data`."""
    model, tokenizer = toys.llama(), toys.byte_level()
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, {"Once": dict.fromkeys(LEVELS, 600.0)}, form="nats")

    def word() -> float:
        _, details = reward_fn.compute_rewards([" upon"], ["Once"], return_details=True)
        return details["ppls"]["word"].item()

    before = word()
    if way == "data":
        for parameter in model.parameters():
            parameter.data.add_(0.05)
    else:
        import bitsandbytes

        kinds = {"AdamW": torch.optim.AdamW, "AdamW8bit": bitsandbytes.optim.AdamW8bit}
        ids = tokenizer("The fox ran home.", return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        kinds[way](model.parameters(), lr=0.1).step()
    expected = MultiLevelPPLCalculator(tokenizer).compute_all_levels(model, " upon", "Once")["word"]
    with pytest.warns(UserWarning, match="weights change during training"):
        assert word() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(before, rel=1e-2)


def test_calls_from_several_threads_do_not_see_each_others_rows(tokenizer, model):
    """AsyncGRPO calls each reward in a thread: one had the skipped rows of another's call, or nan for a reward."""
    baselines = {f"row {index}": dict.fromkeys(LEVELS, 200.0) for index in range(0, 12, 2)}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, baselines, missing="skip", form="nats")
    guard, _ = loop_guard(skips=reward_fn.skips)
    calls = []
    for start in range(8):
        said = [f" the fox ran {start + row}" for row in range(2 + start % 3)]
        prompts = [f"row {start + row}" for row in range(len(said))]
        calls.append({"prompts": prompts, "completions": said, "completion_ids": tokenizer(said)["input_ids"]})
    both = [function for function in (reward_fn, guard) for _ in calls]
    expected = [function(**call) for function, call in zip(both, calls * 2, strict=True)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(4):
            found = threads.map(lambda function, call: function(**call), both, calls * 2)
            assert list(found) == [pytest.approx(one, abs=1e-6) for one in expected]
