"""A run that learns nothing is told why: the real reward function in each failure, and the real script in one."""

import json
import os
import random
import types

import numpy as np
import pytest
import torch
from training_runs import train

from mlppl.data import TINY_STORIES
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.training.diagnostics import START, WINDOW, Diagnostics, in_one_line

STATE = types.SimpleNamespace(is_world_process_zero=True, global_step=0)
WORDS = ["fox", "mill", "river", "stone", "bread", "crow", "cheese", "winter", "lamp", "garden", "boat", "song"]


def level(value):
    return dict.fromkeys(("word", "phrase", "sentence"), value)


def writing(rng, words=12):
    return " " + " ".join(rng.choices(WORDS, k=words))


def run(reward_fn, steps=WINDOW, prompts=None, write=writing, group=4, kl=None):
    """The verdicts after so many steps of real reward calls, and the metrics of the last one."""
    rng = random.Random(0)
    watch = Diagnostics(reward_fn, kl)
    for step in range(steps):
        watch.on_step_begin(None, STATE, None)
        prompt = prompts(step) if prompts else f"Prompt {step % 3}"
        logged = {}
        texts = [write(rng) for _ in range(group)]
        reward_fn([prompt] * group, texts, id=[prompt] * group, log_metric=logged.__setitem__)
        watch.on_step_end(None, STATE, None)
    return watch, logged


@pytest.fixture
def function(model, tokenizer):
    def make(baselines, **options):
        return MultiLevelPPLRewardFunction(model, tokenizer, baselines, **options)

    return make


EVERY = [f"Prompt {index}" for index in range(3)]


def test_saturated(function, capsys):
    watch, logged = run(function(dict.fromkeys(EVERY, level(1e9))))
    assert list(watch.verdicts()) == watch.named == ["saturated"]
    assert (logged["diagnostics/at_top"], logged["diagnostics/no_spread"]) == (1, 1)
    printed = capsys.readouterr().out
    assert printed.count("SATURATED: 100%") == 1 and "--generate" in printed and "--temperature 1" in printed


def test_all_zero_because_the_baselines_are_out_of_reach(function, capsys):
    watch, logged = run(function(dict.fromkeys(EVERY, level(1.01))))
    assert watch.named == ["all zero"] and logged["diagnostics/at_zero"] == 1
    printed = capsys.readouterr().out
    assert "ALL ZERO: 100%" in printed and "cannot match yet" in printed and "--generate" in printed


def test_all_zero_because_every_visit_is_the_first(function, capsys):
    watch, logged = run(function(None), prompts=lambda step: f"Prompt {step}", group=1)
    assert watch.named == ["all zero"] and logged["diagnostics/first_visit"] == 1
    assert "100%: first visit" in (printed := capsys.readouterr().out) and "--num_generations" in printed


def test_all_zero_because_there_are_no_baselines(function, capsys):
    watch, logged = run(function({"another": level(9.0)}, missing="skip"))
    assert watch.named == ["all zero"] and logged["diagnostics/missing"] == 1
    assert "100%: no baseline" in capsys.readouterr().out


def test_all_zero_because_nothing_is_written(function, capsys):
    watch, logged = run(function(dict.fromkeys(EVERY, level(9.0))), write=lambda rng: " ")
    assert watch.named == ["all zero"] and logged["diagnostics/unscorable"] == 1
    assert "100%: blank" in capsys.readouterr().out


def test_no_spread_for_another_reason(function, capsys):
    between = [(-1e8, 0.5), (99.9, 1.0)]  # everything is at 0.5
    watch, logged = run(function(dict.fromkeys(EVERY, level(9.0)), reward_thresholds=between))
    assert watch.named == ["no spread"]
    assert (logged["diagnostics/at_zero"], logged["diagnostics/at_top"], logged["diagnostics/no_spread"]) == (0, 0, 1)
    assert "NO SPREAD" in (printed := capsys.readouterr().out) and "--reward_form nats" in printed


