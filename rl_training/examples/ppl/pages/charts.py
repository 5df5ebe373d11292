"""A run's log entries -> line charts of the metrics that are there, in percent of a plot's width and height.

Not one figure of matplotlib: on a phone its letters were 4 px high, and no number could be read from a curve.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from ..config import LEVELS

MOST_POINTS = 240  # of a line; a longer log is averaged over runs of consecutive entries
DOTTED = 40  # up to so many points each is drawn as a dot, too
FARTHEST = 50  # times the smallest of a chart's values is the largest, or the small ones look like zero
_BEYOND = 1e100  # no axis reaches that far


@dataclass(frozen=True)
class Spec:
    """A chart to draw if the log has any of `lines`: (label, metric, style). band: (label, lowest, highest metric), or
    (label, centre, +- metric) with `around`. include: values the axis reaches in any case. divisible: lines that are
    far apart get a chart each."""

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    band: tuple[str, str, str] | None = None
    around: bool = False
    include: tuple[float, ...] = ()
    divisible: bool = False


def _levels(metric: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((level, metric.format(level), level) for level in LEVELS)


SPECS = (
    Spec(
        "Reward", "mean of the sampled completions",
        (("mean", "reward", "main"), ("held-out split", "eval_reward", "second")),
        band=("± standard deviation", "reward", "reward_std"), around=True, include=(0, 1),
    ),
    Spec("Improvement over the baseline", "%", _levels("reward_{}"), include=(0,)),
    Spec("Perplexity", "under the frozen scorer", _levels("ppl/{}"), divisible=True),
    Spec(
        "Completion length", "tokens", (("mean", "completions/mean_length", "main"),),
        band=("shortest to longest", "completions/min_length", "completions/max_length"), include=(0,),
    ),
    Spec("Entropy", "nats a token", (("policy", "entropy", "main"),), include=(0,)),
    Spec("KL to the reference", "nats a token", (("policy", "kl", "main"),), include=(0,)),
    Spec(
        "What the groups have to compare", "shares",
        (
            ("groups without spread", "frac_reward_zero_std", "main"),
            ("reward 0 or less", "diagnostics/at_zero", "second"),
            ("top reward", "diagnostics/at_top", "third"),
        ),
        include=(0, 1),
    ),
    Spec(
        "Completions that cannot count", "shares",
        (
            ("cut at the longest length", "completions/clipped_ratio", "main"),
            ("blank", "diagnostics/unscorable", "second"),
            ("without a baseline", "diagnostics/missing", "third"),
        ),
        include=(0, 1),
    ),
    Spec(
        "Variety and length", "1 is the start of the run",
        (
            ("distinct-2", "diagnostics/distinct_2_of_start", "main"),
            ("length", "diagnostics/length_of_start", "second"),
        ),
        include=(0, 1),
    ),
    Spec("Loss", "", (("loss", "loss", "main"),)),
    Spec("Gradient norm", "", (("before clipping", "grad_norm", "main"),), include=(0,)),
    Spec("Learning rate", "", (("learning rate", "learning_rate", "main"),), include=(0,)),
)  # fmt: skip
_TOLD_ELSEWHERE = {"step", "epoch", "num_tokens", "total_flos"}


@dataclass(frozen=True)
class Line:
    label: str
    style: str
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


def charts(log_history: Sequence[Mapping]) -> tuple[list[Chart], list[Chart], int]:
    """(the charts of `SPECS` that have a number, one of every other metric, the entries a point is the mean of).

    log_history: TRL's, whose entries hold `step` and numbers by name; what is missing or not finite leaves a gap.
    """
    points, merged = _points(log_history)
    functions = [name for name in _names(points) if name.startswith("rewards/") and name.endswith("/mean")]
    specs = list(SPECS)
    told = _TOLD_ELSEWHERE | {name for spec in specs for name in _metrics(spec)}
    if len(functions) > 1:
        styles = ("main", "second", "third")
        lines = [(name.split("/")[1], name, styles[index % 3]) for index, name in enumerate(functions)]
        specs.insert(6, Spec("Reward functions", "means, before their weights", tuple(lines), include=(0,)))
        told.update(functions)
    elif functions:  # the only one is the reward
        told.update((functions[0], functions[0].removesuffix("mean") + "std"))
    specs = [one for spec in specs for one in _on_one_scale(spec, points)]
    others = [name for name in _names(points) if name not in told and not name.startswith("train_")]
    drawn = [chart for spec in specs if (chart := _chart(spec, points))]
    rest = [chart for name in others if (chart := _chart(Spec(name, "", ((name, name, "main"),)), points))]
    return drawn, rest, merged


def _on_one_scale(spec: Spec, points: Sequence[Mapping]) -> list[Spec]:
    """Nested levels have perplexities in the thousands and ratios below 1: each gets a chart of its own."""
    if not spec.divisible:
        return [spec]
    values = [abs(point[metric]) for point in points for _, metric, _ in spec.lines if _finite(point.get(metric))]
    if not values or max(values) < FARTHEST * min(values):
        return [spec]
    return [
        Spec(f"{spec.title}, {label} level", spec.unit, ((label, metric, style),))
        for label, metric, style in spec.lines
    ]


def _points(log_history: Sequence[Mapping]) -> tuple[list[dict], int]:
    """One dict a step, or of so many consecutive steps the means, at the last one."""
    steps: dict[float, dict] = {}
    for entry in log_history:
        if "step" in entry:
            # TRL logs None where all rows of a step were skipped.
            steps.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if v is not None})
    entries = [steps[step] for step in sorted(steps)]
    size = max(1, math.ceil(len(entries) / MOST_POINTS))
    return [_mean(entries[start : start + size]) for start in range(0, len(entries), size)], size


def _mean(entries: Sequence[Mapping]) -> dict:
    if len(entries) == 1:
        return dict(entries[0])
    means = {"step": entries[-1]["step"]}
    for name in _names(entries):
        given = [entry[name] for entry in entries if name in entry]
        finite = [value for value in given if _finite(value)]
        means[name] = sum(finite) / len(finite) if finite else math.nan
    return means


def _names(entries: Sequence[Mapping]) -> list[str]:
    names = dict.fromkeys(name for entry in entries for name in entry if name != "step")
    return [name for name in names if any(_number(entry.get(name)) for entry in entries)]


def _metrics(spec: Spec) -> list[str]:
    return [metric for _, metric, _ in spec.lines] + list(spec.band[1:] if spec.band else ())


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value) -> bool:
    return _number(value) and abs(value) < _BEYOND  # False for NaN, too


def _chart(spec: Spec, points: Sequence[Mapping]) -> Chart | None:
    lines = [line for line in spec.lines if any(_finite(point.get(line[1])) for point in points)]
    if not lines:
        return None
    band = _band(spec, points)
    points = [point for point in points if any(metric in point for _, metric, _ in lines)]
    values = [point[metric] for point in points for _, metric, _ in lines if _finite(point.get(metric))]
    values += [edge for _, low, high in band or () for edge in (low, high)] + list(spec.include)
    y_ticks = _ticks(min(values), max(values))
    x_ticks = [tick for tick in _ticks(0, max(points[-1]["step"], 1), most=4) if tick == int(tick)]
    bottom, top, right = y_ticks[0], y_ticks[-1], max(points[-1]["step"], 1)
    decimals = _decimals(y_ticks)
    largest = max(map(abs, y_ticks))
    fewest = next((n for n in range(decimals) if all(_exact(tick, n, top - bottom) for tick in y_ticks)), decimals)

    def x(step):
        return round(100 * step / right, 2)

    def y(value):
        return round(100 * (top - value) / (top - bottom), 2)

    drawn = []
    for label, metric, style in lines:
        runs = _runs([(x(p["step"]), p[metric]) for p in points if metric in p])
        drawn_runs = [[(left, y(value)) for left, value in run] for run in runs]
        path = "".join("M" + "L".join(f"{left} {up}" for left, up in run) for run in drawn_runs)
        dotted = [run for run in drawn_runs if sum(map(len, drawn_runs)) <= DOTTED or len(run) == 1]
        dots = "".join(f"M{left} {up}h0" for run in dotted for left, up in run)
        drawn.append(Line(label, style, path, dots, _shown(runs[-1][-1][1], decimals)))
    area = None
    if band:
        edge = [f"{x(step)} {y(high)}" for step, _, high in band]
        edge += [f"{x(step)} {y(low)}" for step, low, _ in reversed(band)]
        area = (spec.band[0], f"M{'L'.join(edge)}Z")
    columns = [label for label, _, _ in lines] + ([spec.band[0]] if band else [])
    of_step = {step: (low, high) for step, low, high in band or ()}
    rows = []
    for point in points:
        cells = [_shown(point[metric], decimals) if metric in point else "–" for _, metric, _ in lines]
        if band:
            cells.append(_span(of_step.get(point["step"]), spec, point, decimals))
        rows.append((x(point["step"]), f"{point['step']:,g}", cells))
    return Chart(
        spec.title, spec.unit, drawn, area,
        [(x(tick), f"{tick:,g}") for tick in x_ticks if tick <= right],
        [(y(tick), _short(tick) if largest >= 1e5 else _shown(tick, fewest)) for tick in y_ticks],
        y(0) if bottom < 0 < top else None,
        columns, rows, _description(lines, points, decimals),
    )  # fmt: skip


def _band(spec: Spec, points: Sequence[Mapping]) -> list[tuple[float, float, float]] | None:
    """(step, lowest, highest) wherever both are known; None if they never are."""
    if spec.band is None:
        return None
    edges = []
    for point in points:
        first, second = (point.get(name) for name in spec.band[1:])
        if _finite(first) and _finite(second):
            low, high = (first - second, first + second) if spec.around else (first, second)
            edges.append((point["step"], low, high))
    return edges or None


def _span(edges, spec: Spec, point: Mapping, decimals: int) -> str:
    if edges is None:
        return "–"
    if spec.around:
        return f"± {_shown(point[spec.band[2]], decimals)}"
    return f"{_shown(edges[0], decimals)} to {_shown(edges[1], decimals)}"


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches without a number that is not finite."""
    runs: list[list] = [[]]
    for left, value in points:
        if _finite(value):
            runs[-1].append((left, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    locator = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])
    return [float(tick) for tick in locator.tick_values(low, high)]


