"""The reward in nats: dense, bounded, a blank text the lowest, and the loop guard's guarantee with it."""

import math

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from mlppl.cli import reward_config
from mlppl.config import LOOP_PENALTY
from mlppl.config import NATS_KNEE as KNEE
from mlppl.errors import InputError
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.reward.loop_guard import loop_guard
from mlppl.reward.terms import bent, nats
from train_grpo_multilevel_unsloth import parse_args

perplexities = st.lists(st.floats(1, 1e6), min_size=3, max_size=3)


def test_the_ratio_by_hand():
    baseline, current = np.array([[20.0, 30.0, 40.0]]), np.array([[10.0, 30.0, 80.0]])
    found = nats(baseline, current) @ np.array([0.2, 0.3, 0.5])
    assert found == pytest.approx([0.2 * math.log(2) - 0.5 * math.log(2)])


def test_it_bends_by_hand():
    """1 - 1 / (4 |x|) beyond a half."""
    found = bent(np.array([-1e9, -2.0, -0.5, -0.2, 0.0, 0.4, 0.5, 1.0, np.nan]))
    assert found[:-1] == pytest.approx([-1, -0.875, -0.5, -0.2, 0, 0.4, 0.5, 0.75]) and np.isnan(found[-1])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1))
def test_it_always_rises_never_faster_than_the_ratio_and_stays_within_twice_the_knee(ratio, more):
    one, other = bent(np.array([ratio, ratio + more * max(1, abs(ratio))]))
    assert -2 * KNEE <= one < other <= 2 * KNEE
    assert other - one <= more * max(1, abs(ratio)) * (1 + 1e-9)


@given(baseline=perplexities, current=perplexities)
def test_a_better_text_never_earns_less(baseline, current):
    weights = np.array([0.2, 0.3, 0.5])
    one = bent(nats(np.array([baseline]), np.array([current])) @ weights)[0]
    worse = bent(nats(np.array([baseline]), 1.1 * np.array([current])) @ weights)[0]
    assert -2 * KNEE <= worse < one <= 2 * KNEE


def test_rewards_of_real_perplexities_are_their_log_ratio(tokenizer, model):
    texts = [*toys.SENTENCES, ""]
    prompts = ["Once upon a time"] * 4 + ["The fox"]
    given = {prompt: {"word": 500.0, "phrase": 510.0, "sentence": 520.0} for prompt in prompts}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, given, form="nats", weights=(1, 1, 2))
    rewards, details = reward_fn.compute_rewards(texts, prompts=prompts, return_details=True)
    for index in range(4):
        levels = {level: float(details["ppls"][level][index]) for level in ("word", "phrase", "sentence")}
        ratio = sum(
            weight * math.log(given[prompts[index]][level] / levels[level])
            for level, weight in (("word", 1), ("phrase", 1), ("sentence", 2))
        )
        expected = ratio / 4
        if abs(expected) > KNEE:
            expected = math.copysign(1 - 1 / abs(4 * expected), expected)
        assert float(rewards[index]) == pytest.approx(expected, abs=1e-6)
    assert rewards[-1] == -2 * KNEE  # the blank one: no honest text earns less
    assert len(set(rewards.tolist())) > 2


def test_how_often_it_bends_is_logged(tokenizer, model):
    given = {"a": dict.fromkeys(("word", "phrase", "sentence"), 1e-3)}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, given, form="nats")
    logged = {}
    rewards = reward_fn(["a", "a"], ["The fox.", "The crow."], log_metric=logged.__setitem__)
    assert min(rewards) > -1 and max(rewards) < -0.9 and rewards[0] != rewards[1]  # far off, and still not alike
    assert logged["diagnostics/bent"] == 1.0
    steps = MultiLevelPPLRewardFunction(model, tokenizer, given)
    logged.clear()
    steps(["a"], ["The fox."], log_metric=logged.__setitem__)
    assert "diagnostics/bent" not in logged


def test_at_the_first_visit_one_earns_what_the_other_loses(tokenizer, model):
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, form="nats")
    assert reward_fn(["b"], ["The fox."]) == [0.0]
    one, other = reward_fn(["a", "a"], ["The fox.", "The crow laughed."])
    assert one == pytest.approx(-other) != 0
    low, high = sorted(reward_fn(["a", "a"], ["The fox.", "The crow laughed."]))
    assert low < 0 < high  # their mean is the baseline


def test_the_loop_guard_outweighs_all_that_nats_can_pay():
    penalty, weight = loop_guard(form="nats")
    assert weight == LOOP_PENALTY * 4 * KNEE
    honest, loop = list(range(200)), list(range(40)) + [1, 2, 3, 4] * 40
    paid = [weight * share for share in penalty(completion_ids=[honest, loop])]
    assert paid[0] - 2 * KNEE > paid[1] + 2 * KNEE


def test_nats_and_thresholds_exclude_each_other(tokenizer, model, capsys):
    with pytest.raises(InputError, match="form is 'nats', which has no thresholds"):
        MultiLevelPPLRewardFunction(model, tokenizer, form="nats", reward_thresholds=[(0, 1)])
    with pytest.raises(InputError, match="form is 'log'"):
        MultiLevelPPLRewardFunction(model, tokenizer, form="log")
    with pytest.raises(SystemExit):
        parse_args(["--reward_form", "nats", "--reward_thresholds", "0:1"])
    assert "form is 'nats', which has no thresholds" in capsys.readouterr().err
    args, _ = parse_args(["--reward_form", "nats"])
    assert MultiLevelPPLRewardFunction(model, tokenizer, **vars(reward_config(args))).config.form == "nats"


def test_it_is_a_plain_tensor(tokenizer, model):
    rewards = MultiLevelPPLRewardFunction(model, tokenizer, form="nats").compute_rewards(["The fox."])
    assert rewards.dtype == torch.float32