@pytest.mark.parametrize("spoilt", ["loops", "brevity"])
def test_gamed(function, capsys, spoilt):
    made = iter(range(10_000))

    def worse(rng):
        if next(made) < 40:
            return writing(rng)
        return " the fox" * 6 if spoilt == "loops" else " the fox"

    watch, logged = run(function(dict.fromkeys(EVERY, level(300.0)), form="nats"), steps=30, write=worse)
    assert "gamed" in watch.named
    name = "distinct_2_of_start" if spoilt == "loops" else "length_of_start"
    assert logged[f"diagnostics/{name}"] < 0.5
    assert capsys.readouterr().out.count("GAMED") == 1


def test_a_run_that_learns_is_told_nothing(function, capsys):
    watch, logged = run(function(dict.fromkeys(EVERY, level(300.0)), form="nats"), steps=2 * WINDOW)
    assert watch.named == [] and logged["diagnostics/no_spread"] == 0
    assert logged["diagnostics/distinct_2_of_start"] == pytest.approx(1, abs=0.1)
    assert capsys.readouterr().out == ""


def level_run(reward_fn, levels, steps=WINDOW + START):
    """A run in which the improvements are written down: of each step word, phrase and sentence."""
    watch = Diagnostics(reward_fn)
    for step in range(steps):
        watch.on_step_begin(None, STATE, None)
        current = 100 - np.array(levels(step))
        reward_fn.calculator.score_pairs = lambda model, pairs, one=current: np.array([one] * len(pairs))
        reward_fn([EVERY[0]] * 2, [f" fox {step}", f" mill {step}"], id=[EVERY[0]] * 2)
        watch.on_step_end(None, STATE, None)
    return watch


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ((39.0, 4.0, -26.0), "the word level has risen by 28 points"),
        ((39.0, 4.0, 2.0), None),  # nobody pays
        ((39.0, 4.0, -3.0), None),  # a little
        ((3.0, 2.0, -26.0), None),  # nobody gains
    ],
)
def test_one_level_pays_for_another(function, capsys, late, said):
    watch = level_run(
        function(dict.fromkeys(EVERY, level(100.0)), use_cache=False),
        lambda step: (1.0, 2.0, 3.0) if step < START else late,
    )
    assert ("level pays" in watch.named) == (said is not None)
    printed = capsys.readouterr().out
    if said:
        assert said in printed and "the sentence level pays for: -19 %" in printed and "--ppl_weights 1 1 1" in printed
    else:
        assert "PAYS" not in printed


def test_nested_levels_gain_and_pay_in_nats(function, capsys):
    """-ln 0.5 is 0.47 nats above -ln 0.8, and a ratio of 2.7 is -0.99 nats, not -170 %: three quarters of 20 steps."""
    nested = function(dict.fromkeys(EVERY, level(100.0)), use_cache=False, aggregation="nested")
    watch = level_run(nested, lambda step: (20.0, 2.0, 3.0) if step < START else (50.0, 4.0, -170.0))
    assert "level pays" in watch.named
    printed = capsys.readouterr().out
    assert "the word level has risen by +0.35 nats a token" in printed
    assert "the sentence level pays for: -0.74 nats a token from" in printed


def test_a_level_that_was_below_its_baseline_from_the_start_pays_for_nothing(function):
    bad = (1.0, 2.0, -30.0)
    watch = level_run(
        function(dict.fromkeys(EVERY, level(100.0)), use_cache=False),
        lambda step: bad if step < START else (30.0, 2.0, -29.0),
    )
    assert "level pays" not in watch.named


@pytest.mark.parametrize(("kl", "named"), [(0.003, ["not moved"]), (0.05, []), (None, [])])
def test_a_policy_that_has_not_moved(function, capsys, kl, named):
    reward_fn = function(dict.fromkeys(EVERY, level(300.0)), form="nats")
    asked = []
    watch, _ = run(reward_fn, steps=2 * WINDOW, kl=lambda prompts, texts: asked.append((prompts, texts)) or kl)
    assert watch.named == named and len(asked) == 2 and len(asked[0][1]) == 4
    printed = capsys.readouterr().out
    assert ("NOT MOVED: after 20 steps the policy is 0.003 nats" in printed) == bool(named)