def _decimals(ticks: Sequence[float]) -> int:
    """Enough that a hundredth of the axis can be told."""
    return max(0, 2 - math.floor(math.log10(ticks[-1] - ticks[0])))


def _exact(tick: float, decimals: int, span: float) -> bool:
    return abs(round(tick, decimals) - tick) < 1e-6 * span


def _short(tick: float) -> str:
    return f"{tick:.3g}".replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _shown(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    if decimals > 6 or abs(value) >= 1e7:
        return f"{value:.2e}".replace("-", "−") if value else "0"
    return f"{value:,.{decimals}f}".replace("-", "−")


def _description(lines, points, decimals: int) -> str:
    sentences = []
    for label, metric, _ in lines:
        values = [(point[metric], point["step"]) for point in points if _finite(point.get(metric))]
        (first, start), (last, end) = values[0], values[-1]
        sentence = f"{label}: {_shown(first, decimals)} at step {start:,g}"
        if len(values) > 1:
            lowest, highest = min(values), max(values)
            sentence += (
                f", {_shown(last, decimals)} at step {end:,g}; lowest {_shown(lowest[0], decimals)} at step "
                f"{lowest[1]:,g}, highest {_shown(highest[0], decimals)} at step {highest[1]:,g}"
            )
        sentences.append(sentence)
    return ". ".join(sentences) + "."
