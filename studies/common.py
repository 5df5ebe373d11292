"""What the studies share: where the scripts are, flags, tables that are Markdown in a pipe, files that are whole."""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "rl_training" / "examples"


def add_run_flags(parser: argparse.ArgumentParser, output_dir: str, kept: str, arms: Iterable[str], steps: int) -> None:
    """The flags of a study that trains. kept: what the output folder holds beside the runs."""
    from mlppl.cli import positive_int

    parser.add_argument("--output_dir", default=output_dir, help=f"{kept}, and a folder for each run")
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), help="what to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of each arm for each")
    parser.add_argument("--max_steps", type=positive_int, default=steps, help="optimizer steps of a run")


def run_folder(output: Path, arm: str, seed: int) -> Path:
    """Where a run's files are: of its arm, without what a shell would ask to quote.

    >>> run_folder(Path("study"), "nested, nats", 0).as_posix()
    'study/nested_nats/seed_0'
    """
    return output / re.sub(r"\W+", "_", arm) / f"seed_{seed}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right; in a file or a pipe the table is Markdown."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(title=title, title_justify="left", box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_json(path: Path, content: dict) -> None:
    """nan, which a policy that collapsed to a word or two has for a score, becomes null."""
    from mlppl.files import without_nan, write_text

    text = json.dumps(without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text)


def write_figure(path: Path, figure) -> None:
    from mlppl.files import write_atomically

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def new_figure(width: float, height: float):
    """A matplotlib figure of this size in inches, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def quiet_axes(panels) -> None:
    """Panels whose rows have names: no frame but the scale's, no tick beside a name."""
    for axes in panels:
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)


def log_scale(axes) -> None:
    """Along x, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
