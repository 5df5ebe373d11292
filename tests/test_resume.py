"""A run that is stopped by signals and goes on ends where an undisturbed one does, to the last bit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file
from training_runs import EXAMPLES, SHORT, log_history, refusal, train
from waiting import PATIENCE

from mlppl.cli import LATEST, reward_config
from mlppl.errors import InputError
from mlppl.training.settings import STATE_FILE, find_checkpoint, resume_command

STEPS = 18
# Five prompts, each of them two optimizer steps from one sampling: an epoch is ten steps. Without baselines, the first
# epoch's completions become them.
FLAGS = [
    "--max_samples", "7", "--heldout_samples", "2", "--max_new_tokens", "12", "--logging_steps", "1",
    "--max_steps", str(STEPS), "--num_iterations", "2", "--save_steps", "3", "--learning_rate", "1e-3",
    "--lr_scheduler_type", "cosine",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    train(*FLAGS, "--output_dir", output)
    return output


def stop_at(command: list[str], step: int, number: int) -> tuple[int, str]:
    """(exit code, output) of a run that gets the signal once it has logged this step or a later one."""
    process = subprocess.Popen(
        command,
        cwd=EXAMPLES,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = ""
    for line in process.stdout:
        output += line
        if number and (logged := re.search(r"step (\d+):", line)) and int(logged.group(1)) >= step:
            process.send_signal(number)
            number = 0
    return process.wait(timeout=PATIENCE), output


def printed_command(output: str) -> list[str]:
    [line] = re.findall(r"Go on with\n +\S*python (.*)", output)
    return [warm.python(), *shlex.split(line)]


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory):
    """In the second epoch by SIGTERM, then by Ctrl-C, each time gone on with by the command that was printed."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    command = [warm.python(), "train_grpo_multilevel_unsloth.py", *FLAGS, "--output_dir", str(output)]
    runs = []
    for step, number in ((11, signal.SIGTERM), (13, signal.SIGINT)):
        runs.append(stop_at(command, step, number))
        command = printed_command(runs[-1][1])
    runs.append(stop_at(command, STEPS, 0))
    return output, runs


def test_a_signal_saves_and_ends_with_its_exit_code(stopped_twice):
    output, runs = stopped_twice
    assert [code for code, _ in runs] == [128 + 15, 128 + 2, 0]
    stops = [int(re.search(r"Stopped at step (\d+)", printed).group(1)) for _, printed in runs[:2]]
    for step in stops:
        assert step % 2 == 0 and (output / f"checkpoint-{step}" / STATE_FILE).exists()
    assert 12 <= stops[0] < stops[1] < STEPS


def test_it_ends_with_the_same_adapter_and_reward_state(undisturbed, stopped_twice):
    output, _ = stopped_twice
    for name in ("adapter_model.safetensors", f"checkpoint-{STEPS}/{STATE_FILE}"):
        assert (undisturbed / name).read_bytes() == (output / name).read_bytes(), name
    state = json.loads((output / f"checkpoint-{STEPS}" / STATE_FILE).read_text())
    assert len(state["first_visits"]) == 7  # five prompts, and the two that are held out


def test_it_logs_the_same_steps(undisturbed, stopped_twice):
    logs = []
    for output in (undisturbed, stopped_twice[0]):
        entries = [entry for entry in log_history(output, STEPS) if "reward" in entry]
        logs.append([(e["step"], e["reward"], e["reward_word"], e["loss"], e["entropy"]) for e in entries])
    assert logs[0] == logs[1] and [entry[0] for entry in logs[0]] == list(range(1, STEPS, 2))  # where it samples
    assert len({entry[1] for entry in logs[0]}) > 3  # a first visit is measured, too


def test_what_was_measured_before_training_is_kept(undisturbed, stopped_twice):
    output, runs = stopped_twice
    assert [("held-out, before" in printed, "held-out, after" in printed) for _, printed in runs] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    expected, found = (json.loads((folder / "heldout.json").read_text()) for folder in (undisturbed, output))
    assert found["before"] == expected["before"] and found["after"]["completions"] == expected["after"]["completions"]
    # A text scored in another batch differs in the last digits.
    assert found["after"]["scores"] == pytest.approx(expected["after"]["scores"], rel=1e-4)


