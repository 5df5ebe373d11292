"""No loop or copy earns more than the text it is made of: the bound for any model, and real stories under the real
reward."""

import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import get_repetition_penalty_reward
from written_down import TOKENIZER

from mlppl.config import LOOP_PENALTY, RewardConfig
from mlppl.data import TINY_STORIES
from mlppl.errors import InputError
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.reward.loop_guard import NGRAM, RepeatedShare, copy_guard, loop_guard, loop_veto
from mlppl.reward.terms import normalized
from mlppl.scoring.sampling import sample_completions
from mlppl.scoring.units import segment
from mlppl.training.policy import Loaded
from mlppl.training.rewards import check_reward_weights, name_of
from train_grpo_multilevel_unsloth import make_rewards

LENGTHS = (64, 128, 256)


def share(ids) -> float:
    return -get_repetition_penalty_reward(NGRAM, -1.0)(completion_ids=[list(ids)])[0]


# --- the bound -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 30), st.integers(1, 120))
def test_a_loop_repeats_at_least_the_share_that_the_bound_says(before, unit, looped):
    tokens = [*range(before), *(1000 + index % unit for index in range(looped))]
    if len(tokens) >= NGRAM:
        repeated = max(0, looped - unit - NGRAM + 1)
        assert share(tokens) == pytest.approx(repeated / (len(tokens) - NGRAM + 1))


@given(
    st.lists(st.integers(0, 3), min_size=NGRAM, max_size=40),
    st.lists(st.integers(0, 3), min_size=NGRAM, max_size=40),
    st.lists(st.tuples(st.integers(-100, 100), st.integers(-5, 5)), min_size=1, max_size=4, unique_by=lambda p: p[0]),
)
def test_who_repeats_more_by_one_over_the_weight_earns_less_whatever_the_perplexities_say(one, other, thresholds):
    penalty, weight = loop_guard(LOOP_PENALTY, thresholds)
    rewards = [0, *(reward for _, reward in thresholds)]
    if max(rewards) > min(rewards) and share(one) > share(other) + 1 / LOOP_PENALTY + 1e-9:
        of_one, of_other = penalty(completion_ids=[one, other])
        assert max(rewards) + weight * of_one < min(rewards) + weight * of_other


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=4))
def test_without_prompts_it_is_trls_penalty(completions):
    penalty, _ = loop_guard()
    assert penalty(completion_ids=completions, prompts=["p"] * len(completions)) == pytest.approx(
        get_repetition_penalty_reward(NGRAM, -1.0)(completion_ids=completions)
    )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_copy_repeats_at_least_the_share_that_the_bound_says(before, copied, after):
    """A run of the prompt, `copied` tokens long, between text of one's own."""
    prompt = list(range(100, 140))
    ids = [*range(before), *prompt[:copied], *range(1000, 1000 + after)]
    [found] = RepeatedShare(tokenizer=object())([ids], prompt_ids=[prompt])
    total = max(len(ids) - NGRAM + 1, 0)
    assert found == pytest.approx(max(0, copied - NGRAM + 1) / total if total else 0)  # less than NGRAM tokens are free


@given(
    st.lists(st.integers(0, 3), min_size=NGRAM, max_size=30),
    st.lists(st.integers(0, 3), min_size=NGRAM, max_size=30),
    st.lists(st.integers(0, 3), max_size=30),
)
def test_brute_force_and_the_guarantee_with_a_prompt(one, other, prompt):
    def slow(ids):
        runs = [ids[start : start + NGRAM] for start in range(len(ids) - NGRAM + 1)]
        of_prompt = [prompt[start : start + NGRAM] for start in range(len(prompt) - NGRAM + 1)]
        return sum(run in of_prompt or run in runs[:index] for index, run in enumerate(runs)) / len(runs)

    penalty, weight = loop_guard(form="nats", tokenizer=object())
    paid = penalty(completion_ids=[one, other], prompt_ids=[prompt] * 2)
    assert paid == pytest.approx([-slow(one), -slow(other)])
    if slow(one) > slow(other) + 1 / LOOP_PENALTY + 1e-9:
        assert 0.5 + weight * paid[0] < -0.5 + weight * paid[1]
    veto = loop_veto(tokenizer=object())
    assert veto(completion_ids=[one], prompt_ids=[prompt]) == [slow(one) > 1 / LOOP_PENALTY]


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=2, max_size=32))
def test_normalized_rewards_differ_by_no_more_than_the_weight_counts_on(rewards):
    _, weight = loop_guard(1.0, normalized_over=len(rewards))
    assert np.ptp(normalized(np.array(rewards))) <= weight + 1e-9


