"""Two real processes under accelerate launch against one: the same rewards, one set of files, one end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import reward_in_processes
import torch
import toys
import warm
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from training_runs import EXAMPLES, SHORT, log_history, staircase
from transformers import AutoModelForCausalLM
from waiting import PATIENCE, wait_for

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "accelerate_configs"


# The processes are their own either way; those that are stopped start as a user's do.
WARM = [warm.python(), "-m", "accelerate.commands.accelerate_cli"]
COLD = [Path(sys.executable).parent / "accelerate"]


def launch(*words, accelerate=WARM, config=CONFIGS / "cpu.yaml") -> subprocess.Popen:
    command = [*accelerate, "launch", "--config_file", config, *words]
    path = os.pathsep.join(map(str, (HERE, EXAMPLES)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [*map(str, command)], cwd=EXAMPLES, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(process: subprocess.Popen) -> str:
    output, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"{output[-3000:]}\n{error[-3000:]}"
    return output


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    found = {}
    for way in ("DDP", "FSDP"):
        folder = tmp_path_factory.mktemp(way)
        finished(launch(HERE / "reward_in_processes.py", folder, way))
        found[way] = [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]
    return found


@pytest.mark.parametrize(
    ("way", "name"),
    [*((way, name) for way in ("DDP", "FSDP") for name in reward_in_processes.OPTIONS), ("DDP", "inner handle")],
)
def test_two_processes_reward_as_one_does(halves, way, name):
    # The plain model is what the policy in DDP, or under FSDP, is with its adapters off.
    options = reward_in_processes.OPTIONS.get(name, {})
    one = reward_in_processes.rewards(toys.llama(), slice(None), **options)
    first, second = (half[name] for half in halves[way])
    for call, expected in enumerate(one["rewards"]):
        assert first["rewards"][call] + second["rewards"][call] == pytest.approx(expected, abs=1e-5)
        for half in (first, second):
            assert half["logged"][call] == pytest.approx(one["logged"][call], rel=1e-4, abs=1e-3)
    assert first["state"] == second["state"]  # to the last bit
    assert first["state"]["first_visits"].keys() == one["state"]["first_visits"].keys()
    for key, levels in one["state"]["first_visits"].items():
        assert first["state"]["first_visits"][key] == pytest.approx(levels, rel=1e-4)
    if name == "zero-shot":
        assert len(one["state"]["first_visits"]) == 3
        assert len(set(one["rewards"][0])) > 5 and len(set(one["rewards"][1])) > 5


def test_a_run_in_two_processes_leaves_what_a_run_in_one_leaves(tmp_path):
    baselines = tmp_path / "baselines.json"
    stories = json.loads((EXAMPLES / "tiny_stories" / "train.json").read_text())[:20]
    baselines.write_text(json.dumps({story["id"]: {"word": 50, "phrase": 50, "sentence": 50} for story in stories}))
    out = tmp_path / "out"
    printed = finished(
        launch(
            "train_grpo_multilevel_unsloth.py", *SHORT, "--heldout_samples", "3", "--max_steps", "2",
            "--save_steps", "2", "--output_dir", out, "--baselines_path", baselines,
            "--loop_penalty", "0", *staircase(-1000, 100, 5),
        )
    )  # fmt: skip
    assert printed.count("Training with Unsloth") == printed.count("12 completions of 3 prompts") == 1
    for entry in (entry for entry in log_history(out, 2) if "reward" in entry):
        # A group of 8 is split, 4 to a process. The reward is linear in the improvement but for a step of 1 / 220, and
        # of both; a blank completion has the reward 0 and no improvement.
        improvement = 0.2 * entry["reward_word"] + 0.3 * entry["reward_phrase"] + 0.5 * entry["reward_sentence"]
        scored = 8 * entry["reward"] / ((improvement + 1000) / 1100)
        assert round(scored) >= 6 and round(scored) - 8 / 220 * 1.2 < scored < round(scored) + 1e-3
        assert entry["num_tokens"] > 0 and entry["reward_std"] > 0
    for name in ("adapter_model.safetensors", "tokenizer.json", "training_config.yaml", "reward.png"):
        assert (out / name).stat().st_size > 0
    held_out = json.loads((out / "heldout.json").read_text())
    for side in ("before", "after"):
        assert [len(group) for group in held_out[side]["completions"]] == [4, 4, 4]
        rewards = [reward for group in held_out[side]["rewards"] for reward in group]
        assert held_out[side]["scores"]["reward"] == pytest.approx(sum(rewards) / 12)
    assert (out / "checkpoint-2" / "reward_state.json").exists()


# accelerate's settings for FSDP 2 and ZeRO-3, for two processes on a CPU.
SPREAD = {"FSDP 2": ("fsdp", [HERE / "fsdp_on_cpu.py"]), "ZeRO-3": ("zero3", [])}


@pytest.mark.slow
@pytest.mark.parametrize("way", SPREAD)
@pytest.mark.parametrize(
    ("trained", "kind"),
    [("adapter_model", ["--save_merged", "--beta", "0.1"]), ("model", ["--full_finetuning"])],
    ids=["adapter, its own scorer", "all weights, a frozen copy as scorer"],
)
def test_weights_that_are_spread_train_as_whole_ones_do(tmp_path, way, trained, kind):
    if way == "ZeRO-3":
        pytest.importorskip("deepspeed")
    name, start = SPREAD[way]
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config = tmp_path / "spread.yaml"
    config.write_text(yaml.dump({**content, "num_processes": 2, "mixed_precision": "no", "main_process_port": 0}))
    script = ["train_grpo_multilevel_unsloth.py", "--no_unsloth", "--no-load_in_4bit", *SHORT, *kind]
    script += ["--max_steps", "2", "--save_steps", "1", "--learning_rate", "1e-3", "--output_dir"]
    resume = ["--resume_from_checkpoint", tmp_path / "resumed" / "checkpoint-1"]
    runs = {
        "whole": launch(*script, tmp_path / "whole"),
        "spread": launch(*start, *script, tmp_path / "spread", config=config),
    }
    for run in runs.values():
        finished(run)
    shutil.copytree(tmp_path / "spread", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-2")
    finished(launch(*start, *script, tmp_path / "resumed", *resume, config=config))

    first = sorted(path.name for path in (tmp_path / "spread" / "checkpoint-1").iterdir())
    assert {"FSDP 2": "pytorch_model_fsdp.bin", "ZeRO-3": "global_step1"}[way] in first  # it was spread
    whole, spread, resumed = (tmp_path / run for run in ("whole", "spread", "resumed"))
    logs = {}
    for run in (whole, spread, resumed):
        entries = (entry.items() for entry in log_history(run, 2))
        logs[run] = [{key: one for key, one in entry if not re.search("time|per_second", key)} for entry in entries]
    for other in (spread, resumed):
        for one, same in zip(logs[whole], logs[other], strict=True):
            assert same == pytest.approx(one, abs=1e-4)
        one, same = (json.loads((run / "heldout.json").read_text())["after"] for run in (whole, other))
        assert same["completions"] == one["completions"]
        assert same["scores"] == pytest.approx(one["scores"], abs=1e-5)
        assert one["scores"]["KL"] != 0
    files = [f"{trained}.safetensors", *(["merged/model.safetensors"] if "--save_merged" in kind else [])]
    for file in files:
        one, same, again = (load_file(run / file) for run in (whole, spread, resumed))
        for key, tensor in one.items():
            # A gradient near 0 may have another sign, and Adam makes a step of it: 1e-4 is a tenth of one. What is
            # merged is rounded to bfloat16.
            rtol = 2**-7 if tensor.dtype == torch.bfloat16 else 0
            torch.testing.assert_close(same[key], tensor, rtol=rtol, atol=1e-4)
            assert torch.equal(again[key], same[key])
    loader = AutoPeftModelForCausalLM if trained == "adapter_model" else AutoModelForCausalLM
    ids = torch.arange(4, 24)[None]
    logits = [loader.from_pretrained(run)(ids).logits for run in (whole, spread)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-3)


def test_one_held_out_prompt_is_enough_for_two_processes(tmp_path):
    out = tmp_path / "out"
    finished(
        launch(
            "train_grpo_multilevel_unsloth.py", *SHORT, "--no_unsloth", "--no-load_in_4bit", "--heldout_samples", "1",
            "--max_steps", "1", "--output_dir", out,
        )
    )  # fmt: skip
    for side in ("before", "after"):
        held_out = json.loads((out / "heldout.json").read_text())[side]
        assert [len(group) for group in held_out["completions"]] == [4]
        assert held_out["scores"]["reward"] == pytest.approx(sum(held_out["rewards"][0]) / 4)


def test_a_signal_stops_both_processes_at_the_same_step(tmp_path):
    out = tmp_path / "out"
    process = launch(
        "train_grpo_multilevel_unsloth.py", *SHORT, "--no_unsloth", "--no-load_in_4bit", "--max_steps", "5000",
        "--num_train_epochs", "1000", "--save_steps", "1", "--save_total_limit", "2", "--output_dir", out,
        accelerate=COLD,
    )  # fmt: skip
    wait_for(lambda: any(out.glob("checkpoint-*/reward_state.json")), process)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, error[-2000:]
    [step] = re.findall(r"Stopped at step (\d+)", output)
    command = output[output.index("Go on with") :].splitlines()[1]
    # With its whole path where .venv is not activated, so that the line runs as pasted.
    launcher = rf"  (\S+/)?accelerate launch --config_file {re.escape(str(CONFIGS / 'cpu.yaml'))}"
    assert re.match(f"{launcher} train_grpo_multilevel_unsloth.py --max_samples", command)
    assert command.endswith(f" --resume_from_checkpoint {out / f'checkpoint-{step}'}")
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == int(step)
    assert (out / f"checkpoint-{step}" / "reward_state.json").exists()
    # Each process of a checkpoint leaves its own random state: both stopped there.
    assert {path.name for path in (out / f"checkpoint-{step}").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_every_configuration_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    kinds = {name: config.distributed_type.value for name, config in found.items()}
    assert kinds == {"cpu": "MULTI_GPU", "single_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp": "FSDP",
                     "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}  # fmt: skip
    for name, stage in {"zero2": 2, "zero3": 3}.items():
        assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["deepspeed_config"]["zero_stage"] == stage
    assert found["fsdp"].fsdp_config["fsdp_version"] == 2
