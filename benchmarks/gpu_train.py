"""The project's own scripts on one GPU, as a user runs them, with the embedded model and with one of 1B parameters.

What they print goes to OUT/NAME.log. Some run side by side: how long they take is not what is measured here.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import EXAMPLES, Rows, device, failure
from gpu_models import PUBLISHED, TOY, random_model, word_tokenizer

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}


class Sizes(NamedTuple):
    steps: int  # a checkpoint is saved halfway
    samples: int
    heldout: int
    tokens: int


FULL = Sizes(20, 200, 16, 64)
SMALL = Sizes(2, 16, 2, 16)


def scripts(rows: Rows, toy: bool, folder: str) -> None:
    sizes = SMALL if toy else FULL
    runs = _Runs(rows, Path(folder))
    if toy:
        _on_this_device(runs, sizes)
        return
    _side_by_side(
        lambda: _on_this_device(runs, sizes), lambda: _on_a_cpu(runs, sizes), lambda: _one_billion(runs, sizes)
    )
    _compare(rows, runs)


def _side_by_side(*chains: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(chains)) as pool:
        for chain in [pool.submit(chain) for chain in chains]:
            chain.result()


def _on_this_device(runs: "_Runs", sizes: Sizes) -> None:
    trained = runs.folder / "trained"
    middle, merged = str(trained / f"checkpoint-{sizes.steps // 2}"), str(trained / "merged")
    check = "test_multilevel_ppl_trl.py"
    _side_by_side(lambda: runs.run("check", check, "--load_in_4bit"), lambda: _baselines(runs, "", sizes))
    _side_by_side(
        lambda: _train(runs, "trained", "", sizes, "--save_merged"),
        lambda: _train(runs, "no Unsloth", "", sizes, "--no_unsloth"),
    )
    _side_by_side(
        lambda: _train(runs, "resumed", "", sizes, "--resume_from_checkpoint", middle),
        lambda: runs.run("merged model", check, "--model_name", merged),
    )


def _on_a_cpu(runs: "_Runs", sizes: Sizes) -> None:
    _baselines(runs, " on a CPU", sizes, WITHOUT_GPU)
    _train(runs, "trained on a CPU", " on a CPU", sizes, environment=WITHOUT_GPU)


def _one_billion(runs: "_Runs", sizes: Sizes) -> None:
    kind, shape = list((PUBLISHED if device() == "cuda" else TOY).values())[-2 if device() == "cuda" else -1]
    model = str(runs.folder / "1B model")
    random_model(kind, shape).save_pretrained(model)
    word_tokenizer(shape["vocab_size"]).save_pretrained(model)
    more = ("--model_name", model)
    few = sizes._replace(steps=4, samples=32, heldout=4)
    _baselines(runs, " 1B", few, None, *more)
    _train(runs, "trained 1B", " 1B", few, "--save_merged", *more)


def _baselines(runs: "_Runs", name: str, sizes: Sizes, environment=None, *more: str) -> None:
    runs.run(
        f"baselines{name}", "compute_baselines_trl.py", "--load_in_4bit", "--generate", "4",
        "--max_new_tokens", str(sizes.tokens), "--num_samples", str(sizes.samples),
        "--output_path", str(runs.folder / f"baselines{name}.pkl"), *more, environment=environment,
    )  # fmt: skip


def _train(runs: "_Runs", name: str, baselines: str, sizes: Sizes, *more: str, environment=None) -> None:
    runs.run(
        name, "train_grpo_multilevel_unsloth.py", "--baselines_path", str(runs.folder / f"baselines{baselines}.pkl"),
        "--output_dir", str(runs.folder / name), "--max_samples", str(sizes.samples),
        "--max_new_tokens", str(sizes.tokens), "--learning_rate", "2e-3", "--per_device_train_batch_size", "16",
        "--max_steps", str(sizes.steps), "--save_steps", str(sizes.steps // 2),
        "--heldout_samples", str(sizes.heldout), *more, environment=environment,
    )  # fmt: skip


class _Runs:
    def __init__(self, rows: Rows, folder: Path) -> None:
        self.rows = rows
        self.folder = folder / "scripts"
        self.folder.mkdir(parents=True)

    def run(self, name: str, script: str, *arguments: str, environment=None) -> None:
        """Run a script in a folder of its own; a row says whether it came to its end, and in what time."""
        workplace = self.folder / f"{name} runs here"
        workplace.mkdir()
        log = self.rows.path.with_name(f"{name.replace(' ', '_')}.log")
        started = time.perf_counter()
        with log.open("w") as output:
            command = [sys.executable, str(EXAMPLES / script), *arguments]
            options = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"), **(environment or {})}
            code = subprocess.call(
                command, cwd=workplace, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **options}
            )
        text = log.read_text(errors="replace")
        seconds = time.perf_counter() - started
        way = next((line.strip() for line in text.splitlines() if line.startswith("Training with")), "")
        note = way if code == 0 else f"failed, exit code {code}: {failure(text)}"
        self.rows.add(f"{script}: {name}", seconds, "s", note=note)


def _compare(rows: Rows, runs: _Runs) -> None:
    """Held-out rewards on this device and on a CPU: their difference in standard errors, prompts being the sample."""
    for when in ("before", "after"):
        means = {}
        for name in ("trained", "trained on a CPU"):
            path = runs.folder / name / "heldout.json"
            measured = json.loads(path.read_text(encoding="utf-8"))[when] if path.exists() else None
            if measured is None:
                return
            prompts = [sum(group) / len(group) for group in measured["rewards"]]
            mean = sum(prompts) / len(prompts)
            variance = sum((one - mean) ** 2 for one in prompts) / (len(prompts) - 1)
            means[name] = mean, variance / len(prompts)
            scores = ", ".join(f"{key} {value:.3g}" for key, value in measured["scores"].items() if value is not None)
            rows.add(f"held-out reward {when} training: {name}", mean, of=re.sub(r"\s+", " ", scores))
        (one, var_one), (two, var_two) = means.values()
        apart = abs(one - two) / math.sqrt(var_one + var_two or 1.0)
        rows.add(f"held-out reward {when} training: device against CPU", apart, "standard errors", None, 3, least=False)
