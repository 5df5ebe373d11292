"""Work that can be killed at any moment: finished windows of rows are kept until all are there.

A window is some consecutive rows of the data set, and a line of JSON. Each process appends to a file of its own. A last
line without its end was torn by a crash: it does not count, and is cut off before the next one is written. A line does
not depend on who wrote it, so any number of processes, in any number of runs, may each add some.
"""

import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_text

_FINISHED = "finished"


class Parts:
    """The folder beside `output`: finished windows, and the settings that they were made with."""

    def __init__(self, output: Path) -> None:
        self.folder = Path(f"{output}.parts")
        self._settings = self.folder / "settings.json"
        self._headers: dict[int, dict] = {}  # of the finished windows that `look` has found, by number
        self._places: dict[int, tuple[Path, int]] = {}  # a window's file and where in it its line begins
        self._ends: dict[Path, int] = {}  # where a file's last whole line ends

    def settings(self) -> dict:
        """What the windows were made with; {} if nothing is there."""
        try:
            return {**json.loads(self._settings.read_text(encoding="utf-8"))}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._settings} cannot be read ({error}): delete {self.folder} to start anew"
            ) from error

    def check(self, settings: Mapping) -> None:
        """Raises `InputError` if windows were made with another value of one of `settings`."""
        theirs = self.settings() if self.look() else {}
        for name, mine in settings.items():
            if theirs and theirs.get(name) != mine:
                raise InputError(
                    f"{self.folder} holds the parts of a run with {name} {json.dumps(theirs.get(name))}, now it is "
                    f"{json.dumps(mine)}: repeat that run's command to finish it, choose another output, or delete the "
                    "folder to start anew"
                )

    def make(self) -> None:
        """Make the folder, unless it is there. Raises `InputError` if it cannot be made or is somebody else's."""
        with cannot_write(self.folder):
            self.folder.mkdir(exist_ok=True)
            there = os.listdir(self.folder)
        foreign = [name for name in there if not name.startswith((".", "process-"))]
        if foreign and self._settings.name not in there:
            raise InputError(
                f"{self.folder} holds {foreign[0]}, which this script did not write: choose another output"
            )

    def start(self, settings: Mapping, **kept) -> None:
        """Note the settings of the windows to come, and `kept` with them, unless some are there already.

        Raises `InputError` if those were made with other settings.
        """
        self.check(settings)
        if not self.look():
            with cannot_write(self.folder):
                write_text(self._settings, json.dumps({**settings, **kept}, indent=2), "surrogatepass")

    def look(self) -> Mapping[int, dict]:
        """The headers of all windows that are finished by now, by number."""
        for path in self.folder.glob("*.jsonl"):
            if path.stem.isdigit():
                raise InputError(f"{path} is of an earlier version: finish with that one, or delete {self.folder}")
            with open(path, "rb") as file:
                at = file.seek(self._ends.get(path, 0))
                while (line := file.readline()).endswith(b"\n"):
                    try:
                        number, header, _ = json.loads(line)
                    except (ValueError, TypeError) as error:
                        raise InputError(
                            f"{path} is damaged: delete it, and the same command scores its rows again"
                        ) from error
                    self._headers[number], self._places[number] = header, (path, at)
                    at += len(line)
                self._ends[path] = at
        return self._headers

    def total(self, name: str) -> int:
        """The sum over all finished windows of what their headers say under a name."""
        return sum(header[name] for header in self.look().values())

    def write(self, number: int, header: Mapping, records: list[list], writer: int) -> None:
        """Add a window. writer: the index of this process, which no other has."""
        path = self.folder / f"windows-{writer}.jsonl"
        self.look()
        with cannot_write(self.folder), open(path, "ab") as file:
            file.truncate(self._ends.get(path, 0))
            file.write(json.dumps([number, header, records]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> Iterator[list]:
        """Those of all finished windows, in the order of the windows."""
        for _, (path, at) in sorted(self._places.items()):
            with open(path, "rb") as file:
                file.seek(at)
                yield from json.loads(file.readline())[2]

    def remove(self) -> None:
        """The settings file goes last: a later run needs it to know that the folder is one of ours, half removed."""
        ours = [path for path in self.folder.iterdir() if path.is_file() and path != self._settings]
        for path in [*ours, self._settings]:
            path.unlink(missing_ok=True)
        self.folder.rmdir()


class Processes:
    """Who else works on the same parts: one process, or those of `accelerate launch` or torchrun.

    Each holds a lock in the folder as long as it lives, so that the others see when it has died.
    """

    def __init__(self, device: str | None = None) -> None:
        self.index, self.count = 0, 1
        self.device = device  # this process's own; None: whatever is best
        self._state: Any = None  # accelerate.PartialState, of several processes
        self._lock: Any = None  # the open file that is locked
        sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
        if any(int(os.environ.get(name, 1)) > 1 for name in sizes):
            import torch
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
            self.index, self.count = self._state.process_index, self._state.num_processes
            self.device = str(self._state.device)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @property
    def name(self) -> str:
        return f"process {self.index} of {self.count}"

    def wait(self) -> None:
        """For all to arrive here. If one cannot, it has said why; the others leave."""
        if self._state:
            try:
                self._state.wait_for_everyone()
            except RuntimeError:
                raise SystemExit(1) from None

    def claim(self, parts: Parts) -> None:
        """Take this process's lock, which a dead one has lost. Raises `InputError` if another run has it, or if this
        machine does not see the folder."""
        if not parts.folder.exists():
            raise InputError(
                f"{parts.folder}, which the first process made, cannot be seen on {platform.node()}: choose an "
                "output in a folder that all machines share"
            )
        with cannot_write(parts.folder):
            lock = open(parts.folder / f"process-{self.index}", "a+")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with lock:
                lock.seek(0)
                other = lock.read().strip()
            raise InputError(f"another run ({other}) is at work in {parts.folder}: wait until it has ended") from error
        self._lock = lock
        self._say(f"process id {os.getpid()}")
        if self.count > 1:
            signal.signal(signal.SIGTERM, self._stopped)

    def finish(self) -> None:
        """This process has done its share."""
        if self.count > 1:
            self._say(_FINISHED)

    def failed(self, error: BaseException) -> None:
        """This process ends with `error`: the others find it in its lock file."""
        if self._lock and self.count > 1:
            self._say(f"{type(error).__name__}: {error}")

    def died(self) -> str:
        """The processes that ended before their share was done, each with its reason if it left one; "" if none did."""
        reasons = []
        for index in range(self.count):
            last = self._last_words(index)
            if last not in (None, _FINISHED):
                reason = "killed, perhaps for want of memory" if last.startswith("process id") else last
                reasons.append(f"process {index} of {self.count} has ended ({reason})")
        return "; ".join(reasons)

    def close(self) -> None:
        if self._lock:
            self._lock.close()
        if self._state:
            self._state.destroy_process_group()

    def _say(self, text: str) -> None:
        self._lock.truncate(0)
        self._lock.write(text)
        self._lock.flush()

    def _last_words(self, index: int) -> str | None:
        """What a process left in its lock file; None while it lives."""
        if index == self.index:
            return None
        with open(Path(self._lock.name).with_name(f"process-{index}"), encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return file.read().strip()

    def _stopped(self, *_) -> None:
        """The launcher stops all processes once one has died: the first that is left says which; the others stay until
        it has looked, not to be taken for dead."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if any(self._last_words(index) is None for index in range(self.index)):
            time.sleep(2)
            raise SystemExit(1)
        raise InputError(f"{self.died() or 'stopped'}: the same command goes on from here")


@contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turns an `OSError` within it into an `InputError` that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}): make room or choose another folder; from parts that are "
            "there, the same command goes on"
        ) from error
