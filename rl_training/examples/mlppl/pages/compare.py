"""Runs side by side: what changed on the held-out prompts that they share, and what each writes, before and after.

    python -m mlppl.pages.compare RUN [RUN ...] --html compare.html

RUN is the --output_dir of a training that has ended. The first is the one that the others are compared with.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import cli
from ..errors import InputError
from ..files import writable_file, write_text

if TYPE_CHECKING:  # to import it takes seconds
    from ..training.results import HeldOut, Row

SHOWN, PRINTED = 8, 3  # prompts whose completions stand on the page, and in the terminal
OF_TEXTS = ("KL", "distinct-2", "repetition", "words")  # scores that no scorer and no reward changes
# Settings of a reward that no perplexity depends on. (Levels with another view have another name.)
PAID = {"form", "weights", "reward_thresholds", "rewards", "missing", "allow_baseline_mismatch", "normalize", "levels",
        "baselines"}  # fmt: skip


class Run(NamedTuple):
    name: str
    sampling: dict
    rewarded: dict
    before: "HeldOut"
    after: "HeldOut"


class Line(NamedTuple):
    """One run's line of one score. against: after training, the difference to the first run; None where the two are not
    to be compared."""

    run: str
    row: "Row"
    against: "Row | None"


def parse_args(argv=None):
    parser = cli.parser("Compares trainings by what their held-out prompts gave, paired by prompt.")
    parser.prog = "python -m mlppl.pages.compare"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output_dir of a training that has ended")
    parser.add_argument("--html", metavar="OUT", help="also write a page with charts and stories to this file")
    return parser.parse_args(argv)


@cli.script
def main(argv) -> int:
    return cli.run(parse_args(argv), lambda args: compare(args.runs, args.html))


def compare(folders: Sequence[str], html_file: str | None) -> int:
    page = None if html_file is None else writable_file(html_file, "--html")
    runs, notes = shared(load(folders))
    table = lines(runs)
    print_lines(table, runs, notes)
    if page is not None:
        write_text(page, html(table, runs, notes), "replace")
        print(f"Wrote {html_file}")
    return 0


def load(folders: Sequence[str]) -> list[Run]:
    """Raises `InputError` for a folder without the held-out numbers of a training that has ended."""
    from ..training.results import read_heldout

    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(folders)
    runs = []
    for name, folder in zip(names, folders, strict=True):
        path = Path(folder, "heldout.json")
        if not path.is_file():
            raise InputError(f"{folder} holds no heldout.json: expected the --output_dir of a training")
        sampling, rewarded, before, after = read_heldout(path)
        if after is None:
            raise InputError(f"{path} has no numbers after training: expected a run that has ended")
        if not before.by_prompt or not after.by_prompt:
            raise InputError(f"{path} is of an earlier version, which kept no numbers by prompt: run it again")
        runs.append(Run(name, sampling, rewarded, before, after))
    return runs


def shared(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """(the runs with the prompts that all of them have, what has to be said of the rest and of other settings).

    Raises `InputError` without such a prompt.
    """
    from ..data import message_text, prompt_key
    from ..scoring.heatmap import one_line
    from ..training.results import remarks

    prompts = [{prompt_key(prompt): prompt for prompt in run.before.prompts} for run in runs]
    keys = [key for key in prompts[0] if all(key in others for others in prompts)]
    if not keys:
        names = ", ".join(run.name for run in runs)
        raise InputError(f"{names} share no held-out prompt: expected runs with the same data set, columns and --seed")
    notes = []
    for run, own in zip(runs, prompts, strict=True):
        if left := [f"'{one_line(message_text(prompt)):.40}'" for key, prompt in own.items() if key not in keys]:
            notes.append(f"{run.name}: {len(left)} prompts that not every run has are left out: {', '.join(left)}")
    runs = [run._replace(before=run.before.of_prompts(keys), after=run.after.of_prompts(keys)) for run in runs]
    asked = [{**run.sampling, **run.rewarded} for run in runs]
    if names := differing(asked):
        values = (", ".join(json.dumps(one.get(name), ensure_ascii=False) for one in asked) for name in names)
        told = "; ".join(f"{name} {of_runs:.200}" for name, of_runs in zip(names, values, strict=True))
        notes.append(f"The runs differ in {told}")
    of_runs = [f"{run.name}: {remark}" for run in runs for remark in remarks(run.before, run.after)]
    return runs, notes + of_runs


def differing(settings: Sequence[Mapping]) -> list[str]:
    """The names whose values are not the same for all."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def lines(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """By score, as it is shown, a line for each run that has it."""
    from ..training.results import Row, paired, rows

    found: dict[str, list[Line]] = {}
    scores = [dict(zip(run.before.scores, rows(run.before, run.after), strict=True)) for run in runs]
    for run, of_run in zip(runs, scores, strict=True):
        differ = {*differing([runs[0].rewarded, run.rewarded])}
        for name, row in of_run.items():
            against, first = None, scores[0].get(name)
            if run is not runs[0] and first and first.name == row.name and comparable(name, differ):
                change, error = paired(name, runs[0].after.by_prompt[name], run.after.by_prompt[name])
                against = Row(row.name, first.after, row.after, change, error, row.unit)
            found.setdefault(row.name, []).append(Line(run.name, row, against))
    return found


def comparable(name: str, differ: set[str]) -> bool:
    """Whether a score means the same in two runs whose rewards differ in these settings."""
    from ..training.results import FOUND, PPL

    if name in OF_TEXTS:
        return True
    return not (differ - PAID if name.endswith(PPL) or name.startswith(FOUND) else differ)


def stories(runs: Sequence[Run]) -> list[tuple]:
    """Per prompt, (the prompt, [(whose, text)]): the first completion of each run, before training only once where it
    is the same."""
    from ..data import message_text

    def whose(names: str) -> str:
        return f": {names}" if len(runs) > 1 else ""

    found = []
    for index, prompt in enumerate(runs[0].before.prompts):
        before: dict[str, list[str]] = {}
        for run in runs:
            before.setdefault(run.before.completions[index][0], []).append(run.name)
        texts = [(f"Before{whose(', '.join(names))}", text) for text, names in before.items()]
        texts += [(f"After{whose(run.name)}", run.after.completions[index][0]) for run in runs]
        found.append((message_text(prompt if isinstance(prompt, str) else prompt[-1:]), texts))
    return found


def print_run(before: "HeldOut", after: "HeldOut") -> None:
    """What changed on the held-out prompts of one run, and what it writes, before and after."""
    from ..training.results import remarks

    run = Run("", {}, {}, before, after)
    print_lines(lines([run]), [run], remarks(before, after))


def print_lines(table: Mapping[str, Sequence[Line]], runs: Sequence[Run], notes: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..training.results import decimal

    scales = "; ".join(dict.fromkeys(run.before.scale for run in runs))
    prompts, completions = len(runs[0].before.prompts), sum(map(len, runs[0].before.completions))
    over = f"{completions} completions of {prompts} prompts that were held out"
    title = f"Means over {over}, ± standard error of paired differences; {scales}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    several = len(runs) > 1
    for name in ("mean of", *(["run"] if several else [])):
        shown.add_column(name)
    for name in ("before", "after", "change", *([f"against {runs[0].name}"] if several else [])):
        shown.add_column(name, justify="right")
    for name, of_runs in table.items():
        for index, (run, row, against) in enumerate(of_runs):
            cells = [decimal(row.before), decimal(row.after), row.shown]
            if several:
                cells = [run, *cells, against.shown if against else ""]
            style = "dim" if row.said and not several else None
            shown.add_row("" if index else name, *cells, style=style, end_section=several and index == len(of_runs) - 1)
    console = Console()
    console.print(shown)
    for note in notes:
        console.print(" ".join(note.split()), markup=False, highlight=False)
    for prompt, texts in stories(runs)[:PRINTED]:
        console.print()
        for title, text in (("Prompt", prompt), *texts):
            console.print(" ".join(f"{title}: {text}".split()), markup=False, highlight=False)


def html(table: Mapping[str, Sequence[Line]], runs: Sequence[Run], notes: Sequence[str]) -> str:
    """The page: a card for each score, and the stories of the first `SHOWN` prompts."""
    from ..scoring.heatmap import ENVIRONMENT
    from . import run as report

    cards = []
    for name, of_runs in table.items():
        drawn = [one for line in of_runs for one in (line.row, line.against) if one and one.error == one.error]
        reach = max((abs(one.change) + 2 * one.error for one in drawn), default=0.0) or 1.0
        cards.append((name, of_runs, reach))
    return str(
        ENVIRONMENT.get_template("compare.html.j2").module.page(
            cards=cards,
            runs=[run.name for run in runs],
            prompts=len(runs[0].before.prompts),
            pairs=stories(runs)[:SHOWN],
            notes=report.notes_of([line.row for of_runs in table.values() for line in of_runs]),
            remarks=notes,
            colors=report.LINE_COLORS,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
