"""`test_multilevel_ppl_trl.py`: the documented report, and that each of its checks can fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import brute_force
import pytest
import toys
from tokenizers import models
from torch.nn.functional import dropout
from transformers import PreTrainedTokenizerFast
from waiting import PATIENCE

import test_multilevel_ppl_trl as script
from mlppl.errors import InputError
from mlppl.models import check_vocabulary, load_model
from mlppl.reward import function, terms
from mlppl.reward.function import MultiLevelPPLRewardFunction
from mlppl.scoring.calculator import MultiLevelPPLCalculator
from mlppl.scoring.surprisal import Head

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
NUMBER = r"[\d.]+e[+-]\d\d"
REPORT = rf"""Multi-Level PPL Reward Function Test \(TRL\)
============================================================
Model: tiny-stories
Device: cpu

Loading model\.\.\.
Model loaded!

Testing Multi-Level PPL Calculator
============================================================

Test text: The quick brown fox jumps over the lazy dog\.\.\.

Results:
  Word-level PPL:     (\d+\.\d{{4}})
  Phrase-level PPL:   (\d+\.\d{{4}})
  Sentence-level PPL: (\d+\.\d{{4}})

Checks:
  ✓ batch equals one by one \(largest relative difference {NUMBER}\)
  ✓ fast path equals brute-force log-softmax \(largest relative difference {NUMBER}\)
  ✓ units partition the tokens \(\d+ tokens of 5 texts\)
  ✓ rewards on known baselines \(0\.05 % → 0\.2, 0\.5 % → 0\.5, 1 % → 0\.7, 2 % → 0\.9, 3 % → 1\)
  ✓ TRL's calling convention \(text, 7 metrics\)

