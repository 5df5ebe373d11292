"""A run's log entries -> line charts of the metrics that are there, in percent of a plot's width and height.

Not one figure of matplotlib: on a phone its letters were 4 px high, and no number could be read from a curve.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..config import ALL_LEVELS
from ..reward.terms import as_nats

MOST_POINTS = 240  # of a line; a longer log is averaged over runs of consecutive entries
DOTTED = 40  # up to so many points each is drawn as a dot, too
_BEYOND = 1e100  # no axis reaches that far

Points = dict[float, dict[str, float]]  # what was logged, by step


@dataclass(frozen=True)
class Spec:
    """A chart to draw if the log has any of `lines`, metrics by label.

    band: (label, lowest, highest metric), or (label, centre, +- metric) with `around`. include: values the axis reaches
    in any case. colours: those of the page's style, in turn.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    band: tuple[str, str, str] | None = None
    around: bool = False
    include: tuple[float, ...] = ()
    colours: Sequence[str] = ("main", "second", "third")


SPECS = (
    Spec(
        "Reward", "mean of the sampled completions", {"mean": "reward", "held-out split": "eval_reward"},
        band=("± standard deviation", "reward", "reward_std"), around=True, include=(0, 1),
    ),
    Spec(
        "Completion length", "tokens", {"mean": "completions/mean_length"},
        band=("shortest to longest", "completions/min_length", "completions/max_length"), include=(0,),
    ),
    Spec("Entropy", "nats a token", {"policy": "entropy"}, include=(0,)),
    Spec("KL to the reference", "nats a token", {"policy": "kl"}, include=(0,)),
    Spec(
        "What the groups have to compare", "shares",
        {
            "groups without spread": "frac_reward_zero_std",
            "reward 0 or less": "diagnostics/at_zero",
            "top reward": "diagnostics/at_top",
        },
        include=(0, 1),
    ),
    Spec(
        "Completions that cannot count", "shares",
        {
            "cut at the longest length": "completions/clipped_ratio",
            "blank": "diagnostics/unscorable",
            "without a baseline": "diagnostics/missing",
        },
        include=(0, 1),
    ),
    Spec(
        "Variety and length", "1 is the start of the run",
        {"distinct-2": "diagnostics/distinct_2_of_start", "length": "diagnostics/length_of_start"}, include=(0, 1),
    ),
    Spec("Loss", "", {"loss": "loss"}),
    Spec("Gradient norm", "", {"before clipping": "grad_norm"}, include=(0,)),
    Spec("Learning rate", "", {"learning rate": "learning_rate"}, include=(0,)),
)  # fmt: skip
_TOLD_ELSEWHERE = ("step", "epoch", "num_tokens", "total_flos")
# What is logged of levels, in an evaluation, too -> nats, where they are nested.
_NATS: dict[str, Callable] = {
    f"{when}{metric}{level}": nats
    for when in ("", "eval_")
    for metric, nats in (("reward_", as_nats), ("ppl/", np.log))
    for level in ALL_LEVELS
}


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    dashes: str  # SVG's stroke-dasharray
    path: str  # SVG, in a square of 100 x 100 whose y points down
    dots: str
    last: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: list[Line]
    band: tuple[str, str] | None  # label, SVG path
    x_ticks: list[tuple[float, str]]  # percent from the left
    y_ticks: list[tuple[float, str]]  # percent from the top
    zero: float | None  # percent from the top, inside the plot
    columns: list[str]
    rows: list[tuple[float, str, list[str]]]  # percent from the left, step, values
    description: str
    dotted: bool  # no line has two points: there is nothing to plot


