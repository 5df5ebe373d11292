"""The training script run as its users run it, and what it leaves behind."""

import json
import os
import re
import subprocess
from pathlib import Path

import warm
from waiting import PATIENCE

EXAMPLES = Path(__file__).parent.parent / "rl_training" / "examples"
SHORT = ["--max_samples", "20", "--heldout_samples", "2", "--max_new_tokens", "12", "--logging_steps", "1"]


def train(*flags: str, code: int = 0, python: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """python: `sys.executable` for a fresh interpreter."""
    done = subprocess.run(
        [python or warm.python(), "train_grpo_multilevel_unsloth.py", *map(str, flags)],
        cwd=EXAMPLES,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def staircase(low: int, high: int, step: int) -> list[str]:
    """--reward_thresholds whose reward is linear in the improvement, from 0 at `low` % to 1 at `high` %, rounded down
    to a step."""
    return ["--reward_thresholds", *(f"{at}:{(at - low) / (high - low)}" for at in range(low, high + 1, step))]


def refusal(*flags: str, python: str | None = None) -> str:
    """The one line on stderr of a run that is refused with exit code 2."""
    lines = train(*flags, code=2, python=python).stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def log_history(output: Path, step: int) -> list[dict]:
    return json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def run_code(text: str, folder: Path) -> str:
    """What the Python of a card, or of the training script's last lines, prints in a fresh process."""
    blocks = re.findall(r"```python\n(.*?)```|<<'END'\n(.*?)\nEND\n", text, flags=re.DOTALL)
    code = "".join(of_card or of_script for of_card, of_script in blocks)
    done = subprocess.run([warm.python(), "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