def test_checkpoints_wait_for_the_next_sampling(undisturbed):
    """Due after 3, 6, 9, ... steps; completions are sampled every other step."""
    steps = sorted(int(path.name.partition("-")[2]) for path in undisturbed.glob("checkpoint-*"))
    assert steps == [4, 6, 10, 12, 16, 18]


def test_the_settings_beside_the_model_give_the_same_run(undisturbed):
    from mlppl.training.settings import BatchPlan, grpo_config
    from train_grpo_multilevel_unsloth import parse_args

    asked, ours = [], []
    for argv in ([*FLAGS, "--output_dir", str(undisturbed)], ["--config", str(undisturbed / "training_config.yaml")]):
        args, rest = parse_args(argv)
        asked.append(grpo_config(args, rest, BatchPlan(2, 8))[1])
        ours.append(vars(args))
    assert asked[0] == asked[1] and asked[1]["num_iterations"] == 2 and asked[1]["max_completion_length"] == 12
    filled_in = {name for name in ours[0] if ours[0][name] != ours[1][name]}
    assert filled_in == {
        "config",
        "load_in_4bit",
        "gradient_accumulation_steps",
        "num_generations",
        "report_to",
    }
    assert ours[1]["load_in_4bit"] is True
    # Nothing in the file is derived from other flags, which may then be given.
    config = ["--config", str(undisturbed / "training_config.yaml")]
    assert reward_config(parse_args(config)[0]).reward_thresholds[0] == (0.05, 0.2)
    other = reward_config(parse_args([*config, "--aggregation", "nested", "--reward_form", "nats"])[0])
    assert (other.weights, other.reward_thresholds) == ((1, 1, 1), None)


def whole(folder: Path, step: int, age: float = 0) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (checkpoint / STATE_FILE).write_text("{}")
    os.utime(checkpoint / STATE_FILE, (age, age))
    return checkpoint


def test_the_latest_checkpoint_is_the_whole_one_with_the_most_steps(tmp_path):
    """Not the newest: a copy of a folder has its files' times in any order."""
    assert find_checkpoint(None, str(tmp_path)) is None
    with pytest.raises(InputError, match="no whole checkpoint"):
        find_checkpoint(LATEST, str(tmp_path))
    whole(tmp_path, 1, age=3)
    latest = whole(tmp_path, 20, age=1)
    whole(tmp_path, 3, age=2)
    (tmp_path / "checkpoint-30").mkdir()  # the process was killed while writing it
    assert find_checkpoint(LATEST, str(tmp_path)) == str(latest)
    with pytest.raises(InputError, match=r"checkpoint-30 holds no trainer_state.json"):
        find_checkpoint(str(tmp_path / "checkpoint-30"), str(tmp_path))


