"""The training script as its users run it: real Unsloth 4-bit, real TRL, the embedded model."""

import base64
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from chromium import Chromium
from training_runs import EXAMPLES, SHORT, log_history, refusal, staircase, train

from mlppl.config import LEVELS

STEPS = 6


@pytest.fixture(scope="module")
def baselines(tmp_path_factory) -> Path:
    """Baselines of the first 20 training stories: half the perplexity the model reaches, or eight times it."""
    path = tmp_path_factory.mktemp("baselines") / "baselines.json"
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:20]
    levels = ({"word": 5.0, "phrase": 5.0, "sentence": 5.0}, {"word": 240.0, "phrase": 240.0, "sentence": 240.0})
    path.write_text(json.dumps({story["id"]: levels[index % 2] for index, story in enumerate(stories)}))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, baselines):
    """A run of six steps, with W&B offline."""
    output = tmp_path_factory.mktemp("run")
    done = train(
        *SHORT, "--output_dir", output / "out", "--baselines_path", baselines,
        "--max_steps", STEPS, "--save_steps", STEPS,
        "--learning_rate", "1e-3", "--warmup_steps", "1", "--lr_scheduler_type", "cosine", "--wandb_project", "ppl",
        "--eval_split", "train[8:10]", "--eval_steps", STEPS, *staircase(0, 100, 1),
        python=sys.executable, WANDB_MODE="offline", WANDB_DIR=str(output), WANDB_SILENT="true",
    )  # fmt: skip
    return output, done.stdout


def test_it_trains_a_real_4bit_unsloth_model(trained):
    _, printed = trained
    assert "4-bit = True" in printed and "Training with Unsloth" in printed


