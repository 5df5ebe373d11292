"""A .venv that make did not create is never deleted, and the demo's last lines are commands that run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# `make test` hands its flags down, by which a make within would say which folder it enters and leaves.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the Makefile, whose requirements cannot be installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements-cpu.txt").write_text("torch==0.0.0\n")
    return tmp_path


def make(folder: Path, *words: str, code: int) -> str:
    command = ["make", *words, f"PYTHON={sys.executable}", "KIND=cpu"]
    environment = {**ALONE, "PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_venv_of_somebody_elses_is_never_deleted(clone):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    mine = clone / ".venv" / "mine"
    mine.touch()
    assert "1/2  torch==0.0.0" in make(clone, "setup", code=2)  # an install that fails
    assert mine.exists() and (clone / ".venv" / ".installing").exists()
    make(clone, "setup", code=2)  # and what it left behind
    assert mine.exists()
    assert "Kept .venv" in make(clone, "clean", code=0)
    assert mine.exists()
    (clone / ".venv" / "bin" / "python").unlink()  # its Python is not the one that is asked for
    assert "error: .venv, which make did not create, has not Python 3." in make(clone, "setup", code=2)
    assert mine.exists()


def test_what_is_left_of_its_own_install_is(clone):
    """It starts over."""
    (clone / ".venv").mkdir()
    for name in (".made-by-make", ".installing", "old"):
        (clone / ".venv" / name).touch()
    assert "1/2  torch==0.0.0" in make(clone, "setup", code=2)
    assert not (clone / ".venv" / "old").exists() and (clone / ".venv" / ".made-by-make").exists()
    make(clone, "clean", code=0)
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("model", ["tiny-stories", "smollm2"])
def test_the_last_lines_of_the_demo_are_commands_with_files_that_are_there(model, tmp_path):
    out = tmp_path / "out"
    words = ["make", "-n", "demo", f"MODEL={model}", f"OUT={out}", "-o", "setup", "-o", "smollm2"]
    printed = subprocess.run(words, cwd=ROOT, env=ALONE, capture_output=True, text=True, check=True).stdout
    last = printed[printed.rindex("printf ") :].replace("\\\n", "")
    lines = subprocess.run(["sh", "-c", last], capture_output=True, text=True, check=True).stdout
    commands = re.split(r"\n  (?=\S)", lines[lines.index("Go on in this shell") :].rstrip().replace("\\\n", " "))[1:]
    assert [shlex.split(one)[:2] for one in commands] == [
        ["source", str(ROOT / ".venv" / "bin" / "activate")],
        ["cd", str(ROOT / "rl_training" / "examples")],
        ["python", "multi_level_ppl_trl.py"],
        ["python", "compute_baselines_trl.py"],
        ["python", "train_grpo_multilevel_unsloth.py"],
    ]
    assert shlex.split(commands[2])[3] == str(out / "training")
