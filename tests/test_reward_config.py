"""The reward as a YAML file describes it: what is refused, and TRL's own command line with it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

import multi_level_ppl_trl
from mlppl.errors import InputError
from mlppl.models import load_model
from mlppl.reward.configured import multi_level_ppl, read_settings, reward_from_config
from multi_level_ppl_trl import MultiLevelPPLRewardFunction

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
ROWS = [
    {"prompt": row["prompt"], "reference": row["completion"]}
    for row in json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:8]
]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes the file that PPL_REWARD_CONFIG names."""

    def write(text: str) -> Path:
        path = tmp_path / "reward.yaml"
        path.write_text(text)
        monkeypatch.setenv("PPL_REWARD_CONFIG", str(path))
        return path

    return write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target: reference", ["model_name"]),
        ("- a list", ["name: value", "'a list'"]),
        ("model_name: [unclosed", ["expected a YAML file"]),
        (
            "model_name: tiny-stories\nreward_treshold: [[1, 1]]",
            ["'reward_treshold'", "did you mean reward_thresholds?"],
        ),
        ("model_name: tiny-stories\nnormalise: true", ["did you mean normalize?"]),
        ("model_name: tiny-stories\nxyz: true", ["'xyz'", "expected one of model_name"]),
        ("model_name: tiny-stories\nload_in_4bit: 'no'", ["load_in_4bit is 'no'", "true or false"]),
        ("model_name: tiny-stories\ndtype: float8", ["float8", "bfloat16"]),
        ("model_name: tiny-stories\nweights: [1, 2]", ["(1, 2)", "(word, phrase, sentence)"]),
        ("model_name: tiny-stories\nreward_thresholds: [[1, 0.5], [1, 0.7]]", ["1 % twice"]),
        ("model_name: tiny-stories\nreward_thresholds: 3", ["reward.yaml"]),
        ("model_name: tiny-stories\nbaselines: none.pkl", ["none.pkl", "compute_baselines_trl.py"]),
        ("model_name: tiny-stories\nchat_template_path: none.jinja", ["none.jinja", "a chat template in Jinja"]),
        ("model_name: ./nowhere", ["nowhere", "does not exist"]),
        ("model_name: tiny-stories\nexamples: '1'", ["examples is '1'", "the name of the file of rows"]),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_before_a_model_is_loaded(config, text, words):
    config(text)
    with pytest.raises(InputError) as refused:
        read_settings()
    for word in words:
        assert word in str(refused.value)


def test_without_the_variable_or_the_file_it_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("PPL_REWARD_CONFIG", raising=False)
    with pytest.raises(InputError, match="PPL_REWARD_CONFIG is not set"):
        reward_from_config()
    monkeypatch.setenv("PPL_REWARD_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"none\.yaml.*expected a YAML file"):
        multi_level_ppl(["a"], ["b"])


def test_the_file_gives_the_reward_that_its_settings_give(config):
    path = config(
        "model_name: tiny-stories\ntarget: reference\nweights: [0, 0, 1]\nform: nats\nmax_phrase_words: 3\nbaselines:\n"
    )
    columns = {name: [row[name] for row in ROWS] for name in ("prompt", "reference")}
    model, tokenizer, _ = load_model("tiny-stories")
    direct = MultiLevelPPLRewardFunction(
        model, tokenizer, target="reference", weights=(0, 0, 1), form="nats", max_phrase_words=3,
    )  # fmt: skip
    completions = [" So it went."] * len(ROWS)
    expected = direct(columns["prompt"], completions, reference=columns["reference"])
    assert multi_level_ppl(columns["prompt"], completions, reference=columns["reference"]) == pytest.approx(expected)
    assert len(set(expected)) > 3 and max(map(abs, expected)) < 0.5
    assert reward_from_config() is reward_from_config(path)


def test_paths_are_relative_to_the_file(config, tmp_path, monkeypatch):
    (tmp_path / "baselines.json").write_text(json.dumps({"a": {"word": 5.0, "phrase": 5.0, "sentence": 5.0}}))
    config("model_name: tiny-stories\nbaselines: baselines.json\nreward_thresholds: [[-1000000, 0.25]]")
    monkeypatch.chdir("/")
    assert multi_level_ppl(["a"], [" fox"]) == [0.25]


def test_trl_trains_with_it_from_its_own_command_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text("\n".join(map(json.dumps, ROWS)))
    linear = [[percent / 20, (percent / 20 + 100) / 200] for percent in range(-2000, 2001)]
    settings = {"model_name": "tiny-stories", "target": "reference", "reward_thresholds": linear}
    (tmp_path / "reward.yaml").write_text(json.dumps(settings))
    out = tmp_path / "out"
    done = subprocess.run(
        [
            Path(sys.executable).parent / "trl", "grpo", "--model_name_or_path", "tiny_stories",
            "--dataset_name", tmp_path / "data", "--reward_funcs", "multi_level_ppl_trl.multi_level_ppl",
            "--output_dir", out, "--max_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--use_peft",
            "--lora_target_modules", "all-linear", "--learning_rate", "1e-3", "--max_completion_length", "8",
            "--per_device_train_batch_size", "4", "--num_generations", "4", "--report_to", "none", "--use_cpu",
        ],
        cwd=EXAMPLES, env={**os.environ, "PPL_REWARD_CONFIG": str(tmp_path / "reward.yaml")},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "reward" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["rewards/multi_level_ppl/mean"] == pytest.approx(entry["reward"])
        # The reward is linear in the improvement, in steps of 0.05 %, so its mean is that of the three levels.
        improvement = 0.2 * entry["reward_word"] + 0.3 * entry["reward_phrase"] + 0.5 * entry["reward_sentence"]
        assert entry["reward"] == pytest.approx((improvement + 100) / 200, abs=3e-4)
        assert entry["reward_std"] > 0 and math.isfinite(entry["ppl/word"])


def test_a_typo_is_told_when_trl_looks_the_reward_up(config):
    config("model_name: tiny-stories\nweight: [1, 1, 1]")
    with pytest.raises(InputError, match=r"unknown setting 'weight', did you mean weights\?"):
        multi_level_ppl_trl.multi_level_ppl  # noqa: B018
    config("model_name: tiny-stories\nweights: [1, 1, 1]")
    assert multi_level_ppl_trl.multi_level_ppl is multi_level_ppl