✓ All tests passed!
"""
NAMES = list(script.CHECKS)


@pytest.fixture
def check(capsys, monkeypatch):
    """Runs the script on a model in memory: (exit code, {check: "✓" or "✗"}, {check: what is said of it})."""

    def run(model, tokenizer, *flags):
        monkeypatch.setattr("mlppl.models.load_model", lambda *_, **__: (model, tokenizer, None))
        code = script.main(["--device", "cpu", *flags])
        found = re.findall(r"^  ([✓✗]) (.*?)(?: \(|: )(.*)$", capsys.readouterr().out, re.MULTILINE)
        return code, {name: mark for mark, name, _ in found}, {name: said for _, name, said in found}

    return run


# --- the report ------------------------------------------------------------------------------------------------------


def test_it_prints_the_documented_report_and_the_numbers_of_brute_force():
    done = subprocess.run(
        [sys.executable, "test_multilevel_ppl_trl.py", "--model_name", "tiny-stories", "--device", "cpu"],
        cwd=EXAMPLES, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = re.fullmatch(REPORT, done.stdout)
    assert report, done.stdout
    model, tokenizer, _ = load_model("tiny-stories")
    expected = brute_force.all_levels(model, tokenizer, script.TEXT)
    printed = dict(zip(("word", "phrase", "sentence"), map(float, report.groups()), strict=True))
    assert printed == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", toys.TOKENIZERS)
def test_it_passes_with_every_kind_of_tokenizer(check, kind):
    code, marks, _ = check(toys.llama(), toys.TOKENIZERS[kind]())
    assert (code, marks) == (0, dict.fromkeys(NAMES, "✓"))


def test_with_a_chat_template_chat_messages_are_tried_too(check):
    code, _, said = check(toys.gpt2(), toys.byte_level(chat=True))
    assert code == 0 and said["TRL's calling convention"] == "text and chat messages, 7 metrics)"


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--dtype", "float16"], ["--load_in_4bit"]])
def test_it_passes_in_half_precision_and_in_4_bit(flags, tmp_path, capsys):
    toys.llama().save_pretrained(tmp_path)
    toys.byte_level().save_pretrained(tmp_path)
    assert script.main(["--model_name", str(tmp_path), "--device", "cpu", *flags]) == 0
    assert capsys.readouterr().out.endswith("✓ All tests passed!\n")


def test_tolerances_are_those_stated():
    assert script.tolerance(toys.llama()) == 1e-4
    assert script.tolerance(toys.llama().half()) == 1e-2
    assert script.tolerance(toys.llama().bfloat16()) == 5e-2


def test_a_model_that_cannot_be_loaded_is_bad_input_and_no_failed_check(capsys, tmp_path):
    assert script.main(["--model_name", str(tmp_path / "none")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "does not exist" in line


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_when_it_is_loaded(tmp_path, capsys, special):
    toys.llama().save_pretrained(tmp_path)
    toys.with_tokens(116, special).save_pretrained(tmp_path)
    assert max(load_model(str(tmp_path))[1].get_vocab().values()) == 511  # as many as there are rows
    toys.with_tokens(117, special).save_pretrained(tmp_path)
    assert script.main(["--model_name", str(tmp_path), "--device", "cpu"]) == 2
    output, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "'<more 116>' is number 512, and the embedding has rows for 0 to 511" in lines[0]
    assert "All tests passed" not in output


def test_the_highest_id_counts_and_not_how_many_tokens_there_are(check):
    tokenizer = toys.whole_words()
    tokenizer.backend_tokenizer.model = models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "fox": 512}, "<unk>")
    code, marks, said = check(toys.llama(), tokenizer)
    assert code == 1 and marks["units partition the tokens"] == "✗"
    assert "'fox' is number 512" in said["units partition the tokens"]


def test_a_placeholder_for_an_image_needs_no_row():
    """Gemma 3's text models have 262,144 rows, and <image_soft_token> is number 262,144."""
    backend, options = toys.with_tokens(116).backend_tokenizer, {"eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=["<sound>"], **options)
    with pytest.raises(InputError, match="'<sound>' is number 512"):
        check_vocabulary(toys.llama(), tokenizer, "toy")
    backend, extra = toys.with_tokens(116).backend_tokenizer, {"image_token": "<image_soft_token>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **options)
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == 512
    check_vocabulary(toys.llama(), tokenizer, "toy")


def test_pytest_collects_nothing_from_it():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--noconftest"]
    done = subprocess.run(
        [*command, "rl_training/examples/test_multilevel_ppl_trl.py"],
        cwd=EXAMPLES.parent.parent, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert "no tests collected" in done.stdout and done.returncode == 5


# --- faults: the check that must see it fails with its numbers, and the others still run ------------------------------


def failed(marks: dict[str, str]) -> list[str]:
    assert list(marks) == NAMES
    return [name for name, mark in marks.items() if mark == "✗"]


def test_dropout_that_stays_on_makes_a_batch_differ_from_its_texts(check):
    model = toys.llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, made: dropout(made, 0.3, training=True))
    code, marks, said = check(model, toys.byte_level())
    assert code == 1
    assert {"batch equals one by one", "fast path equals brute-force log-softmax"} <= set(failed(marks))
    said = re.fullmatch(
        rf"largest relative difference ({NUMBER}), allowed 1e-04, at the \w+ level of .+: [\d.]+ against [\d.]+",
        said["batch equals one by one"],
    )
    assert said and float(said[1]) > 1e-3


def test_a_number_that_depends_on_the_batch_is_seen(check, monkeypatch):
    right = MultiLevelPPLCalculator.score_pairs
    wrong = lambda self, model, pairs: right(self, model, pairs) * (1.001 if len(pairs) > 1 else 1)  # noqa: E731
    monkeypatch.setattr(MultiLevelPPLCalculator, "score_pairs", wrong)
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert code == 1 and failed(marks)[0] == "batch equals one by one"
    assert said["batch equals one by one"].startswith("largest relative difference 1.0e-03, allowed 1e-04")
    assert marks["fast path equals brute-force log-softmax"] == "✓"


def test_a_wrong_log_softmax_is_seen_by_brute_force_alone(check, monkeypatch):
    right = Head.surprisal
    monkeypatch.setattr(Head, "surprisal", lambda self, *given: right(self, *given) + 0.01)
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert (code, failed(marks)) == (1, ["fast path equals brute-force log-softmax"])
    # 0.01 nats more a token: exp(0.01) - 1 = 1.005 %
    assert said["fast path equals brute-force log-softmax"].startswith("largest relative difference 1.0e-02")


def test_a_unit_that_is_lost_is_seen(check, monkeypatch):
    right = MultiLevelPPLCalculator.explain

    def wrong(self, *given, **named):
        explained = right(self, *given, **named)
        explained["phrase"] = explained["phrase"][:-1] if len(explained["phrase"]) > 1 else explained["phrase"]
        return explained

    monkeypatch.setattr(MultiLevelPPLCalculator, "explain", wrong)
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert code == 1 and "units partition the tokens" in failed(marks)
    assert re.search(r"the phrases of '.*' hold \d+ tokens, expected \d+", said["units partition the tokens"])


def test_a_surprisal_counted_twice_is_seen(check, monkeypatch):
    right = MultiLevelPPLCalculator.explain

    def wrong(self, *given, **named):
        explained = right(self, *given, **named)
        explained["sentence"][0]["surprisal"] += 0.5
        return explained

    monkeypatch.setattr(MultiLevelPPLCalculator, "explain", wrong)
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert (code, failed(marks)) == (1, ["units partition the tokens"])
    assert "expected the same at each level" in said["units partition the tokens"]


def test_a_threshold_that_must_be_exceeded_is_seen(check, monkeypatch):
    right = terms.threshold_rewards
    monkeypatch.setattr(terms, "threshold_rewards", lambda improvement, points: right(improvement - 1e-6, points))
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert (code, failed(marks)) == (1, ["rewards on known baselines"])
    assert said["rewards on known baselines"] == "an improvement of 0.05 % got the reward 0, expected 0.2"


@pytest.mark.parametrize(
    "fault, said",
    [
        (lambda rewards: tuple(rewards), r"the list \[1.0, 1.0, 0.0, None\]"),
        (lambda rewards: rewards[:3], r"the rewards are \[1.0, 1.0, 0.0\]"),
        (lambda rewards: [1, *rewards[1:]], r"the rewards are \[1, 1.0, 0.0, None\]"),
        (lambda rewards: [*rewards[:3], float("nan")], r"the rewards are \[1.0, 1.0, 0.0, nan\]"),
    ],
)
def test_a_reward_that_trl_could_not_take_is_seen(check, monkeypatch, fault, said):
    right = MultiLevelPPLRewardFunction.__call__
    monkeypatch.setattr(
        MultiLevelPPLRewardFunction, "__call__", lambda self, *given, **named: fault(right(self, *given, **named))
    )
    code, marks, found = check(toys.llama(), toys.byte_level())
    assert (code, failed(marks)) == (1, ["TRL's calling convention"])
    assert re.search(said, found["TRL's calling convention"])


def test_a_metric_under_another_name_is_seen(check, monkeypatch):
    monkeypatch.setattr(function, "log", lambda measured, one, levels, log_metric, log_extra: log_metric("ppl", 3.5))
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert (code, failed(marks)) == (1, ["TRL's calling convention"])
    assert "it logged {'ppl': 3.5, 'reward_time': " in said["TRL's calling convention"]


def test_a_check_that_breaks_has_failed_and_debug_shows_where(check, monkeypatch):
    def breaks(model, tokenizer):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(script.CHECKS, "batch equals one by one", breaks)
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert (code, failed(marks)) == (1, ["batch equals one by one"])
    assert said["batch equals one by one"] == "RuntimeError: out of memory"
    with pytest.raises(RuntimeError, match="out of"):
        check(toys.llama(), toys.byte_level(), "--debug")


def test_a_text_that_cannot_be_scored_is_a_failure(check, monkeypatch):
    def breaks(self, model, texts, contexts=None):
        raise FloatingPointError("the model's logits are NaN")

    monkeypatch.setattr(MultiLevelPPLCalculator, "compute_all_levels", breaks)
    code, marks, said = check(toys.llama(), toys.byte_level())
    assert code == 1 and said["it cannot be scored"] == "FloatingPointError: the model's logits are NaN"
    assert marks["units partition the tokens"] == "✓"