@pytest.mark.parametrize(
    "argv",
    [
        ["--a", "b c"],
        ["--resume_from_checkpoint", "--a", "b c"],
        ["--a", "b c", "--resume_from_checkpoint", "old"],
        ["--resume_from_checkpoint=old", "--a", "b c"],
    ],
)
def test_the_command_to_go_on(argv, monkeypatch):
    """It runs as pasted: where .venv is not activated, python is another one, or none."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    command = "python train.py --a 'b c' --resume_from_checkpoint out/checkpoint-3"
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", "/usr/bin")
    assert resume_command(argv, "out/checkpoint-3") == f"{folder}/{command}"
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin")
    assert resume_command(argv, "out/checkpoint-3") == command
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(argv, "c").startswith("accelerate launch --num_processes 2 train.py ")


def test_a_checkpoint_whose_state_is_damaged_is_refused(tmp_path):
    checkpoint = whole(tmp_path, 20, age=2)
    (checkpoint / STATE_FILE).write_text("{")
    for asked in (LATEST, str(checkpoint)):
        with pytest.raises(InputError, match=f"{STATE_FILE} is damaged .*another checkpoint"):
            find_checkpoint(asked, str(tmp_path))


def test_a_run_that_goes_on_with_other_rewards_measures_its_start_with_them(tmp_path):
    flags = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--output_dir", tmp_path / "out", "--save_steps", "1"]
    train(*flags, "--max_steps", "1")
    first = json.loads((tmp_path / "out" / "heldout.json").read_text())
    again = [*flags, "--max_steps", "2", "--resume_from_checkpoint", "--loop_penalty", "0", "--reward_form", "nats"]
    assert f"Going on from {tmp_path / 'out' / 'checkpoint-1'}\n" in train(*again).stdout
    then = json.loads((tmp_path / "out" / "heldout.json").read_text())
    assert "loop penalty" in first["before"]["scores"] and "loop penalty" not in then["before"]["scores"]
    assert set(then["before"]["scores"]) == set(then["after"]["scores"])
    assert then["before"]["completions"] == first["before"]["completions"]  # of the model before its first step
    assert then["before"]["scores"]["KL"] == 0
    nested = [*flags, "--max_steps", "3", "--resume_from_checkpoint", "--aggregation", "nested"]
    assert "measured with aggregation geometric, and this run has aggregation nested" in refusal(*nested)


def test_a_folder_with_a_run_in_it_is_not_written_into(tmp_path):
    """Its checkpoints would be taken for those of the next one."""
    out = tmp_path / "out"
    flags = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "1", "--output_dir", out]
    train(*flags, "--save_strategy", "no", "--save_merged")
    (out / "checkpoint-500").mkdir()  # half of one is none
    before = (out / "README.md").stat().st_mtime_ns
    line = refusal(*flags)
    assert f"--output_dir {out} holds a finished run: choose another folder, replace that run with --overwrite" in line
    assert "--resume_from_checkpoint" not in line and (out / "README.md").stat().st_mtime_ns == before
    (out / "heldout.json").unlink()
    (out / "checkpoint-500").rmdir()
    whole(out, 500)
    assert "holds the checkpoints of a run: " in (line := refusal(*flags)) and "--resume_from_checkpoint" in line
    (out / "reward.png").touch()  # a run of one step makes none
    train(*flags, "--overwrite", "--save_steps", "1")
    assert [one.name for one in out.glob("checkpoint-*")] == ["checkpoint-1"] and not (out / "merged").exists()
    assert not (out / "reward.png").exists() and "reward.png" not in (out / "README.md").read_text()
    assert "overwrite" not in (out / "training_config.yaml").read_text()


def test_resuming_from_nothing_is_refused(tmp_path):
    out = tmp_path / "out"
    assert "no whole checkpoint" in refusal("--resume_from_checkpoint", "--output_dir", out)
    assert "nowhere holds no trainer_state.json" in refusal("--resume_from_checkpoint", "nowhere", "--output_dir", out)
    assert not out.exists()


# Ctrl-C in the first batch of an evaluation, and how many batches it had.
STOPPED = """
import signal, sys
from mlppl.training import trainer
import train_grpo_multilevel_unsloth

batches, own = [], trainer.SafeStops.on_prediction_step

def on_prediction_step(self, args, state, control, **kwargs):
    batches.append(state.global_step)
    signal.raise_signal(signal.SIGINT)
    own(self, args, state, control, **kwargs)

trainer.SafeStops.on_prediction_step = on_prediction_step
code = train_grpo_multilevel_unsloth.main(sys.argv[1:])
print("BATCHES", batches)
sys.exit(code)
"""


def test_a_signal_ends_an_evaluation_between_its_batches(tmp_path):
    flags = [*SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "3", "--eval_split", "test[:12]"]
    flags += ["--eval_steps", "2", "--eval_on_start", "false", "--max_new_tokens", "4", "--save_strategy", "no"]
    flags += ["--num_generations", "2", "--output_dir", tmp_path / "out"]
    command = [warm.python(), "-c", STOPPED, *map(str, flags)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 128 + signal.SIGINT, done.stderr[-3000:]
    assert "BATCHES [2]" in done.stdout and "Stopped at step 2. Go on with" in done.stdout
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert not [name for entry in history for name in entry if name.startswith("eval_")]
    train(*flags, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    stopped = load_file(tmp_path / "out" / "adapter_model.safetensors")
    train(*flags, "--output_dir", tmp_path / "whole")
    whole_run = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert stopped.keys() == whole_run.keys()
    assert all(torch.equal(stopped[name], whole_run[name]) for name in whole_run)
