"""Plots of what was measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..definitions import COLORS
from ..files import write_atomically


def plot_levels(levels: Mapping[str, Sequence[float]], path: str | Path, title: str) -> None:
    """Draw the distribution of each level's perplexities, on one logarithmic axis, with its median.

    levels: `{"word": float64 [N], ...}`, finite and positive. path: .png, .pdf or .svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    values = {level: np.asarray(of_level, dtype=float) for level, of_level in levels.items()}
    everything = np.concatenate(list(values.values()))
    low, high = everything.min(), everything.max()
    if high / low < 1.01:
        low, high = low / 1.1, high * 1.1
    edges = np.geomspace(low, high, 8 + min(52, int(1.5 * math.sqrt(len(everything) / len(values)))))

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(values), 1, sharex=True, sharey=True)
    figure.suptitle(title)
    for axis, (level, of_level) in zip(np.atleast_1d(axes), values.items(), strict=True):
        median = np.median(of_level)
        axis.hist(of_level, bins=edges, color=COLORS[level])
        axis.axvline(median, color="black", linestyle="--", linewidth=1)
        axis.annotate(f"{level}\nmedian {median:,.4g}", xy=(0.99, 0.92), xycoords="axes fraction", ha="right", va="top")
        axis.set_xscale("log")
        axis.set_ylabel("texts")
        axis.spines[["top", "right"]].set_visible(False)
    if high / low < 10:
        axis.xaxis.set_major_locator(MaxNLocator(8))
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("perplexity")
    write_atomically(Path(path), lambda file: figure.savefig(file, format=Path(path).suffix[1:], dpi=150))
