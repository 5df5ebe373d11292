"""References measured by a fifth of their tokens: the choice by hand, and the reward beside brute force."""

import math
import statistics

import brute_force
import numpy as np
import pytest
import toys
from written_down import MODEL, TOKENIZER, levels

from multi_level_ppl_trl import LEVELS, MultiLevelPPLRewardFunction
from ppl.baselines.file import Baselines
from ppl.baselines.mismatch import check_meta
from ppl.definitions import AGGREGATIONS
from ppl.errors import BaselineError, InputError
from ppl.scoring.selection import hardest, most_varied, of_characters
from ppl.training.config import reward_settings
from train_grpo_multilevel_unsloth import parse_args

PROMPTS = ["The fox", "The fox", "Once", "Once", "Once"]
PLANS = [" ran home, and", " said:", " upon a time", "", " more"]
REFERENCES = [" I am hungry; give me bread. He ate it all."] * 2 + [" there was a crow, old and grey.\nIt sang."] * 3


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_fifth_that_surprises_most_of_equals_the_first():
    chars = np.arange(10)
    assert np.flatnonzero(hardest(chars, np.array([1.0, 3, 3, 3, 0, 0, 0, 0, 0, 0]))).tolist() == [1, 2]
    assert hardest(chars[:1], np.ones(1)).tolist() == [True]
    assert np.flatnonzero(hardest(chars[:6], np.arange(6.0))).tolist() == [4, 5]  # a fifth, rounded up
    assert len(hardest(chars[:0], np.zeros(0))) == 0


def test_the_fifth_that_varies_most_within_the_group():
    chars = np.arange(5)
    rows = [(chars, np.array([5.0, 1, 2, 1, 9])), (chars, np.array([5.0, 3, 2, 1.5, 9]))]
    starts, chosen = most_varied(chars, rows)
    assert starts[chosen].tolist() == [1]  # not the hardest, on which they agree


def test_a_text_that_is_divided_otherwise_behind_a_completion_is_matched_by_characters():
    """Behind the prompt: tokens at 0, 2, 5. Behind a completion one holds the first two, or the second is in two."""
    starts, chosen = np.array([0, 2, 5]), np.array([False, True, False])
    assert of_characters(np.array([0, 5]), starts, chosen).tolist() == [False, False]
    assert of_characters(np.array([2, 3, 5]), starts, chosen).tolist() == [True, True, False]
    assert of_characters(np.array([1, 5]), np.array([2, 5]), np.array([True, False])).tolist() == [True, False]


# --- the reward beside brute force -----------------------------------------------------------------------------------


def chosen_characters(tokens: str, prompt: str, reference: str, plans: list[str]):
    """A predicate on characters, as slowly as can be."""
    alone = brute_force.token_surprisals(MODEL, TOKENIZER, reference, prompt)
    starts = sorted({char for char, _ in alone})

    def of(char):
        return max([start for start in starts if start <= char], default=starts[0])

    def by_start(scored):
        return [math.fsum(surprisal for char, surprisal in scored if of(char) == start) for start in starts]

    if tokens == "hard":
        values = by_start(alone)
    else:
        rows = [by_start(brute_force.token_surprisals(MODEL, TOKENIZER, reference, prompt + plan)) for plan in plans]
        values = [statistics.pvariance(column) for column in zip(*rows, strict=True)]
    order = sorted(range(len(starts)), key=lambda index: (-values[index], index))
    chosen = {starts[index] for index in order[: math.ceil(len(starts) / 5)]}
    return lambda char: of(char) in chosen


