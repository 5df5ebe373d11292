"""Examples and other rows through the scripts: both draw the same, and what they leave can be read elsewhere."""

import json
import math

import brute_force
import pytest
import yaml
from training_runs import SHORT, log_history, refusal, train

from compute_baselines_trl import main as baselines
from mlppl.data import FIRST, TINY_STORIES, draw, prompt_key, read_shown
from mlppl.errors import InputError
from mlppl.models import load_model
from mlppl.reward.configured import reward_from_config

STORIES = TINY_STORIES / "train.json"
LEVELS = ["--aggregation", "nested", "--levels", "word", "prompt", "examples", "--examples", "1", "--contrast", "2"]
QUICK = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "2", "--save_steps", "2", "--form", "nats"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Baselines of 30 rows, and a run that reads them."""
    folder = tmp_path_factory.mktemp("shown")
    path = folder / "baselines.json"
    assert baselines([*LEVELS, "--num_samples", "30", "--output_path", str(path)]) == 0
    out = folder / "out"
    printed = train(*QUICK, *LEVELS, "--baselines_path", path, "--output_dir", out).stdout
    return path, out, printed


def test_a_baseline_is_that_of_the_row_behind_what_it_is_shown(made):
    path, _, _ = made
    model, tokenizer, _ = load_model("tiny-stories", load_in_4bit=False)
    examples, others = (read_shown(f"{path}.{name}.jsonl") for name in ("examples", "others"))
    assert len(examples) == 1 and 100 < len(others) <= 256
    shown = "".join(f"{prompt} {reference.strip()}\n\n" for prompt, reference in examples)
    records = json.loads(path.read_text())
    stories = json.loads(STORIES.read_text(encoding="utf-8"))
    row = next(row for row in stories if row["id"] in records)
    prompt, text = row["prompt"], row["completion"]
    d, e = (
        math.fsum(nats for _, nats in tokens) / len(tokens)
        for tokens in (brute_force.token_surprisals(model, tokenizer, text, before + prompt) for before in ("", shown))
    )
    assert records[row["id"]]["examples"] == pytest.approx(math.exp(e - d), rel=1e-3)
    assert set(records[row["id"]]) >= {"word", "prompt", "examples"} and "sentence" not in records[row["id"]]


def test_the_run_takes_these_baselines_and_trains_on_no_example(made):
    path, out, printed = made
    heldout = json.loads((out / "heldout.json").read_text())
    scores = heldout["before"]["scores"]
    assert {"prompt PPL", "examples PPL", "word PPL", "found among 2"} <= set(scores) and "sentence PPL" not in scores
    assert "found among 2" in printed
    entry = next(entry for entry in log_history(out, 2) if "reward" in entry)
    assert {"ppl/prompt", "reward_examples"} <= set(entry)
    shown = {prompt_key(prompt) for prompt, _ in read_shown(f"{path}.examples.jsonl")}
    assert not shown & {prompt_key(prompt) for prompt in heldout["before"]["prompts"]}
    page = (out / "report.html").read_text()
    assert "Examples" in page and 'data-level="prompt"' in page


def test_other_examples_are_refused_with_both_named(made):
    path, out, _ = made
    flags = [*LEVELS[:-3], "2", *LEVELS[-2:]]
    assert "examples" in refusal(*QUICK, *flags, "--baselines_path", path, "--output_dir", out.parent / "other")
    assert "levels" in refusal(*QUICK, "--baselines_path", path, "--output_dir", out.parent / "other")


def test_an_engine_reads_the_files_that_lie_beside_the_baselines(made, tmp_path):
    path, _, _ = made
    config = tmp_path / "reward.yaml"
    settings = {
        "model_name": "tiny-stories", "load_in_4bit": False, "baselines": str(path), "aggregation": "nested",
        "levels": ["word", "prompt", "examples"], "contrast": 2, "examples": f"{path}.examples.jsonl",
        "others": f"{path}.others.jsonl", "form": "nats",
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    row = json.loads(STORIES.read_text(encoding="utf-8"))[0]
    rewards = reward_from_config(config)([row["prompt"]] * 2, [row["completion"], " The end."], id=[row["id"]] * 2)
    assert rewards[0] == pytest.approx(0, abs=1e-5) != rewards[1]  # the row's own text is its baseline
    config.write_text(yaml.safe_dump({**settings, "examples": 3}))
    (tmp_path / "other.yaml").write_text(config.read_text())
    with pytest.raises(InputError, match=r"examples is 3, expected the name of the file of rows"):
        reward_from_config(tmp_path / "other.yaml")


def test_rows_are_drawn_by_what_they_say_and_not_by_where_they_stand():
    rows = [(f"Prompt {number}.", f"Text {number}.") for number in range(40)]
    examples, others = draw(rows, 3, 2)
    assert draw(rows[::-1], 3, 2) == (examples, others) and len(others) == 37
    assert draw([*rows, *rows, ("", "x"), ("x", " ")], 3, 2) == (examples, others)
    assert not {prompt for prompt, _ in examples} & {prompt for prompt, _ in others}
    late = [(f"Late {number}.", "Text.") for number in range(5)]
    many = [(f"Row {number}.", "Text.") for number in range(FIRST)]
    assert draw([*many, *late], 3, 0) == draw(many, 3, 0)
    with pytest.raises(InputError, match="--examples 3 and --contrast 2 need rows"):
        draw(rows[:5], 3, 2)


def test_a_file_of_examples_that_is_none_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl 0 is None, expected a string"):
        read_shown(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(InputError, match="expected JSON lines of prompt and reference"):
        read_shown(tmp_path / "rows.jsonl")
    assert "rows.jsonl" in refusal(*QUICK, "--examples", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
