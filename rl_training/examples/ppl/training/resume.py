"""Where a stopped run goes on: its newest whole checkpoint, and the command for it."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from psutil import Error, Process

from ..errors import InputError
from ..notebooks import script_name

STATE_FILE = "reward_state.json"  # of `ppl.training.callbacks.RewardState`: written last
LATEST = "latest"
SCRIPT = "train_grpo_multilevel_unsloth.py"


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from; None if none is asked for. asked: its folder, or `LATEST` of `output_dir`.

    Raises `InputError` if there is none, or if it is not whole: a killed process leaves half of one.
    """
    if asked is None:
        return None
    if asked == LATEST:
        states = Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")
        newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise InputError(f"--resume_from_checkpoint: no whole checkpoint in --output_dir {output_dir}")
        asked = str(newest.parent)
    for name in ("trainer_state.json", STATE_FILE):
        if not Path(asked, name).is_file():
            raise InputError(
                f"--resume_from_checkpoint {asked} holds no {name}: expected a checkpoint-N folder of this script, "
                "written to its end; without a value, the newest in --output_dir is taken"
            )
        try:
            json.loads(Path(asked, name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{Path(asked, name)} is damaged ({error}): go on with another checkpoint") from error
    return asked


def resume_command(argv: Sequence[str], checkpoint: str) -> str:
    """The command line of this process with the checkpoint to go on from in place of an earlier one."""
    words = list(argv)
    for index, word in enumerate(words):
        if word.partition("=")[0] == "--resume_from_checkpoint":
            has_value = "=" not in word and index + 1 < len(words) and not words[index + 1].startswith("--")
            del words[index : index + 1 + has_value]
            break
    return shlex.join([*launched(words), "--resume_from_checkpoint", checkpoint])


def launched(argv: Sequence[str]) -> list[str]:
    """The words of the command line that started this process, its launcher's included, with these arguments."""
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if processes == "1" else _launcher() or ["accelerate", "launch", "--num_processes", processes]
    return [*launcher, script_name(SCRIPT), *argv]


def _launcher() -> list[str]:
    """What stands before the script in the command line of the process that started this one; [] if it did not."""
    try:
        parent = Process().parent()  # the first process of a container has none
        words = parent.cmdline() if parent else []  # python /usr/bin/accelerate launch --config_file FILE script.py ...
    except Error:  # it belongs to somebody else, or has just ended
        return []
    if sys.argv[0] not in words[2:]:
        return []
    first = 0 if words[1].startswith("-") else 1  # python -m torch.distributed.run ...
    return [Path(words[first]).name, *words[first + 1 : words.index(sys.argv[0])]]
