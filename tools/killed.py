"""Runs of training and of baselines, killed at random moments, gone on with and compared with undisturbed ones.

    python tools/killed.py training --kills 50 --out killed.jsonl

A run is killed at a moment drawn from the time an undisturbed one takes, and started again as its user would: the same
command, with --resume_from_checkpoint once there is a checkpoint. It is killed again and again until it comes to its
end; then what it left must be what the undisturbed run left. Runs follow until there were as many kills as asked for.
Each run's line goes to --out; what is there already counts, so the command can be stopped and given again.

Not part of `make test`: fifty kills take from ten minutes to an hour. Ends with exit code 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "rl_training" / "examples"
sys.path.insert(0, str(ROOT / "tests"))

import warm  # noqa: E402  starts scripts in a process that has the libraries imported

TRAINING = [
    *("train_grpo_multilevel_unsloth.py", "--max_samples", "7", "--heldout_samples", "2", "--max_new_tokens", "12"),
    *("--max_steps", "18", "--num_iterations", "2", "--save_steps", "3", "--learning_rate", "1e-3", "--output_dir"),
]
BASELINES = ["compute_baselines_trl.py", "--num_samples", "400", "--output_path"]
# The kernel ends the process at once, wherever it is: nothing handles this signal.
RUN = "import runpy, signal, sys; signal.setitimer(signal.ITIMER_REAL, {seconds}); sys.argv = {argv}; "
RUN += "runpy.run_path(sys.argv[0], run_name='__main__')"


def run(argv: list[str], seconds: float = 0.0) -> tuple[int, str]:
    """(exit code, output) of a script that is killed after so many seconds; 0: not at all."""
    done = subprocess.run(
        [warm.python(), "-c", RUN.format(seconds=seconds, argv=argv)],
        cwd=EXAMPLES, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode not in (0, -signal.SIGALRM):
        raise RuntimeError(f"{argv} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.returncode, done.stdout


def training(output: Path) -> list[str]:
    has_checkpoint = any((path / "trainer_state.json").exists() for path in output.glob("checkpoint-*"))
    return [*TRAINING, str(output), *(["--resume_from_checkpoint"] if has_checkpoint else [])]


def baselines(output: Path) -> list[str]:
    return [*BASELINES, str(output)]


def trained(output: Path) -> dict:
    """What must be the same: the adapter, what the reward remembers, the held-out texts, their scores."""
    heldout = json.loads((output / "heldout.json").read_text())
    logged = json.loads((output / "checkpoint-18" / "trainer_state.json").read_text())["log_history"]
    left = [path.name for path in output.rglob("*") if ".tmp" in path.name or path.name.endswith(".new")]
    assert not left, left
    return {
        "adapter": (output / "adapter_model.safetensors").read_bytes().hex(),
        "logged": [(entry["step"], entry["reward"], entry["loss"]) for entry in logged if "reward" in entry],
        "texts": [heldout[side]["completions"] for side in ("before", "after")],
        "numbers": [list(heldout[side]["scores"].values()) for side in ("before", "after")],
    }


def computed(output: Path) -> dict:
    sys.path.insert(0, str(EXAMPLES))
    from mlppl.baselines.file import Baselines

    loaded = Baselines.load(output)
    left = [path.name for path in output.parent.iterdir() if path.name not in (output.name, f"{output.name}.meta.json")]
    assert not left, left
    return {"ids": list(loaded), "numbers": [list(values) for _, values in loaded.items()]}


def same(one: dict, other: dict) -> list[str]:
    """The names of what differs. A text scored in another batch differs in the last digits."""
    differing = [name for name in one if name != "numbers" and one[name] != other[name]]
    close = np.allclose(np.array(one["numbers"], float), np.array(other["numbers"], float), rtol=1e-4)
    return differing if close else [*differing, "numbers"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("training", "baselines"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each run")
    args = parser.parse_args()
    command, result = {"training": (training, trained), "baselines": (baselines, computed)}[args.what]
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    lines = [line for line in lines if line["what"] == args.what]
    with tempfile.TemporaryDirectory() as folder:
        # Each kind of file in turn.
        names = ["out"] if args.what == "training" else ["b.pkl", "b.json"]
        undisturbed, seconds = {}, {}
        for name in names:
            output = Path(folder, "undisturbed", name.replace(".", "-"), name)
            output.parent.mkdir(parents=True)
            run(command(output))  # the first one also starts the server that the others are forked from
            output = Path(folder, "again", name.replace(".", "-"), name)
            output.parent.mkdir(parents=True)
            began = time.monotonic()
            run(command(output))
            seconds[name], undisturbed[name] = time.monotonic() - began, result(output)
        while sum(line["kills"] for line in lines) < args.kills:
            number = len(lines)
            draw, name = random.Random(f"{args.seed} {number}"), names[number % len(names)]
            output = Path(folder, f"run-{number}", name)
            output.parent.mkdir()
            moments, code = [], -1
            while code != 0 and not (args.what == "baselines" and output.exists()):
                # After eight kills to its end: a moment near the end of a slow machine's run may never come.
                at = draw.uniform(0.05, seconds[name]) if len(moments) < 8 else 0.0
                code, _ = run(command(output), at)
                moments += [round(at, 2)] if code else []
            differing = same(undisturbed[name], result(output))
            lines.append(
                {"what": args.what, "file": name, "kills": len(moments), "at": moments, "differing": differing}
            )
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            kills = sum(line["kills"] for line in lines)
            print(
                f"{kills:3d} of {args.kills} kills, {number + 1} runs, differing: {differing or 'nothing'}", flush=True
            )
    wrong = [line for line in lines if line["differing"]]
    print(
        f"{args.what}: {kills} kills in {len(lines)} runs, {len(wrong)} of which ended otherwise than undisturbed ones"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