def test_a_larger_reward_makes_loops_dearer_in_proportion():
    assert loop_guard()[1] == LOOP_PENALTY
    assert loop_guard(10, [(0, 5.0), (1, -2.0)])[1] == 10 * 7
    assert loop_guard(10, [(0, 3.0)])[1] == 10 * 3  # below the threshold it is 0


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_makes_no_sense_is_refused(weight):
    with pytest.raises(InputError, match=r"--loop_penalty is .*expected 0"):
        loop_guard(weight)


def test_reward_weights_of_trl_must_be_one_for_each_function():
    both = ["multi_level_ppl", "loop_penalty"]
    check_reward_weights(None, both)
    check_reward_weights([1.0, 5.0], both)
    check_reward_weights([1.0, 5.0, 2.0], [*both, "brevity"])
    with pytest.raises(InputError, match=r"holds 1 number.*expected 2: of multi_level_ppl, loop_penalty"):
        check_reward_weights([1.0], both)
    with pytest.raises(InputError, match=r"holds 2 number.*expected 1"):
        check_reward_weights([1.0, 5.0], ["multi_level_ppl"])


# --- real stories ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    """(tokenizer, model, all 240 stories)."""
    files = [TINY_STORIES / "train.json", TINY_STORIES / "test.json"]
    stories = [story for file in files for story in json.loads(file.read_text())]
    return AutoTokenizer.from_pretrained(TINY_STORIES), AutoModelForCausalLM.from_pretrained(TINY_STORIES), stories


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def looped(tokenizer, text: str, length: int, rng: random.Random) -> list[int] | None:
    """The text up to one of its sentences, and that sentence to the end; one that fits at least twice."""
    starts = [*segment([text]).starts["sentence"], len(text)]
    found = []
    for start, end in itertools.pairwise(starts):
        before, sentence = ids_of(tokenizer, text[:start]), ids_of(tokenizer, " " + text[start:end].strip())
        if len(before) + 2 * len(sentence) <= length:
            found.append((before, sentence))
    if not found:
        return None
    before, sentence = rng.choice(found)
    return (before + sentence * length)[:length]


@pytest.fixture(scope="module")
def trials(embedded):
    """Per trial (story, token ids of the original, of the loop); 80 stories, each at every length."""
    tokenizer, _, stories = embedded
    rng = random.Random(0)
    chosen = rng.sample(range(len(stories)), 80)
    rows = []
    for length in LENGTHS:
        for story in chosen:
            text = stories[story]["completion"]
            if loop := looped(tokenizer, text, length, rng):
                rows.append((story, ids_of(tokenizer, text)[:length], loop))
    assert len(rows) >= 200
    return rows


def test_no_looped_story_out_earns_its_original(embedded, trials):
    """Against the model's own writing, as in the demo, and against baselines that leave the original a lower reward."""
    tokenizer, model, stories = embedded
    torch.manual_seed(0)
    chosen = sorted({story for story, *_ in trials})
    prompts = [stories[story]["prompt"] for story in chosen]
    own = sample_completions(model, tokenizer, prompts, num_generations=2, max_new_tokens=64, seed=42, batch_size=80)
    plain = MultiLevelPPLRewardFunction(model, tokenizer, None)
    pairs = [(prompt, text) for prompt, texts in zip(prompts, own, strict=True) for text in texts]
    means = np.nanmean(plain.calculator.score_pairs(model, pairs).reshape(len(chosen), 2, 3), axis=1)
    penalty, weight = loop_guard()
    won_without = 0
    # Lower and lower baselines: the original's reward falls from 1 to 0, whichever way the loop's goes.
    for factor in (1.0, 0.7, 0.5):
        levels = dict(zip(chosen, means * factor, strict=True))
        baselines = [dict(zip(("word", "phrase", "sentence"), levels[story], strict=True)) for story, *_ in trials]
        totals = []
        for version in (1, 2):
            ids = [trial[version] for trial in trials]
            rewards = plain.compute_rewards(
                tokenizer.batch_decode(ids),
                prompts=[stories[trial[0]]["prompt"] for trial in trials],
                baselines=baselines,
            )
            totals.append((rewards.double().numpy(), np.array(penalty(completion_ids=ids)) * weight))
        (original, small), (loop, large) = totals
        won_without += int((loop > original).sum())
        assert ((loop + large) > (original + small)).sum() == 0
    assert won_without >= 20, "the guard had nothing to do"


