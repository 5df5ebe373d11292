"""What a run says before its first step, how often it logs, and what --dry_run shows of that step."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from training_runs import EXAMPLES, log_history, train
from transformers import TrainerState

from mlppl.training.preview import batch_in_words
from mlppl.training.settings import grpo_config, plan_batches
from train_grpo_multilevel_unsloth import parse_args

RUN = [
    *("--max_samples", "20", "--heldout_samples", "2", "--max_new_tokens", "12", "--no_unsloth", "--no-load_in_4bit"),
    *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_steps", "2"),
]
NUMBER = r"(-?[\d.]+)"


def block(printed: str) -> list[str]:
    """The lines that say what the run will do, each with those that it was wrapped to."""
    found = re.search(r"^This run\n((?:  .*\n)+)", printed, flags=re.MULTILINE)[1]
    assert max(len(line) for line in found.splitlines() if "/" not in line) <= 100
    return re.sub(r"\n    +", " ", found).strip().split("\n  ")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the folder, what a dry run printed, what the same run printed then)"""
    folder = tmp_path_factory.mktemp("runs")
    place = ["--output_dir", folder / "out", "--save_steps", "1"]
    dry = train(*RUN, *place, "--dry_run", "--wandb_project", "ppl", "--eval_split", "test[:4]", WANDB_MODE="offline",
                WANDB_DIR=str(folder)).stdout  # fmt: skip
    assert list(folder.iterdir()) == []
    return folder / "out", dry, train(*RUN, *place).stdout


def test_a_dry_run_shows_the_first_step_of_the_run_and_writes_nothing(runs):
    """The rewards are those that the run itself logs of its first step."""
    out, dry, real = runs
    assert f"Nothing was written to {out}" in dry and "Means over" not in dry
    first, *_ = [entry for entry in log_history(out, 2) if "reward" in entry]
    assert first["step"] == 1  # a run of two steps logs each
    form = rf"reward {NUMBER}, loop_penalty {NUMBER}, word \+?{NUMBER} %, phrase \+?{NUMBER} %, sentence \+?{NUMBER} %"
    mean, deviation = (re.search(rf"^  {name}: {form}", dry, flags=re.MULTILINE) for name in ("mean", "spread"))
    names = ("reward", "rewards/loop_penalty/mean", "reward_word", "reward_phrase", "reward_sentence")
    weights = (1, 20, 1, 1, 1)
    expected = [weight * first[name] for name, weight in zip(names, weights, strict=True)]
    assert list(map(float, mean.groups())) == pytest.approx(expected, abs=0.051)
    assert float(mean[1]) == pytest.approx(first["reward"], abs=6e-4)
    assert float(deviation[1]) == pytest.approx(first["reward_std"], abs=6e-4)
    rewards = [float(one) for one in re.findall(rf"^  reward {NUMBER}", dry, flags=re.MULTILINE)]
    assert len(rewards) == dry.count("    wrote: ") == 8 and dry.count("\nPrompt ") == 2
    for start, spread in zip((0, 4), re.findall(rf"spread of these rewards: {NUMBER}", dry), strict=True):
        assert float(spread) == pytest.approx(torch.tensor(rewards[start : start + 4]).std().item(), abs=1e-3)
    assert f"groups without spread, from which nothing is learned: {2 * first['frac_reward_zero_std']:.0f} of 2" in dry
    assert [line for line in block(dry) if line[:4] != "Rows"] == [line for line in block(real) if line[:4] != "Rows"]
    assert "Rows: 18 to train on, 2 held out, 4 evaluated while training" in block(dry)


def test_what_a_run_will_do_is_said_before_its_first_step(runs):
    out, _, printed = runs
    data, columns, policy, completion, *others = block(printed)
    assert data == "Data: tiny-stories, split train"
    assert columns == "Columns: prompt has the prompts, completion the completions"
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:20]
    [story] = [one for one in stories if policy == f'The policy reads: "<|bos|>{one["prompt"]}"']
    shown = re.fullmatch(r'Its completion in the data: "(.*)"', completion)[1]
    start, end = shown.split(" [...] ")
    assert len(start) == len(end) == 140 and story["completion"].startswith(start) and story["completion"].endswith(end)
    assert others == [
        "Rows: 18 to train on, 2 held out",
        "A step: 2 prompts, 4 completions of each, of at most 12 tokens",
        "Steps: 2, a log line at each step; how long they take is said after the first one",
        f"Checkpoints: {out / 'checkpoint-N'}, at each step and at the end",
        f"Report, kept up to date: {out / 'report.html'}",
    ]
    told = re.search(r"Step 1 took (\S+ \S+): 2 steps take about (\S+ \S+), beside evaluations", printed)
    assert told and printed.index("This run") < told.start() < printed.index("step 2: reward")


