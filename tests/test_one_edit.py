"""A new nested level, and a new setting with its flag, are one edit in one file each: made here in a copy of the code.
(A new reward is: test_script_seams.py.)"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from training_runs import EXAMPLES


def edited(folder, old: str, new: str):
    """The scripts in a folder of their own, config.py with an edit."""
    copy = folder / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("__pycache__", "output*", "*.ipynb"))
    config = copy / "mlppl" / "config.py"
    text = config.read_text(encoding="utf-8")
    assert text.count(old) == 1
    config.write_text(text.replace(old, new), encoding="utf-8")
    return copy


def python(copy, code: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_new_nested_level(tmp_path):
    """What a title adds to a text behind its prompt: known to calculator, reward, flags, baselines, page and plot."""
    old = '    "prompt": Level('
    new = '    "title": Level("#999999", lambda contexts, own: ["A fable. " + own]),\n' + old
    copy = edited(tmp_path, old, new)
    found = python(copy, """
import json, math
from pathlib import Path
import multi_level_ppl_trl as project
from mlppl.models import load_model
from mlppl.pages.run import plot_training
from train_grpo_multilevel_unsloth import parse_args
model, tokenizer, _ = load_model("tiny-stories", load_in_4bit=False)
options = {"aggregation": "nested", "levels": ["word", "title"]}
whole = {name: project.MultiLevelPPLCalculator(tokenizer, aggregation="nested").compute_all_levels(
    model, " It ran home.", prompt) for name, prompt in (("plain", "The fox."), ("titled", "A fable. The fox."))}
ordinary = {name: math.prod(levels.values()) for name, levels in whole.items()}
levels = project.MultiLevelPPLCalculator(tokenizer, **options).compute_all_levels(model, " It ran home.", "The fox.")
reward = project.MultiLevelPPLRewardFunction(model, tokenizer, **options)
details = reward.compute_rewards([" It ran home."], ["The fox."], return_details=True)[1]
flags = parse_args(["--aggregation", "nested", "--levels", "word", "title"])[0]
plot_training([{"step": 1, "reward": 1.0, "reward_title": 1.0}], Path("reward.png"), nested=True)
print(json.dumps([levels["title"], ordinary["titled"] / ordinary["plain"], details["ppls"]["title"].item(),
                  list(flags.levels), list(reward.identity["definitions"]["levels"]), reward.nested_names["title"]]))
""")  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-5) == found[2] != 1
    assert found[3:] == [["word", "title"], ["word", "title"], "helped by title"]


def test_a_new_setting_and_its_flag(tmp_path):
    old = "    normalize: bool = field(default=False)"
    new = '    patience: int = _setting("training", 3, "a new setting", type=int)\n' + old
    copy = edited(tmp_path, old, new)
    found = python(copy, """
import json, subprocess, sys
from pathlib import Path
from mlppl.reward.configured import NAMES
from train_grpo_multilevel_unsloth import parse_args
from mlppl import cli
Path("run.yaml").write_text("patience: 5\\n")
flags = ([], ["--patience", "4"], ["--config", "run.yaml"])
asked = [cli.reward_config(parse_args(words)[0]).patience for words in flags]
help = subprocess.run([sys.executable, "train_grpo_multilevel_unsloth.py", "--help"], capture_output=True, text=True)
print(json.dumps([asked, "--patience" in help.stdout, "patience" in NAMES]))
""")  # fmt: skip
    assert found == [[3, 4, 5], True, True]
