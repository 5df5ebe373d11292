"""The three places of the training script that people edit, edited as their docstrings say, in a copy of it."""

import ast
import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest
import warm
from training_runs import EXAMPLES, SHORT, log_history, refusal

SCRIPT = EXAMPLES / "train_grpo_multilevel_unsloth.py"
QUICK = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "2", "--save_steps", "2"]


def shown_edit(function: str) -> str:
    """The code in the docstring of one of the script's functions."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    lines = ast.get_docstring(node).splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line)).strip()


def edited(folder: Path, old: str, new: str) -> Path:
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / "edited.py").write_text(text.replace(old, new), encoding="utf-8")
    return folder / "edited.py"


def run(script: Path, *flags, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [warm.python(), script, *map(str, flags)],
        cwd=script.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_a_second_reward_has_its_weight_and_its_row(tmp_path):
    code = textwrap.indent(shown_edit("make_rewards"), "    ")
    script = edited(tmp_path, "    return rewards\n", f"{code}\n    return rewards\n")
    flags = [*QUICK, "--output_dir", tmp_path / "out", "--reward_weights", "1", "20", "2"]
    printed = run(script, *flags).stdout
    assert "brevity" in printed
    scores = json.loads((tmp_path / "out" / "heldout.json").read_text())
    for side in ("before", "after"):
        completions = [text for group in scores[side]["completions"] for text in group]
        mean = sum(-len(text.split()) / 100 for text in completions) / len(completions)
        assert scores[side]["scores"]["brevity"] == pytest.approx(2 * mean)
        assert mean < 0
    for entry in (entry for entry in log_history(tmp_path / "out", 2) if "reward" in entry):
        parts = {"multi_level_ppl": 1, "loop_penalty": 20, "brevity": 2}
        total = sum(weight * entry[f"rewards/{name}/mean"] for name, weight in parts.items())
        assert entry["rewards/brevity/mean"] < 0 and entry["reward"] == pytest.approx(total, abs=1e-5)

    last = run(script, *flags[:-1], "--overwrite", code=2).stderr.strip().splitlines()[-1]
    assert "--reward_weights holds 2 number(s), expected 3: of multi_level_ppl, loop_penalty, brevity" in last


def test_an_edited_prompt_never_meets_the_unedited_ones_baseline(tmp_path):
    code = textwrap.indent(shown_edit("prepare_dataset"), "    ")
    script = edited(
        tmp_path,
        "    return prepare_rows(dataset, columns, form)\n\n\ndef make_rewards",
        f"{code}\n\n\ndef make_rewards",
    )
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:20]
    (tmp_path / "rows.json").write_text(json.dumps(stories))
    baselines = [warm.python(), EXAMPLES / "compute_baselines_trl.py", "--dataset_name", tmp_path / "rows.json"]
    subprocess.run(
        [*baselines, "--output_path", tmp_path / "b.pkl", "--output_dataset", tmp_path / "data"],
        check=True, capture_output=True, cwd=EXAMPLES,
    )  # fmt: skip
    flags = [*QUICK, "--output_dir", tmp_path / "out"]
    last = run(script, *flags, "--dataset_name", tmp_path / "rows.json", "--baselines_path", tmp_path / "b.pkl", code=2)
    line = last.stderr.strip().splitlines()[-1]
    assert f"row 0 with the id {stories[0]['id']!r}" in line and line.count(stories[0]["prompt"][:30]) == 2
    # Columns travel with their row, so that nothing else would tell.
    last = run(script, *flags, "--dataset_name", tmp_path / "data", code=2)
    assert "prepare_dataset changed the prompt" in last.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    run(script, *flags)
    held_out = json.loads((tmp_path / "out" / "heldout.json").read_text())
    assert all(prompt.endswith(", and then") for prompt in held_out["before"]["prompts"])


def test_another_trainer(tmp_path):
    text = SCRIPT.read_text(encoding="utf-8")
    old = text[text.index("    from mlppl.training.trainer import Resum") : text.index("\n\n@script")]
    script = edited(tmp_path, old, textwrap.indent(shown_edit("make_trainer"), "    ") + "\n")
    printed = run(script, *QUICK, "--output_dir", tmp_path / "out").stdout
    assert "8 completions of 2 prompts" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_baselines_of_other_prompts_are_refused_before_loading(tmp_path):
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:20]
    record = {"word": 5.0, "phrase": 5.0, "sentence": 5.0}
    (tmp_path / "b.json").write_text(json.dumps({story["id"]: record for story in stories}))
    meta = {"prompt": {"prompt_template": "{prompt}", "chat": False}, "target": "completion", "model": {"name": "m"}}
    (tmp_path / "b.json.meta.json").write_text(json.dumps(meta))
    flags = ["--max_samples", "20", "--baselines_path", tmp_path / "b.json", "--output_dir", tmp_path / "out"]
    line = refusal(*flags, "--prompt_template", "Go on: {prompt}")
    assert "prompt_template {prompt}" in line and "--prompt_template 'Go on: {prompt}'" in line
    assert not (tmp_path / "out").exists()


def test_ids_that_start_anew_in_each_split_are_refused(tmp_path):
    words = ["fox", "girl", "dog", "king", "boat", "tree", "cat", "bird", "boy", "frog"]
    for split, text in {"train": "The {} went to the", "test": "Quantum {} zz"}.items():
        rows = [{"id": index, "prompt": text.format(word), "completion": " sea."} for index, word in enumerate(words)]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    subprocess.run(
        [
            warm.python(), EXAMPLES / "compute_baselines_trl.py", "--dataset_name", tmp_path,
            "--output_path", tmp_path / "b.json",
        ],
        check=True, capture_output=True, cwd=EXAMPLES,
    )  # fmt: skip
    line = refusal(
        "--dataset_name", tmp_path, "--dataset_split", "test", "--baselines_path", tmp_path / "b.json",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    for part in ("row 0 with the id 0", "'Quantum fox zz'", "'The fox went to the'", "ids that start anew"):
        assert part in line