@pytest.mark.parametrize("tokens", ["hard", "group"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_reference_and_baseline_are_of_the_same_tokens_as_brute_force_has_them(tokens, aggregation):
    function = MultiLevelPPLRewardFunction(
        MODEL, TOKENIZER, target="reference", reference_tokens=tokens, aggregation=aggregation, form="nats"
    )
    rewards, details = function.compute_rewards(PLANS, PROMPTS, REFERENCES, return_details=True)
    for index, (prompt, plan, reference) in enumerate(zip(PROMPTS, PLANS, REFERENCES, strict=True)):
        plans = [other for other, of in zip(PLANS, PROMPTS, strict=True) if of == prompt]
        kept = chosen_characters(tokens, prompt, reference, plans)
        for name, context in {"ppls": prompt + plan, "baselines": prompt}.items():
            slow = brute_force.all_levels(MODEL, TOKENIZER, reference, context, aggregation=aggregation, kept=kept)
            for level in LEVELS:
                assert details[name][level][index] == pytest.approx(slow[level], rel=2e-4), (name, level, index)
    assert rewards[3] == pytest.approx(0.0, abs=1e-6)  # an empty plan changes nothing
    everything = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, target="reference", aggregation=aggregation, form="nats")
    assert everything.compute_rewards(PLANS, PROMPTS, REFERENCES).tolist() != rewards.tolist()


def test_a_baseline_that_is_given_is_taken_and_the_tokens_are_still_the_hard_ones():
    given = {"a": levels(77.0)}
    function = MultiLevelPPLRewardFunction(
        MODEL, TOKENIZER, given, target="reference", reference_tokens="hard", allow_baseline_mismatch=True
    )
    arguments = {"prompts": PROMPTS[:1], "references": REFERENCES[:1], "return_details": True}
    _, details = function.compute_rewards(PLANS[:1], ids=["a"], **arguments)
    kept = chosen_characters("hard", PROMPTS[0], REFERENCES[0], [])
    slow = brute_force.all_levels(MODEL, TOKENIZER, REFERENCES[0], PROMPTS[0] + PLANS[0], kept=kept)
    assert details["ppls"]["word"][0] == pytest.approx(slow["word"], rel=2e-4)
    assert details["baselines"]["word"][0] == 77


def test_the_calculator_of_the_baselines_script_takes_the_same_ones():
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, target="reference", reference_tokens="hard")
    _, details = function.compute_rewards(PLANS[:1], PROMPTS[:1], REFERENCES[:1], return_details=True)
    scores = function.calculator.score(MODEL, [(PROMPTS[0], REFERENCES[0])], only_hard=True)
    assert scores.perplexities[0] == pytest.approx([float(details["baselines"][level][0]) for level in LEVELS])
    every = function.calculator.score(MODEL, [(PROMPTS[0], REFERENCES[0])])
    kept = chosen_characters("hard", PROMPTS[0], REFERENCES[0], [])
    chars = [char for char, _ in brute_force.token_surprisals(MODEL, TOKENIZER, REFERENCES[0], PROMPTS[0])]
    assert scores.tokens[0] == sum(map(kept, chars)) < every.tokens[0] == len(chars)
    assert len(set(filter(kept, chars))) == math.ceil(len(set(chars)) / 5) and scores.read[0] == every.read[0]


def test_a_blank_reference_is_skipped_as_ever():
    for tokens in ("hard", "group"):
        function = MultiLevelPPLRewardFunction(
            MODEL, TOKENIZER, target="reference", reference_tokens=tokens, missing="skip"
        )
        rewards = function(["p"] * 3, [" a", " b", " c"], reference=[" The fox ran."] * 2 + [""])
        assert rewards[2] is None and None not in rewards[:2]


# --- what does not go together ---------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_one_line():
    options = {"target": "reference", "reference_tokens": "group"}
    with pytest.raises(InputError, match=r"no baseline computed before.*leave out baselines"):
        MultiLevelPPLRewardFunction(MODEL, TOKENIZER, {"a": levels(9.0)}, **options)
    function = MultiLevelPPLRewardFunction(MODEL, TOKENIZER, **options)
    with pytest.raises(InputError, match="leave out baselines"):
        columns = {f"baseline_{level}": [9.0] * 2 for level in LEVELS}
        function(["p"] * 2, [" a", " b"], reference=[" The fox."] * 2, **columns)
    with pytest.raises(InputError, match=r"several completions of a prompt.*use reference_tokens='hard'"):
        function(["p"], [" a"], reference=[" The fox."])
    with pytest.raises(InputError, match="it needs target='reference'"):
        MultiLevelPPLRewardFunction(MODEL, TOKENIZER, reference_tokens="hard")
    with pytest.raises(InputError, match="reference_tokens is 'few'"):
        MultiLevelPPLRewardFunction(MODEL, TOKENIZER, target="reference", reference_tokens="few")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reference_tokens", "hard"], "add --target reference"),
        (
            ["--reference_tokens", "group", "--target", "reference", "--baselines_path", "b.pkl"],
            "leave out --baselines_path",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    args, _ = parse_args(flags)
    with pytest.raises(InputError, match=words):
        reward_settings(args)


def test_baselines_are_of_the_same_tokens_and_those_made_before_there_was_a_choice_of_all():
    def expected(tokens):
        options = {} if tokens == "all" else {"reference_tokens": tokens}
        return MultiLevelPPLRewardFunction(MODEL, toys.byte_level(), target="reference", **options).identity

    def made(tokens):
        return Baselines({"a": levels(9.0)}, expected(tokens), "b.pkl")

    check_meta(made("hard"), expected("hard"))
    with pytest.raises(BaselineError, match=r"reference_tokens all.*has reference_tokens hard.*tokens hard"):
        check_meta(made("all"), expected("hard"))
    with pytest.raises(BaselineError, match=r"reference_tokens hard.*has reference_tokens all"):
        check_meta(made("hard"), expected("all"))
    old = expected("all")
    del old["definitions"]["reference_tokens"]
    check_meta(Baselines({"a": levels(9.0)}, old, "b.pkl"), expected("all"))
    with pytest.raises(BaselineError, match="reference_tokens all"):
        check_meta(Baselines({"a": levels(9.0)}, old, "b.pkl"), expected("hard"))