def charts(
    log_history: Sequence[Mapping], names: Mapping[str, str] | None = None
) -> tuple[list[Chart], list[Chart], int]:
    """(the charts of `SPECS` that have a number, one of every other metric, the entries a point is the mean of).

    log_history: TRL's, whose entries hold `step` and numbers by name; what is missing or not finite leaves a gap.
    names: of nested levels (`RewardConfig.nested_names`): ratios and percentages of them are logged, nats are shown.
    """
    names = names or {}
    points, merged = _points([_in_nats(entry) for entry in log_history] if names else log_history)
    metrics = dict.fromkeys(name for logged in points.values() for name in logged)
    functions = {
        name.removeprefix("rewards/").removesuffix("/mean"): name
        for name in metrics
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    specs, told = list(SPECS), set(_TOLD_ELSEWHERE)
    if len(functions) > 1:
        specs.insert(4, Spec("Reward functions", "means, before their weights", functions, include=(0,)))
    else:  # the only one is the reward
        told.update(f"rewards/{label}/{what}" for label in functions for what in ("mean", "std"))
    specs[1:1] = _of_levels(names)
    told.update(name for spec in specs for name in (*spec.lines.values(), *(spec.band or ())))
    others = [
        Spec(name, "nats a token" if names and name in _NATS else "", {name: name})
        for name in metrics
        if name not in told and not name.startswith("train_")
    ]
    drawn, rest = ([chart for spec in some if (chart := _chart(spec, points))] for some in (specs, others))
    return drawn, rest, merged


def _of_levels(names: Mapping[str, str]) -> list[Spec]:
    """Nested levels have an axis each: a word's 7 nats would flatten what the phrases help."""
    gains, under = ({level: f"{what}{level}" for level in ALL_LEVELS} for what in ("reward_", "ppl/"))
    unit = "nats a token" if names else "%"
    gained = Spec("Improvement over the baseline", unit, gains, include=(0,), colours=ALL_LEVELS)
    if not names:
        return [gained, Spec("Perplexity", "under the frozen scorer", under, colours=ALL_LEVELS)]
    of_each = (
        Spec(name[0].upper() + name[1:], f"{unit}, ln of {under[level]}", {level: under[level]}, colours=(level,))
        for level, name in names.items()
    )
    return [gained, *of_each]


def _in_nats(entry: Mapping) -> dict:
    """A log entry of nested levels with nats in place of ratios and of percentages of them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            name: float(_NATS[name](value)) if name in _NATS and isinstance(value, int | float) else value
            for name, value in entry.items()
        }


def _points(log_history: Sequence[Mapping]) -> tuple[Points, int]:
    """The numbers of each step, or of so many consecutive steps the means, at the last one."""
    steps: Points = {}
    for entry in log_history:
        if "step" in entry:
            # TRL logs None where all rows of a step were skipped.
            numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
            steps.setdefault(entry["step"], {}).update(numbers)
    ordered = sorted(steps)
    size = max(1, math.ceil(len(ordered) / MOST_POINTS))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return {chunk[-1]: _mean([steps[step] for step in chunk]) for chunk in chunks}, size


def _mean(entries: Sequence[dict[str, float]]) -> dict[str, float]:
    if len(entries) == 1:
        return entries[0]
    means = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        values = [entry[name] for entry in entries if _drawable(entry.get(name))]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def _drawable(value: float | None) -> bool:
    return value is not None and abs(value) < _BEYOND  # False for NaN, too


def _chart(spec: Spec, points: Points) -> Chart | None:
    """None without a number."""
    lines = [
        (place, label, metric, values)
        for place, (label, metric) in enumerate(spec.lines.items())
        if (values := {step: logged[metric] for step, logged in points.items() if _drawable(logged.get(metric))})
    ]
    if not lines:
        return None
    points = {step: logged for step, logged in points.items() if any(metric in logged for _, _, metric, _ in lines)}
    band = {step: edges for step, logged in points.items() if (edges := _edges(spec, logged))}
    heights = [*spec.include, *(edge for edges in band.values() for edge in edges)]
    heights += [value for *_, values in lines for value in values.values()]
    y_ticks = _ticks(min(heights), max(heights), 6)
    bottom, top, right = y_ticks[0], y_ticks[-1], max(*points, 1)
    decimals = max(0, 2 - math.floor(math.log10(top - bottom)))  # a hundredth of the axis can be told

    def x(step) -> float:
        return round(100 * step / right, 2)

    def y(value) -> float:
        return round(100 * (top - value) / (top - bottom), 2)

    def shown(value) -> str:
        return _shown(value, decimals)

    drawn, sentences = [], []
    for place, label, metric, values in lines:
        path, pen = "", "M"
        for step, logged in points.items():
            if step in values:
                path, pen = f"{path}{pen}{x(step)} {y(values[step])}", "L"
            elif metric in logged:  # not finite
                pen = "M"
        runs = [run.split("L") for run in path.split("M")[1:]]
        dots = "".join(f"M{dot}h0" for run in runs if len(values) <= DOTTED or len(run) == 1 for dot in run)
        told = [f"{shown(values[step])} at step {step:,g}" for step in sorted(values, key=lambda s: (values[s], s))]
        first, last = (f"{shown(values[step])} at step {step:,g}" for step in (min(values), max(values)))
        more = f", {last}; lowest {told[0]}, highest {told[-1]}" if len(values) > 1 else ""
        sentences.append(f"{label}: {first}{more}")
        colour = spec.colours[place % len(spec.colours)]
        strokes = " ".join(map(str, dashes(place))) or "none"
        drawn.append(Line(label, colour, strokes, path, dots, shown(values[max(values)])))

    rows = []
    for step, logged in points.items():
        cells = [shown(logged[metric]) if metric in logged else "–" for _, _, metric, _ in lines]
        if step in band:
            low, high = band[step]
            cells.append(f"± {shown(logged[spec.band[2]])}" if spec.around else f"{shown(low)} to {shown(high)}")
        elif band:
            cells.append("–")
        rows.append((x(step), f"{step:,g}", cells))
    upper = [f"{x(step)} {y(high)}" for step, (_, high) in band.items()]
    lower = [f"{x(step)} {y(low)}" for step, (low, _) in band.items()]
    fewer = (n for n in range(decimals) if all(abs(round(tick, n) - tick) < 1e-6 * (top - bottom) for tick in y_ticks))
    fewest = next(fewer, decimals)
    large = max(-bottom, top) >= 1e5
    return Chart(
        spec.title, spec.unit, drawn,
        (spec.band[0], f"M{'L'.join(upper + lower[::-1])}Z") if band else None,
        [(x(tick), f"{tick:,g}") for tick in _ticks(0, right, 4) if tick == int(tick) and tick <= right],
        [(y(tick), _short(tick) if large else _shown(tick, fewest)) for tick in y_ticks],
        y(0) if bottom < 0 < top else None,
        [label for _, label, _, _ in lines] + ([spec.band[0]] if band else []),
        rows, ". ".join(sentences) + ".", all(len(values) == 1 for *_, values in lines),
    )  # fmt: skip


def dashes(place: int) -> list[int]:
    """Lengths of a line's strokes and gaps; [] for a line without gaps. No two places have the same."""
    return [[], [7, 4], [2, 3]][place] if place < 3 else [7, 3, *[2, 3] * (place - 2)]


def _edges(spec: Spec, logged: Mapping[str, float]) -> tuple[float, float] | None:
    """The lowest and the highest of the band at a step, if both can be drawn."""
    first, second = (logged.get(name) for name in spec.band[1:]) if spec.band else (None, None)
    if not (_drawable(first) and _drawable(second)):
        return None
    return (first - second, first + second) if spec.around else (first, second)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    locator = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])
    return [float(tick) for tick in locator.tick_values(low, high)]


def _short(tick: float) -> str:
    return f"{tick:.3g}".replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _shown(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    if decimals > 6 or abs(value) >= 1e7:
        return f"{value:.2e}".replace("-", "−") if value else "0"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−")
