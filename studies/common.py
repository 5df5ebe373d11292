"""What the studies share: where the scripts are, tables that are Markdown in a pipe, files that are whole."""

import json
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "rl_training" / "examples"


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
    from ppl.files import write_text

    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text)


def write_figure(path: Path, figure) -> None:
    from ppl.files import write_atomically

    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def quiet_axes(panels) -> None:
    """Panels whose rows have names: no frame but the scale's, no tick beside a name."""
    for axes in panels:
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
