"""With a reference as target: the part of a completion that counts, the template, and what both do to the numbers."""

from pathlib import Path

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from mlppl.baselines.file import Baselines
from mlppl.config import ReferenceContext
from mlppl.errors import BaselineError, InputError
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.scoring.calculator import MultiLevelPPLCalculator

DOCUMENTED = r".*In summary[:,]\s*(.*?)\s*$"
PLAN = "Let me think.\nIn summary: the fox runs\nhome."


@pytest.mark.parametrize(
    ("pattern", "part", "matched"),
    [
        (None, PLAN, True),
        ("In summary:(.*)", " the fox runs\nhome.", True),
        (DOCUMENTED, "the fox runs\nhome.", True),
        ("summary: the fox", "summary: the fox", True),
        ("(?:plan|summary): (?<it>the)", "the", True),
        ("<answer>(.*)</answer>", PLAN, False),
        ("think(?:(ing)|.)", "", True),  # a group that takes no part in the match
    ],
)
def test_the_first_group_counts_or_the_match_or_all(pattern, part, matched):
    assert ReferenceContext(pattern).extracted(PLAN) == (part, matched)


@pytest.mark.parametrize(
    ("completion", "part"),
    [
        ("In summary: no.\nBut wait. In summary, the fox\nruns home. \n", "the fox\nruns home."),
        ("In summary: yes. In summary:", ""),
        ("in summary: said nobody", "in summary: said nobody"),
    ],
)
def test_the_documented_expression_takes_what_vr_cli_takes(completion, part):
    """What follows the last of them, stripped; without one the whole."""
    assert ReferenceContext(DOCUMENTED).extracted(completion)[0] == part
    guide = (Path(__file__).parent.parent / "MULTILEVEL_PPL_GUIDE.md").read_text(encoding="utf-8")
    assert f'--extract "{DOCUMENTED}"' in guide


def test_a_pattern_that_tries_too_many_ways_is_named():
    with pytest.raises(InputError, match=r"takes more than 2 s for one completion"):
        ReferenceContext("(?:(?:a|aa)+)+c").extracted("a" * 80)


@given(*[st.text(alphabet="ab{}\n é", max_size=5)] * 3)
def test_the_template_changes_nothing_but_what_stands_between(prompt, completion, between):
    doubled = between.replace("{", "{{").replace("}", "}}")
    joined = ReferenceContext(template="{prompt}" + doubled + "{completion}{{{reference}")
    assert joined.context(prompt, completion) == prompt + between + completion + "{"
    assert ReferenceContext().context(prompt, completion) == prompt + completion


@pytest.mark.parametrize(
    "template",
    ["", "{prompt}{reference}", "{completion}{prompt}{reference}", "{prompt}{completion}{reference}!", "{prompt",
     "{prompt!r}{completion}{reference}", "{prompt}{completion}{reference:>9}", "{0}{completion}{reference}",
     "{prompt.x}{completion}{reference}"],
)  # fmt: skip
def test_a_template_that_is_none_is_refused(template):
    with pytest.raises(InputError, match="template is"):
        ReferenceContext(template=template)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"extract is '\(', expected a regular expression"):
        ReferenceContext("(")


TEMPLATE = "{prompt}\nPlan:{completion}\n{reference}"


def test_the_reference_is_scored_behind_the_template_and_its_baseline_behind_an_empty_plan(model, tokenizer):
    reward_fn = MultiLevelPPLRewardFunction(
        model, tokenizer, target="reference", extract="In summary:(.*)", template=TEMPLATE
    )
    texts = [PLAN, "No plan at all."]
    references = ["The fox was home.", "It slept."]
    _, details = reward_fn.compute_rewards(texts, prompts=["Once"] * 2, references=references, return_details=True)
    calculator = MultiLevelPPLCalculator(tokenizer)
    contexts = ["Once\nPlan: the fox runs\nhome.\n", "Once\nPlan:No plan at all.\n"]
    current = calculator.compute_all_levels(model, references, contexts)
    baseline = calculator.compute_all_levels(model, references, ["Once\nPlan:\n"] * 2)
    for level in ("word", "phrase", "sentence"):
        torch.testing.assert_close(details["ppls"][level], current[level], rtol=1e-5, atol=0)
        torch.testing.assert_close(details["baselines"][level], baseline[level], rtol=1e-5, atol=0)


def test_completions_without_a_match_are_counted(model, tokenizer):
    reward_fn = MultiLevelPPLRewardFunction(model, tokenizer, target="reference", extract="In summary:(.*)")
    logged = {}
    reward_fn(
        prompts=["Once"] * 4, completions=[PLAN, "a", "b", PLAN], reference=["The end."] * 4,
        log_metric=lambda name, value: logged.update({name: value}),
    )  # fmt: skip
    assert logged["diagnostics/not_extracted"] == 0.5


@pytest.mark.parametrize("options", [{"extract": "a"}, {"template": TEMPLATE}])
def test_both_need_a_reference(model, tokenizer, options):
    with pytest.raises(InputError, match="need target='reference'"):
        MultiLevelPPLRewardFunction(model, tokenizer, **options)


@pytest.mark.parametrize(
    ("made", "asked", "words"),
    [
        ({"target": "completion"}, {"target": "reference"}, ["target completion", "--target reference"]),
        ({"target": "reference"}, {"target": "completion"}, ["target reference", "has target completion"]),
        ({"target": "reference"}, {"target": "reference", "template": TEMPLATE}, ["template", "--template"]),
    ],
)
def test_baselines_of_another_target_or_template_are_refused(tokenizer, made, asked, words):
    model = toys.llama()
    meta = MultiLevelPPLRewardFunction(model, tokenizer, **made).identity
    baselines = Baselines({"a": {"word": 2.0, "phrase": 2.0, "sentence": 2.0}}, meta, "b.pkl")
    MultiLevelPPLRewardFunction(model, tokenizer, baselines, **made)
    with pytest.raises(BaselineError) as refused:
        MultiLevelPPLRewardFunction(model, tokenizer, baselines, **asked)
    for word in words:
        assert word in str(refused.value)