def test_nor_would_it_for_a_model_that_grants_every_loop_everything_if_it_fills_a_quarter(embedded, trials):
    """Rewards 1 for the loop and 0 for the original: what the bound is for."""
    penalty, weight = loop_guard()
    long = [trial for trial in trials if len(trial[2]) == 256]
    assert len(long) == 80
    for _, original, loop in long:
        of_original, of_loop = penalty(completion_ids=[original, loop])
        assert 1 + weight * of_loop < 0 + weight * of_original


def test_honest_prose_loses_next_to_nothing(embedded):
    """The numbers of studies/README.md."""
    tokenizer, model, stories = embedded
    penalty, weight = loop_guard()
    human = [ids_of(tokenizer, story["completion"]) for story in stories]
    lost = -weight * np.array(penalty(completion_ids=human))
    assert lost.mean() == pytest.approx(0.015, abs=0.003) and np.mean(lost > 0) < 0.06
    prompts = [story["prompt"] for story in stories[200:]]
    own = sample_completions(model, tokenizer, prompts, num_generations=2, max_new_tokens=64, seed=1, batch_size=80)
    written = [ids_of(tokenizer, text) for texts in own for text in texts]
    assert max(-weight * np.array(penalty(completion_ids=written))) == 0


# --- the prompt, lists and code --------------------------------------------------------------------------------------


def share_of(tokenizer, prompt: str, text: str) -> float:
    [found] = RepeatedShare(tokenizer)([ids_of(tokenizer, text)], prompts=[prompt])
    return found


def test_no_copy_of_the_prompt_out_earns_the_story_and_honest_prose_quotes_for_nothing(embedded):
    """Rewards 1 for the copy and 0 for the story, whatever the model: that is what the weight is for."""
    tokenizer, _, stories = embedded
    penalty, weight = loop_guard(tokenizer=tokenizer)
    prompts, written = zip(*((story["prompt"], story["completion"]) for story in stories), strict=True)
    human = [ids_of(tokenizer, text) for text in written]
    half = [f" {prompt} {text[: len(prompt)]}" for prompt, text in zip(prompts, written, strict=True)]
    copies = [ids_of(tokenizer, text) for text in half]
    of_human = weight * np.array(penalty(completion_ids=human, prompts=prompts))
    of_copies = weight * np.array(penalty(completion_ids=copies, prompts=prompts))
    assert (1 + of_copies < 0 + of_human).all() and of_copies.max() < -5
    # studies/README.md: what human prose pays with its prompt in view, and how many stories pay more for it.
    without = weight * np.array(loop_guard()[0](completion_ids=human, prompts=prompts))
    assert -of_human.mean() == pytest.approx(0.019, abs=0.003) and np.sum(of_human < without) == 4
    veto = loop_veto(tokenizer=tokenizer)
    assert not any(veto(completion_ids=human, prompts=prompts)) and all(veto(completion_ids=copies, prompts=prompts))