def test_a_chat_and_its_reference_are_shown_as_the_models_read_them(tmp_path):
    """Of a data set without spread in its rewards the remedy is named, as after twenty steps."""
    rows = [
        {"text": f"The fox number {n} ran home. It was late. Then it\nslept. It was a long night."} for n in range(8)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    printed = train(
        "--dataset_name", tmp_path / "rows.json", "--prompt_sentences", "2", "--chat", "--chat_template_path",
        tmp_path / "chat.jinja", "--target", "reference", "--template", "{prompt}Plan: {completion}\n{reference}",
        "--reward_thresholds", "1e6:1", "--heldout_samples", "2", "--max_new_tokens", "4", "--no_unsloth",
        "--no-load_in_4bit", "--output_dir", tmp_path / "out", "--dry_run",
    ).stdout  # fmt: skip
    _, columns, policy, scorer, reference, *_ = block(printed)
    assert columns == "Columns: of text the first 2 sentences are prompts, the rest references"
    found = re.fullmatch(
        r'The policy reads: "(\[user\] The fox number \d ran home\. It was late\.\\n\[assistant\] )"', policy
    )
    assert scorer == f'The scorer reads: "{found[1]}Plan: {{completion}}\\n"'
    assert reference == r'and scores: " Then it\nslept. It was a long night."'
    assert "In this step 100% of the groups had no spread: GRPO learns nothing. ALL ZERO: 100% of the" in " ".join(
        printed.split()
    )
    assert "groups without spread, from which nothing is learned: 1 of 1" in printed


def test_the_completions_of_a_batch_by_hand():
    """Two groups of two: rewards 1 and 1 - 2 x 0.5 = 0, one skipped and one blank, which has no improvement."""
    nan = float("nan")
    table = {
        "prompt": ["a", "a", [{"role": "user", "content": "b"}], [{"role": "user", "content": "b"}]],
        "completion": ["x", "y\n", [{"role": "assistant", "content": "z"}], ""],
        "rewards": {"multi_level_ppl": [1.0, 1.0, nan, 0.25], "brevity": [0.0, -0.5, nan, 0.0]},
        "extra": {"reward_word": [10.0, 20.0, nan, 0.0], "ppl/word": [9.0, 8.0, 7.0, None], "mine": ["a"] * 4},
    }
    weights, args = torch.tensor([1.0, 2.0]), SimpleNamespace(num_generations=2)
    trainer = SimpleNamespace(_logs=table, reward_weights=weights, args=args)
    nested = batch_in_words(trainer, nested=True)
    assert "word +0.11 nats\n" in nested and "word +0.22 nats\n" in nested  # -ln 0.9 and -ln 0.8
    printed = batch_in_words(trainer, nested=False)
    assert printed.strip().splitlines() == [
        'Prompt 1: "a"',
        "  reward 1.000, brevity 0.000, word +10.0 %",
        '    wrote: "x"',
        "  reward 0.000, brevity -1.000, word +20.0 %",
        r'    wrote: "y\n"',
        "  spread of these rewards: 0.707",
        "",
        'Prompt 2: "b"',
        "  reward none, brevity none, word none",
        '    wrote: "z"',
        "  reward 0.250, brevity 0.000, word none",
        '    wrote: ""',
        "  spread of these rewards: none",
        "",
        "All 4 completions of 2 prompts; a spread is a standard deviation",
        "  mean: reward 0.417, brevity -0.333, word +15.0 %",
        "  spread: reward 0.520, brevity 0.577, word 7.1 %",
        "  groups without spread, from which nothing is learned: 1 of 2",
    ]


@pytest.mark.parametrize(
    ("steps", "words", "lines"),
    [
        (1, [], 1),
        (3, [], 3),
        (20, [], 20),
        (50, [], 16),
        (100, [], 20),
        (2000, [], 20),
        (100, ["--logging_steps", "7"], 14),
    ],
)
def test_a_run_logs_about_twenty_times_unless_told_otherwise(tmp_path, steps, words, lines):
    args, rest = parse_args([*words, "--max_steps", str(steps), "--output_dir", str(tmp_path)])
    state = TrainerState()
    state.compute_steps(grpo_config(args, rest, plan_batches(4, None, None))[0], steps)
    assert steps // state.logging_steps == lines
