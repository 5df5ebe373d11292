"""A data set -> its baselines file, by however many processes, from wherever an earlier run stopped."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from ..errors import InputError
from ..identity import differences
from .assemble import assemble
from .parts import Parts, Processes
from .plan import Job, check_other_splits, is_complete, prepare
from .rows import windows
from .scores import Scorer, load_scorer, score_window

WINDOW_ROWS = 4096
# A window is what a crash costs, and holds several batches, so that rows of like length meet in one.
WINDOW_CHARACTERS = {"cpu": 32_000, "cuda": 1_000_000}


def compute(args: argparse.Namespace, load: Callable[..., Scorer] = load_scorer) -> int:
    """Make the file that `args` asks for, or go on with it. What can be refused is refused before a model is loaded."""
    processes = Processes(args.device)
    try:
        return _compute(args, load, processes)
    except KeyboardInterrupt:
        if processes.is_main:
            kept = len(Parts(Path(args.output_path)).look())
            where = f": {kept} parts are kept, the same command goes on from them" if kept else ""
            print(f"stopped{where}", file=sys.stderr)
        return 130
    except Exception as error:
        processes.failed(error)
        if processes.is_main:
            raise
        if isinstance(error, InputError):
            raise InputError(f"{processes.name}: {error}") from error
        print(f"error: {processes.name}: {type(error).__name__}: {error}", file=sys.stderr)
        raise
    finally:
        processes.close()


def _compute(args: argparse.Namespace, load: Callable[..., Scorer], processes: Processes) -> int:
    # The main process looks first: what it refuses is said once.
    job = prepare(args) if processes.is_main else None
    processes.wait()
    job = job or prepare(args, survey=False)
    if is_complete(job.parts, job.output):
        processes.wait()
        if processes.is_main:
            job.parts.remove()
            print(f"{job.output} is complete")
        return 0

    # In a notebook rich would show what other libraries' progress bars write, and they what it writes.
    console = Console(stderr=True, quiet=not processes.is_main, force_jupyter=False)
    with console.status(f"Loading {args.model_name} ..."):
        scorer = load(args, job.columns, processes.device or args.device)
    through_template = scorer.identity.get("prompt", {}) if job.is_conversational() else {}
    scorer.identity["prompt"] = {**job.form.identity, **through_template}
    if args.output_dataset is not None:
        check_other_splits(args, scorer.identity)
    settings = {**job.settings, **{key: scorer.identity[key] for key in ("model", "tokenizer", "unsloth", "versions")}}
    # The surprisals of the fixed text are the same but for rounding.
    settings["model"] = {name: value for name, value in settings["model"].items() if name != "probe"}
    check_probe(job.parts, scorer.identity["model"])
    if processes.is_main:
        job.parts.make()
        processes.claim(job.parts)
    try:
        if processes.is_main:
            job.parts.start(
                settings,
                run=os.urandom(8).hex(),
                probe=scorer.identity["model"].get("probe"),
                plot=args.plot,
                output_dataset=args.output_dataset,
                window_rows=WINDOW_ROWS,
                window_characters=WINDOW_CHARACTERS.get(scorer.device, WINDOW_CHARACTERS["cuda"]),
            )
        processes.wait()
        if not processes.is_main:
            processes.claim(job.parts)
        processes.wait()
        started = time.monotonic()
        with Progress(job) if processes.is_main else nullcontext() as progress:
            count = score_windows(job, scorer, processes, progress)
            if progress is None:
                return 0
            wait_for_others(job, count, processes, progress)
        assemble(job, count, scorer.identity, progress.read, time.monotonic() - started)
    except BaseException:
        if processes.count == 1:
            job.parts.remove_if_empty()
        raise
    return 0


def check_probe(parts: Parts, model: dict) -> None:
    """Raises `InputError` if the parts were scored by a model, of the same name and weights, with other numbers."""
    kept = parts.settings().get("probe") if parts.look() else None
    if kept and (differing := differences({"model": {**model, "probe": kept}}, {"model": model})):
        before, now = differing["probe"]
        raise InputError(
            f"{parts.folder} was scored by another model: a fixed text had {before}, now it has {now}: load or serve "
            "that model again, or delete the folder to start anew"
        )


def score_windows(job: Job, scorer: Scorer, processes: Processes, progress: "Progress | None") -> int:
    """Score this process's share of the windows that are not there yet. Returns the number of all windows."""
    settings, done = job.parts.settings(), job.parts.look()
    count = 0
    for window in windows(job.rows(), settings["window_rows"], settings["window_characters"]):
        count += 1
        if window.number in done:
            if progress is not None and done[window.number]["digest"] != window.digest:
                raise InputError(
                    f"the data set is not the one that {job.parts.folder} was made from, it differs before row "
                    f"{window.rows[-1].number if window.rows else 0}: delete the folder to start anew"
                )
        elif window.number % processes.count == processes.index:
            job.parts.write(window.number, *score_window(window, scorer.score), processes.index)
            if progress is not None:
                progress.look()
    if done and max(done) >= count:
        raise InputError(f"{job.parts.folder} holds parts of more rows than the data set has: delete it to start anew")
    processes.finish()
    return count


def wait_for_others(job: Job, count: int, processes: Processes, progress: "Progress") -> None:
    while len(job.parts.look()) < count:
        # Asked before the folder is looked at again: who has finished by now has left its last window there.
        died = processes.died()
        if len(job.parts.look()) < count and died:
            raise InputError(f"{died}: the same command goes on from here")
        time.sleep(0.2)
        progress.look()


class Progress:
    """A bar over all processes' windows, with tokens a second; a line every ten seconds where there is no terminal."""

    def __init__(self, job: Job) -> None:
        from tqdm import tqdm

        self._parts = job.parts
        self.read, self._read_before = 0, self._total("read")
        kept = self._total("rows")
        if kept:
            print(f"Going on from {job.parts.folder}: {kept} rows are scored", file=sys.stderr)
        terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._bar = tqdm(
            total=job.texts or job.args.num_samples,
            initial=kept,
            unit=" rows",
            file=None if terminal else _Lines(),
            mininterval=0.1 if terminal else 10,
            delay=1,
            dynamic_ncols=terminal,
        )

    def look(self) -> None:
        """Count the windows that are new."""
        self.read = self._total("read") - self._read_before
        self._bar.set_postfix_str(f"{self.read / (time.monotonic() - self._started):,.0f} tokens/s", refresh=False)
        self._bar.update(self._total("rows") - self._bar.n)

    def _total(self, name: str) -> int:
        return sum(header[name] for header in self._parts.look().values())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()


class _Lines:
    """What tqdm writes over one line, as lines of their own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()
