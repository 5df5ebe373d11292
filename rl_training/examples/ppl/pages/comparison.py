"""What a training run leaves to look at: the reward's curve, and held-out scores before and after."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..data import message_text
from ..definitions import COLORS, LEVELS
from ..files import write_atomically
from ..training.heldout import HeldOut, gained_by_any


def print_comparison(before: HeldOut, after: HeldOut) -> None:
    """A table of the held-out scores, and one prompt's completion before and after."""
    count = sum(map(len, before.completions))
    table = Table(title=f"Held-out: {count} completions of {len(before.prompts)} prompts", title_justify="left")
    table.add_column("mean of")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name, value in before.scores.items():
        new = after.scores[name]
        table.add_row(name, f"{value:.3f}", f"{new:.3f}", f"{new - value:+.3f}")
    console = Console()
    console.print(table)
    if warning := gained_by_any(before.scores, after.scores):
        console.print(warning, markup=False, highlight=False)
    prompt = before.prompts[0] if isinstance(before.prompts[0], str) else message_text(before.prompts[0][-1:])
    for title, text in (("prompt", prompt), ("before", before.completions[0][0]), ("after", after.completions[0][0])):
        console.print(f"[bold]{title}:[/bold] ", end="")
        console.print(" ".join(text.split()), markup=False, highlight=False)


def plot_training(log_history: list[dict], path: Path) -> None:
    """PNG with the reward and the improvement of each level over the optimizer steps of a run.

    log_history: TRL's, whose entries hold `step`, `reward`, `reward_std`, `reward_word`, ...
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logs = [entry for entry in log_history if entry.get("reward") is not None]  # None: all rows were skipped
    steps = [entry["step"] for entry in logs]
    reward = [entry["reward"] for entry in logs]
    spread = [entry.get("reward_std") or 0.0 for entry in logs]
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # and not pyplot's, which is the caller's own
    top, bottom = figure.subplots(2, 1, sharex=True)
    low, high = zip(*((r - s, r + s) for r, s in zip(reward, spread, strict=True)), strict=True) if logs else ((), ())
    top.fill_between(steps, low, high, color="0.3", alpha=0.15, linewidth=0, label="± standard deviation")
    top.plot(steps, reward, color="0.2", marker="o", markersize=3, label="mean reward")
    top.set_ylabel("reward")
    top.set_title("Reward of the sampled completions")
    for level, dashes in zip(LEVELS, ("-", "--", ":"), strict=True):
        values = [entry.get(f"reward_{level}", float("nan")) for entry in logs]
        bottom.plot(steps, values, dashes, color=COLORS[level], marker="o", markersize=3, label=level)
    bottom.axhline(0, color="0.6", linewidth=0.8)
    bottom.set_ylabel("improvement over baseline, %")
    bottom.set_xlabel("optimizer step")
    for axes in (top, bottom):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