def test_a_quotation_of_a_document_costs_more_than_any_summary_earns(embedded):
    tokenizer, _, stories = embedded
    penalty, weight = copy_guard(1.0, tokenizer)  # 1: the most that nats can earn
    documents = [story["completion"] for story in stories]
    quoted = [text[: text.index(" ", len(text) // 3)] for text in documents]  # of whole words
    shares = -np.array(penalty(None, quoted, documents))
    assert shares.min() == 1 and 1 - weight * shares.max() == -2
    others = -np.array(penalty(None, quoted[1:] + quoted[:1], documents))
    assert others.mean() < 0.02
    # By hand: of the runs of four tokens in a quotation and what is one's own, those of the quotation.
    text, document = quoted[0] + " Zebras hummed quietly.", documents[0]
    runs = list(zip(*(ids_of(tokenizer, " " + text.strip())[start:] for start in range(4)), strict=False))
    there = ids_of(tokenizer, " " + document.strip())
    inside = [any(there[at : at + 4] == list(run) for at in range(len(there))) for run in runs]
    assert penalty(None, [text], [document]) == [-sum(inside) / len(inside)] and 0 < sum(inside) < len(inside)
    assert penalty(None, ["Hm."], [document]) == [0]


def test_of_a_completion_the_part_counts_that_the_scorer_reads(embedded):
    tokenizer, _, stories = embedded
    document = stories[0]["completion"]
    put = RewardConfig(target="reference", template="{completion}{reference}", extract="In summary: (.*)")
    penalty, _ = copy_guard(1.0, tokenizer, put=put.reference_context)
    thought = "Let me think about it. " * 30
    assert penalty(None, [f"{thought}In summary: {document}"], [document]) == [-1]
    assert penalty(None, [f"{document} In summary: a fox."], [document]) == [0]


@pytest.mark.parametrize("thresholds", [[(0, 1)], [(-5, -1), (0, -0.5)], [(-5, -1), (0, 1)]])
def test_a_quotation_costs_more_than_it_earns_whatever_the_thresholds(thresholds):
    config = RewardConfig(reward_thresholds=thresholds)
    assert config.most == 1 and copy_guard(config.most, None)[1] == 3 > config.highest - config.lowest


@pytest.mark.parametrize(
    ("settings", "penalty", "allowed", "names"),
    [
        ({"target": "reference"}, 20, False, ["loop_penalty"]),
        ({"target": "reference", "template": "{completion}{reference}"}, 20, False, ["loop_penalty", "copy_penalty"]),
        ({"target": "reference", "template": "{completion}{reference}"}, 0, False, ["copy_penalty"]),
        ({"target": "reference", "template": "{completion}{reference}"}, 20, True, ["loop_penalty"]),
        ({}, 0, False, []),
    ],
)
def test_each_guard_has_a_flag_that_leaves_it_out_and_only_it(embedded, settings, penalty, allowed, names):
    tokenizer, model, _ = embedded
    job = SimpleNamespace(
        reward=RewardConfig(**settings), baselines=None, contexts={}, chat={}, per_level=False, loop_penalty=penalty,
        allow_copies=allowed, guarded_prompts=lambda tokenizer: {},
    )  # fmt: skip
    of_model = Loaded(model, tokenizer)
    assert [name_of(function) for function, _ in make_rewards(job, of_model, of_model)] == ["multi_level_ppl", *names]


LIST = """
- milk, two bottles
- bread, if it is fresh
- a bag of apples
- six eggs
- honey from the market
"""
CODE = """
def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("negative side")
    return width * height


def perimeter(width, height):
    return 2 * (width + height)
"""


def test_a_list_is_free_and_code_is_not(embedded):
    """Indentation and brackets are tokens, too: the guide says to lower the weight for code."""
    tokenizer, *_ = embedded
    assert share_of(tokenizer, "Write it down:", LIST) == 0
    assert share_of(tokenizer, "Write it down:", CODE) == pytest.approx(0.059, abs=0.001)


def test_the_messages_of_a_chat_are_its_prompt():
    said = "The old crow sat in the tall tree and looked down."
    prompt = [{"role": "user", "content": said}]
    ids = TOKENIZER(said, add_special_tokens=False)["input_ids"]
    assert RepeatedShare(TOKENIZER)([ids], prompts=[prompt]) == [1.0]
    assert RepeatedShare()([ids], prompts=[prompt])[0] < 0.05


def test_what_the_reward_skips_the_guard_skips(tmp_path):
    """Else TRL takes the guard's 0 for the row's reward."""
    from datasets import Dataset
    from trl import GRPOConfig

    from mlppl.training.trainer import ResumableGRPOTrainer

    prompts = ["The fox ran", "The crow sat"]
    baselines = {prompts[0]: dict.fromkeys(("word", "phrase", "sentence"), 1e9)}  # which anything is better than
    reward_fn = MultiLevelPPLRewardFunction(toys.llama(), TOKENIZER, baselines, missing="skip")
    penalty, weight = loop_guard(tokenizer=TOKENIZER, skips=reward_fn.skips)
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=2,
        report_to="none", max_steps=1, max_completion_length=4, reward_weights=[1.0, weight], logging_steps=1,
    )  # fmt: skip
    trainer = ResumableGRPOTrainer(
        model=toys.llama(), args=config, reward_funcs=[reward_fn, penalty], processing_class=TOKENIZER,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == 1.0  # 0.5 with a 0 for each of the two skipped completions
    assert trainer.state.log_history[0]["rewards/loop_penalty/mean"] == 0.0


def test_the_guard_asks_anew_where_another_call_was_last():
    baselines = {"a": dict.fromkeys(("word", "phrase", "sentence"), 10.0)}
    reward_fn = MultiLevelPPLRewardFunction(toys.llama(), TOKENIZER, baselines, missing="skip")
    penalty, _ = loop_guard(skips=reward_fn.skips)
    ids = [list(range(5, 15))] * 2
    assert penalty(prompts=["a", "b"], completions=["x y", "x z"], completion_ids=ids) == [0.0, None]
    reward_fn(["b", "a"], ["x y", "x z"])
    assert penalty(prompts=["a", "b"], completions=["x y", "x z"], completion_ids=ids) == [0.0, None]
    assert penalty(prompts=["b", "a"], completions=["x y", "x z"], completion_ids=ids) == [None, 0.0]
