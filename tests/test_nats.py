"""The reward in nats: dense, clipped, a blank text the lowest, and the loop guard's guarantee with it."""

import math

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from ppl.config import LOOP_PENALTY
from ppl.config import NATS_CLIP as CLIP
from ppl.errors import InputError
from ppl.reward.function import MultiLevelPPLRewardFunction
from ppl.reward.loop_guard import loop_guard
from ppl.reward.terms import clipped, nats
from ppl.training.settings import reward_settings
from train_grpo_multilevel_unsloth import parse_args

perplexities = st.lists(st.floats(1, 1e6), min_size=3, max_size=3)


def test_the_ratio_by_hand():
    baseline, current = np.array([[20.0, 30.0, 40.0]]), np.array([[10.0, 30.0, 80.0]])
    found = nats(baseline, current, np.array([0.2, 0.3, 0.5]))
    assert found == pytest.approx([0.2 * math.log(2) - 0.5 * math.log(2)])
    assert clipped(np.array([-0.6, -0.2, 0.6])).tolist() == [-0.5, -0.2, 0.5]


@given(baseline=perplexities, current=perplexities)
def test_a_better_text_never_earns_less(baseline, current):
    weights = np.array([0.2, 0.3, 0.5])
    one = clipped(nats(np.array([baseline]), np.array([current]), weights))[0]
    worse = clipped(nats(np.array([baseline]), 1.1 * np.array([current]), weights))[0]
    assert worse <= one
    assert worse >= -CLIP and one <= CLIP


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
        assert float(rewards[index]) == pytest.approx(max(-CLIP, min(CLIP, ratio / 4)), abs=1e-6)
    assert rewards[-1] == -CLIP  # the blank one: no honest text earns less
    assert len(set(rewards.tolist())) > 2


def test_how_often_it_clips_is_logged(tokenizer, model):
    given = {"a": dict.fromkeys(("word", "phrase", "sentence"), 1e-3)}
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, given, form="nats")
    logged = {}
    rewards = reward_fn(["a", "a"], ["The fox.", "The crow."], log_metric=logged.__setitem__)
    assert rewards == [-CLIP, -CLIP]
    assert logged["diagnostics/clipped"] == 1.0
    steps = MultiLevelPPLRewardFunction(model, tokenizer, given)
    logged.clear()
    steps(["a"], ["The fox."], log_metric=logged.__setitem__)
    assert "diagnostics/clipped" not in logged


def test_a_first_visit_earns_nothing_and_the_second_is_measured(tokenizer, model):
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, form="nats")
    assert reward_fn(["a", "a"], ["The fox.", "The crow laughed."]) == [0.0, 0.0]
    low, high = sorted(reward_fn(["a", "a"], ["The fox.", "The crow laughed."]))
    assert low < 0 < high  # their mean is the baseline


def test_the_loop_guard_outweighs_all_that_nats_can_pay():
    penalty, weight = loop_guard(form="nats")
    assert weight == LOOP_PENALTY * 2 * CLIP
    honest, loop = list(range(200)), list(range(40)) + [1, 2, 3, 4] * 40
    paid = [weight * share for share in penalty(completion_ids=[honest, loop])]
    assert paid[0] - CLIP > paid[1] + CLIP


def test_nats_and_thresholds_exclude_each_other(tokenizer, model, capsys):
    with pytest.raises(InputError, match="form is 'nats', which has no thresholds"):
        MultiLevelPPLRewardFunction(model, tokenizer, form="nats", reward_thresholds=[(0, 1)])
    with pytest.raises(InputError, match="form is 'log'"):
        MultiLevelPPLRewardFunction(model, tokenizer, form="log")
    with pytest.raises(SystemExit):
        parse_args(["--reward_form", "nats", "--reward_thresholds", "0:1"])
    assert "form is 'nats', which has no thresholds" in capsys.readouterr().err
    args, _ = parse_args(["--reward_form", "nats"])
    assert MultiLevelPPLRewardFunction(model, tokenizer, **reward_settings(args)).config.form == "nats"


def test_it_is_a_plain_tensor(tokenizer, model):
    rewards = MultiLevelPPLRewardFunction(model, tokenizer, form="nats").compute_rewards(["The fox."])
    assert rewards.dtype == torch.float32