@pytest.mark.parametrize(("late", "named"), [(0.49, []), (0.51, ["moved far"])])
def test_a_policy_that_has_moved_far(function, capsys, late, named):
    reward_fn = function(dict.fromkeys(EVERY, level(300.0)), form="nats")
    distances = iter([0.1, late, *[0.1] * (not named)])  # what has been told is not asked for again
    watch, _ = run(reward_fn, steps=3 * WINDOW, kl=lambda prompts, texts: next(distances))
    assert watch.named == named
    printed = capsys.readouterr().out
    assert ("MOVED FAR: after 40 steps the policy is 0.51 nats a token from its start" in printed) == bool(named)


def test_where_nothing_can_be_learned_that_is_why_it_has_not_moved(function):
    watch, _ = run(function(dict.fromkeys(EVERY, level(1e9))), kl=lambda prompts, texts: 1 / 0)
    assert watch.named == ["saturated"]


def test_not_before_its_twenty_steps_and_not_from_evaluations(function):
    saturated = function(dict.fromkeys(EVERY, level(1e9)))
    watch, _ = run(saturated, steps=WINDOW - 1)
    assert watch.verdicts() == {}
    watch, _ = run(saturated, steps=START - 1)
    saturated([EVERY[0]] * 2, [" fox", " mill"], id=[EVERY[0]] * 2)  # no step is going on
    assert len(watch.start) == START - 1


def test_names_are_the_same_at_every_call(function):
    _, one = run(function(dict.fromkeys(EVERY, level(1e9))), steps=1)
    _, other = run(function({"another": level(1.0)}, missing="skip"), steps=1, write=lambda rng: "")
    assert set(one) == set(other) and all(value == value for value in one.values())
    # Nothing was scored: the levels have no mean.
    assert {name for name, value in other.items() if value != value} == {
        name for name in other if name.startswith(("reward_", "ppl/")) and name != "reward_time"
    }


def test_it_goes_on_where_it_stopped(function):
    reward_fn = function(dict.fromkeys(EVERY, level(1e9)))
    watch, _ = run(reward_fn)
    resumed = Diagnostics(reward_fn)
    resumed.load_state_dict(watch.state_dict())
    assert (resumed.start, resumed.named) == (watch.start, ["saturated"])


def test_the_progress_line():
    logs = {"diagnostics/at_zero": 0.25, "diagnostics/at_top": 0.5, "diagnostics/no_spread": 1.0}
    assert in_one_line(logs) == ", at 0 25%, at top 50%, groups alike 100%"
    assert in_one_line({}) == ""


def _half_a_group(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    import accelerate
    import toys

    accelerate.PartialState._reset_state()  # a fork of a process that may have been alone
    accelerate.PartialState(cpu=True)
    tokenizer, model = toys.byte_level(), toys.llama()
    # Rewards 1 in one process, 0 in the other: only together has the group a spread.
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, {"p": level(1e9 if rank else 1.01)})
    watch = Diagnostics(reward_fn)
    watch.on_step_begin(None, STATE, None)
    logged = {}
    reward_fn(["p"] * 2, [" fox", " mill"], id=["p"] * 2, log_metric=logged.__setitem__)
    assert (logged["diagnostics/no_spread"], logged["diagnostics/at_top"]) == (0, 0.5), logged
    # An interpreter that ends while a thread of gloo still holds a tensor is aborted (pytorch/pytorch#179291).
    torch.distributed.barrier()
    os._exit(0)


def test_two_processes_with_a_half_of_a_group_each(tmp_path):
    torch.multiprocessing.start_processes(_half_a_group, (str(tmp_path),), nprocs=2, start_method="fork")


def test_a_real_run_that_is_saturated_says_so(tmp_path):
    printed = train(
        "--max_samples", 12, "--heldout_samples", 2, "--max_new_tokens", 12, "--max_steps", WINDOW, "--save_steps", 100,
        "--reward_thresholds", "-1000000:1", "--baselines_path", easy(tmp_path), "--no_unsloth", "--no-load_in_4bit",
        "--output_dir", tmp_path / "out",
    ).stdout  # fmt: skip
    assert "SATURATED" in printed and "groups alike 100%" in printed


def easy(tmp_path):
    stories = json.loads((TINY_STORIES / "train.json").read_text())[:12]
    (tmp_path / "easy.json").write_text(json.dumps({story["id"]: level(1e6) for story in stories}))
    return tmp_path / "easy.json"