def test_the_adapter_it_saves_loads_and_has_learned(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = trained[0] / "out"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny_stories"), out)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, len(config.target_modules)) == (16, 16, 0, 7)
    moved = [p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name]  # lora_B starts at 0
    assert len(moved) == 3 * 7 and max(moved) > 0
    assert AutoTokenizer.from_pretrained(out).bos_token == "<|bos|>"


def test_its_rewards_are_those_of_the_thresholds(trained):
    logs = [entry for entry in log_history(trained[0] / "out", STEPS) if "reward" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6]
    scored = 0
    for entry in logs:
        # One prompt a step: its baseline is 5, which no completion reaches, or 240, which nearly every one does.
        average = 0.2 * entry["reward_word"] + 0.3 * entry["reward_phrase"] + 0.5 * entry["reward_sentence"]
        found = entry["rewards/multi_level_ppl/mean"]
        if entry["reward_word"] < 0:
            assert found == 0
        elif not entry["diagnostics/at_zero"]:
            assert average / 100 - 0.01 < found < average / 100 + 1e-5
            scored += 1
    assert 0 < scored < STEPS


def test_it_says_how_held_out_prompts_fare_before_and_after(trained):
    out, printed = trained
    assert "8 completions of 2 prompts" in printed
    for name in ("before", "after", "reward", "word PPL", "sentence improvement %", "distinct-2", "loop penalty"):
        assert name in printed
    held_out = json.loads((out / "out" / "heldout.json").read_text())
    for side in ("before", "after"):
        assert [len(group) for group in held_out[side]["completions"]] == [4, 4] and len(held_out[side]["prompts"]) == 2
        rewards = [reward for group in held_out[side]["rewards"] for reward in group]
        assert held_out[side]["scores"]["reward"] == pytest.approx(sum(rewards) / 8)
        assert 0 <= held_out[side]["scores"]["repetition"] < 1
    # The adapter starts as nothing; lora_B has moved since.
    kl = {side: held_out[side]["scores"]["KL"] for side in ("before", "after")}
    assert kl["before"] == pytest.approx(0, abs=1e-4) and abs(kl["after"]) > 1e-4
    assert (out / "out" / "reward.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.browser
def test_its_report_shows_the_run(trained):
    out, printed = trained
    path = out / "out" / "report.html"
    assert f"Report, kept up to date: {path}" in printed
    with Chromium() as browser:
        browser.open(path)
        assert browser.console == [] and browser.requests == [path.as_uri()]
        assert browser.value("document.querySelector('.status').textContent").startswith("Finished after 6 steps.")
        rows = browser.value(
            "[...document.querySelector('.chart').querySelectorAll('tbody tr')].map(r => r.cells[1].textContent)"
        )
        # Its first row is of the evaluation before the first step.
        logs = [entry for entry in log_history(out / "out", STEPS) if "reward" in entry]
        assert [float(shown.replace("−", "-")) for shown in rows[1:]] == pytest.approx(
            [entry["reward"] for entry in logs], abs=0.006
        )
        assert rows[0] == "–"
        held_out = json.loads((out / "out" / "heldout.json").read_text())
        texts = browser.value(
            "[...document.querySelectorAll('section[data-level=word] .text')].map(e => e.textContent)"
        )
        first = [[group[0] for group in held_out[when]["completions"]] for when in ("before", "after")]
        assert texts == [text for pair in zip(*first, strict=True) for text in pair]
        assert browser.value("document.querySelectorAll('section[data-level=word] .text span').length") > 0
        command = browser.value("document.querySelector('#command pre').textContent")
        assert command.startswith("python train_grpo_multilevel_unsloth.py") and f"--max_steps {STEPS}" in command
        assert "num_generations: " in browser.value("document.querySelector('#settings').textContent")


def wandb_records(path: Path):
    """The records of an offline run: a LevelDB log, whose blocks of 32 KiB hold chunks of (checksum, size, kind)."""
    from wandb.proto import wandb_internal_pb2

    content, offset, data = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        left = -offset % 32768 or 32768
        if left < 7:
            offset += left
            continue
        size, kind = struct.unpack_from("<HB", content, offset + 4)
        data += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # whole, or the last chunk of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


@pytest.fixture(scope="module")
def logged(trained) -> dict[str, list]:
    """Per name what W&B was told, in order."""
    [path] = (trained[0] / "wandb").glob("offline-run-*/*.wandb")
    values: dict[str, list] = {}
    for record in wandb_records(path):
        for item in record.history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return values


def test_weights_and_biases_gets_the_documented_names_offline(trained, logged):
    for name in (
        "reward", "reward_word", "reward_phrase", "reward_sentence", "ppl/word", "loss", "learning_rate", "reward_time",
    ):  # fmt: skip
        assert len(logged[f"train/{name}"]) == STEPS, name
    expected = [entry["reward_word"] for entry in log_history(trained[0] / "out", STEPS) if "reward" in entry]
    assert logged["train/reward_word"] == pytest.approx(expected)
    steps = zip(logged["train/reward_time"], logged["train/step_time"], strict=True)
    assert all(0 < part < whole for part, whole in steps)


def test_weights_and_biases_gets_the_finished_report_as_an_artifact(trained):
    [path] = (trained[0] / "wandb").glob("offline-run-*/*.wandb")
    [artifact] = [record.artifact for record in wandb_records(path) if record.artifact.type == "report"]
    [file] = artifact.manifest.contents
    page = (trained[0] / "out" / "report.html").read_bytes()
    assert (file.path, file.size) == ("report.html", len(page)) and b"Finished after 6 steps" in page
    assert file.digest == base64.b64encode(hashlib.md5(page).digest()).decode()


def test_weights_and_biases_gets_the_evaluation_of_another_split(trained, logged):
    evaluations = [entry for entry in log_history(trained[0] / "out", STEPS) if "eval_reward" in entry]
    assert [entry["step"] for entry in evaluations] == [0, STEPS]
    for name in ("reward", "reward_word", "reward_phrase", "reward_sentence", "ppl/word"):
        assert logged[f"eval/{name}"] == pytest.approx([entry[f"eval_{name}"] for entry in evaluations]), name


def test_weights_and_biases_gets_completions_with_the_parts_of_their_rewards(trained, logged):
    tables = sorted((trained[0] / "wandb").rglob("completions_*.table.json"), key=lambda path: path.stat().st_mtime)
    rows = []
    for table in map(json.loads, map(Path.read_text, tables)):
        rows.append([dict(zip(table["columns"], row, strict=True)) for row in table["data"]])
    assert len(rows[0]) == 8 and {"prompt", "completion", "advantage"} < set(rows[0][0])
    first = next(table for table in rows if table[0]["step"] == 1)
    for name in ("reward_word", "reward_phrase", "reward_sentence", "ppl/word", "ppl/phrase", "ppl/sentence"):
        scored = [row[name] for row in first if row["completion"].strip()]
        assert sum(scored) / len(scored) == pytest.approx(logged[f"train/{name}"][0], rel=1e-4), name
    rewards = [row["multi_level_ppl"] for row in first]
    assert sum(rewards) / 8 == pytest.approx(logged["train/rewards/multi_level_ppl/mean"][0], abs=1e-5)


def test_without_unsloth_it_says_why_and_trains_with_peft(tmp_path):
    printed = train(*SHORT, "--no_unsloth", "--no-load_in_4bit", "--output_dir", tmp_path, "--max_steps", "1").stdout
    assert "Training with transformers and PEFT: --no_unsloth" in printed
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_generations", "6", "--gradient_accumulation_steps", "2"], ["= 8 completions", "--num_generations 4"]),
        (["--loop_penalty", "-1"], ["--loop_penalty is -1.0", "0 (no guard"]),
        (["--ppl_weights", "0", "0", "0"], ["weights", "(0.0, 0.0, 0.0)", "not all 0"]),
        (["--ppl_weights", "-1", "1", "1"], ["weights", "-1.0", "none negative"]),
        (["--reward_thresholds", "1:0.5", "1:0.7"], ["1 % twice"]),
        (["--reward_thresholds", "nan:0.5"], ["nan", "finite"]),
        (["--extract", "In summary:(.*)"], ["--extract", "--target reference"]),
        (["--target", "reference", "--extract", "("], ["'('", "regular expression"]),
        (["--target", "reference", "--template", "{prompt}{reference}"], ["{prompt}{reference}", "once each"]),
        (
            ["--target", "reference", "--template", "{completion}{reference}", "--per_level"],
            ["--per_level has no guard against quoting", "--allow_copies"],
        ),
        (["--dataset_name", "nowhere.json"], ["nowhere.json"]),
        (["--dataset_split", "dev"], ["dev", "train, test"]),
        (["--prompt_column", "question"], ["question", "prompt, completion"]),
        (["--baselines_path", "missing.pkl"], ["missing.pkl", "compute_baselines_trl.py"]),
        (["--heldout_samples", "999"], ["999", "200 rows"]),
        (["--model_name", "./nowhere"], ["./nowhere", "does not exist"]),
        (["--config", "missing.yaml"], ["missing.yaml", "YAML"]),
        (["--config=missing.yaml"], ["missing.yaml", "YAML"]),
        (["--config", "a.yaml", "--config=b.yaml"], ["--config is given 2 times", "a.yaml and b.yaml"]),
        (["--baselines_path", ""], ["expected a file ending in .pkl"]),
        (["--temperature", "-1"], ["--temperature: '-1'", "above 0"]),
        (["--seed", "-5"], ["--seed: '-5'", "at least 0"]),
        (["--learning_rate", "-1"], ["--learning_rate is -1.0", "of at least 0"]),
        (["--learning_rate", "inf"], ["--learning_rate is inf"]),
        (["--beta", "nan"], ["--beta is nan", "of at least 0"]),
        (["--num_iterations", "0"], ["--num_iterations is 0", "of at least 1"]),
        (["--max_steps", "0"], ["--max_steps is 0", "at least 1, or -1"]),
        (["--max_steps", "-3"], ["--max_steps is -3"]),
        (["--top_p", "2"], ["--top_p is 2.0", "from 0 to 1"]),
        (["--generation_kwargs", '{"num_beams": 2}'], ["--generation_kwargs holds 'num_beams'"]),
        (["--generation_kwargs", '{"min_new_tokens": 129}'], ["'min_new_tokens': 129", "--max_new_tokens", "128"]),
        (
            ["--use_transformers_continuous_batching", "true", "--repetition_penalty", "1.1"],
            ["--use_transformers_continuous_batching drops --repetition_penalty", "leave it out, or them"],
        ),
        (["--max_completion_length", "0"], ["--max_completion_length is 0, expected a number of at least 1"]),
        (["--use_vllm", "--generation_kwargs", '{"typical_p": 0.9}'], ["--use_vllm", "drop one of them"]),
        (["--logging_steps", "nan"], ["--logging_steps is nan", "above 0"]),
        (["--report_to", "none", "wandb"], ["--report_to is none wandb", "stands alone"]),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, flags, words):
    line = refusal(*flags, "--output_dir", tmp_path / "out")
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_a_misspelt_flag_is_refused_with_the_nearest_name(tmp_path):
    line = refusal("--warmup_step", "3", "--output_dir", tmp_path / "out", python=sys.executable)
    assert "unknown flag --warmup_step, did you mean --warmup_steps?" in line
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_baselines_for_its_rows_is_refused_before_loading(tmp_path, baselines):
    line = refusal("--baselines_path", baselines, "--output_dir", tmp_path / "out", python=sys.executable)
    assert "no baseline for 180 of 200 rows" in line and "compute_baselines_trl.py" in line


def test_a_configuration_file_fills_in_and_the_command_line_wins(tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 1\nlearning_rate: 0.5\nlora_r: 4\nbeta: 0.04\nno_unsloth: true\n")
    train(
        *SHORT, "--config", tmp_path / "run.yaml", "--no-load_in_4bit", "--learning_rate", "0.001", "--lora_r", "2",
        "--output_dir", tmp_path / "out", "--save_steps", "1", python=sys.executable,
    )  # fmt: skip
    [entry] = [entry for entry in log_history(tmp_path / "out", 1) if "reward" in entry]
    assert entry["learning_rate"] == 0.001 and "kl" in entry
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_baselines_as_columns_need_no_key_and_are_compared_with_the_scorer(tmp_path):
    subprocess.run(
        [
            warm.python(), "compute_baselines_trl.py", "--num_samples", "12", "--output_path", tmp_path / "b.pkl",
            "--output_dataset", tmp_path / "data",
        ],
        cwd=EXAMPLES, check=True, capture_output=True,
    )  # fmt: skip
    data = ["--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out", "--heldout_samples", "2"]
    short = ["--max_steps", "1", "--max_new_tokens", "8", "--no_unsloth", "--save_steps", "1", "--logging_steps", "1"]
    assert "load_in_4bit=False" in train(*data, *short).stdout  # as the baselines were made
    [entry] = [entry for entry in log_history(tmp_path / "out", 1) if "reward" in entry]
    assert entry["reward_word"] != 0  # zero-shot would give 0 at the first visit
    refused = train(*data, *short, "--max_phrase_words", "3", code=2).stderr.strip().splitlines()[-1]
    assert "max_phrase_words 4" in refused and "max_phrase_words 3" in refused
    assert f"--output_dataset {tmp_path / 'data'}" in refused and "--output_path" not in refused


def test_what_is_left_out_skipped_or_seen_in_training_is_said_and_counted(tmp_path):
    rows = [{"prompt": f"The {name} sat by the river and"} for name in ("cat", "dog", "fox", "owl")] * 3
    (tmp_path / "data").mkdir()
    for split, of_split in {"train": [*rows, {"prompt": " "}, {"prompt": None}], "test": rows[:4]}.items():
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, of_split)))
    baselines = {rows[0]["prompt"]: dict.fromkeys(LEVELS, 1e9), rows[1]["prompt"]: dict.fromkeys(LEVELS, 1e9)}
    (tmp_path / "b.json").write_text(json.dumps(baselines))
    done = train(
        "--dataset_name", tmp_path / "data", "--eval_split", "test", "--baselines_path", tmp_path / "b.json",
        "--missing", "skip", "--output_dir", tmp_path / "out", "--heldout_samples", "1", "--no_unsloth",
        "--no-load_in_4bit", "--max_steps", "6", "--save_steps", "6", "--logging_steps", "1", "--max_new_tokens", "8",
        "--num_generations", "2", "--per_device_train_batch_size", "2", "--num_generations_eval", "2",
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert "2 of 14 rows of split 'train' are left out: no prompt" in lines
    assert "2 of 12 rows are not trained on: their prompts are those of held-out rows" in lines
    assert "3 of 4 rows of --eval_split test have prompts that are trained on" in lines
    history = log_history(tmp_path / "out", 6)
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    assert len(rewards) == 6 and None in rewards and 1.0 in rewards  # steps of one prompt, with and without a baseline
    assert all((entry["reward"] is None) == (entry["ppl/word"] is None) for entry in history if "reward" in entry)
    means = [(entry["eval_reward"], entry["eval_diagnostics/missing"]) for entry in history if "eval_reward" in entry]
    assert means and set(means) == {(1.0, 0.5)}  # half of them are skipped
    assert "reward none (spread none), word none, phrase none, sentence none" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["a_file", "a_file/below", "/proc/x", ""])
def test_a_place_for_the_model_that_is_none_is_refused_before_loading(tmp_path, name):
    (tmp_path / "a_file").write_text("kept")
    place = tmp_path / name if name[:1] == "a" else name
    line = refusal("--output_dir", place)
    assert "--output_dir" in line and str(place) in line
    assert (tmp_path / "a_file").read_text() == "kept"


def test_a_file_of_flags_names_no_other(tmp_path):
    (tmp_path / "run.yaml").write_text("config: other.yaml\nmax_steps: 1\n")
    line = refusal(f"--config={tmp_path / 'run.yaml'}", "--output_dir", tmp_path / "out")
    assert "config is 'other.yaml', but a file names no other" in line
