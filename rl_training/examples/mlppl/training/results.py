"""What held-out prompts gave before and after training: heldout.json, and what changed, prompt by prompt."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data import prompt_key
from ..errors import InputError
from ..files import without_nan, write_text
from .diagnostics import LEAST_GAIN, LEAST_KL, VERDICTS, gain

PPL = " PPL"  # what the names of geometric means end in
FOUND = "found among "
FEW = 5  # prompts; of fewer the standard error says little
NO_DIFFERENCE, TOO_FEW = "no difference seen", "too few prompts"


@dataclass(frozen=True)
class HeldOut:
    """prompts; `num_generations` completions a prompt and their rewards, nan where skipped; scores: means, by name;
    completion_ids: what was sampled, of which the completions are the text. by_prompt: what the scores are the means
    of, a number a prompt, nan where there is none. names: of nested levels (`RewardConfig.nested_names`)."""

    prompts: list
    completions: list[list[str]]
    rewards: list[list[float]]
    scores: dict[str, float]
    completion_ids: list[list[list[int]]] | None = None
    by_prompt: dict[str, list[float]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> str:
        """How its levels are averaged."""
        if self.names:
            return "levels are in nats a token: below 0 it helps"
        return "a PPL is a geometric mean, its change in nats a token"

    def of_prompts(self, keys: Sequence[str]) -> "HeldOut":
        """The same of some of the prompts, in their order. keys: of `mlppl.data.prompt_key`."""
        index = {prompt_key(prompt): at for at, prompt in enumerate(self.prompts)}
        chosen = [index[key] for key in keys]
        by_prompt = {name: [values[at] for at in chosen] for name, values in self.by_prompt.items()}
        scores = {name: float(mean(name, values)) for name, values in by_prompt.items()}
        return HeldOut(
            [self.prompts[at] for at in chosen], [self.completions[at] for at in chosen],
            [self.rewards[at] for at in chosen], scores, None, by_prompt, self.names,
        )  # fmt: skip


def mean(name: str, values) -> np.ndarray:
    """Over the last axis, nan left out: of perplexities the geometric mean, of other scores the ordinary one.

    >>> float(mean("word PPL", [2.0, 8.0])), float(mean("reward", [2.0, 8.0]))
    (4.0, 5.0)
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    return (values.log().nanmean(-1).exp() if name.endswith(PPL) else values.nanmean(-1)).numpy()


class Row(NamedTuple):
    """A line of the held-out table. before, after: means, of nested levels in nats a token. change: the mean over
    prompts of the paired differences, of perplexities in nats a token; error: its standard error. nan: not known."""

    name: str
    before: float
    after: float = math.nan
    change: float = math.nan
    error: float = math.nan
    unit: str = ""  # of perplexities and levels

    @property
    def said(self) -> str:
        """What has to be said of the change; "" where it is more than two standard errors."""
        if math.isnan(self.change):
            return ""
        if math.isnan(self.error):
            return TOO_FEW
        return "" if abs(self.change) > 2 * self.error else NO_DIFFERENCE

    @property
    def shown(self) -> str:
        """The change and its standard error."""
        if math.isnan(self.error):
            return self.said or "–"
        return f"{self.said or decimal(self.change, '+')} ± {decimal(self.error)}"


def decimal(value: float, sign: str = "") -> str:
    """sign: "+" for a change.

    >>> decimal(1234.5), decimal(0.25, "+"), decimal(-1e-9), decimal(float("nan"))
    ('1,234.500', '+0.250', '0.000', '–')
    """
    if math.isnan(value):
        return "–"
    return f"{round(value, 3) + 0.0:{sign}{',.3f' if abs(value) < 1e5 else '.2e'}}"


def rows(before: HeldOut, after: HeldOut | None = None) -> list[Row]:
    """The held-out table. after: None before the end of training."""
    made = []
    for name, value in before.scores.items():
        new = math.nan if after is None else after.scores[name]
        pair = () if after is None else paired(name, before.by_prompt.get(name, ()), after.by_prompt.get(name, ()))
        level = name.removesuffix(PPL) if name.endswith(PPL) else None
        unit = "" if level is None else "geometric mean; its change is in nats a token"
        if level in before.names:
            unit, name, (value, new) = "nats a token", before.names[level], np.log([value, new]).tolist()
        made.append(Row(name, value, new, *(pair or (math.nan, math.nan)), unit))
    return made


def paired(name: str, one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of the differences `other` - `one`, a pair a prompt, of perplexities of their logarithms;
    nan for no pair, the error for fewer than `FEW`.

    >>> [round(one, 4) for one in paired("reward", [1, 1, 1, 1, 1], [2, 2, 2, 3, 3])]
    [1.4, 0.2449]
    """
    differences = np.subtract(*(np.log(of) if name.endswith(PPL) else of for of in map(np.array, (other, one))))
    differences = differences[~np.isnan(differences)]
    count = len(differences)
    if not count:
        return math.nan, math.nan
    error = differences.std(ddof=1) / math.sqrt(count) if count >= FEW else math.nan
    return float(differences.mean()), float(error)


def remarks(before: HeldOut, after: HeldOut) -> list[str]:
    """What has to be said beside the table, a line each."""
    few = None
    if len(before.prompts) < FEW:
        few = (
            f"{len(before.prompts)} prompts are too few to say whether anything changed: keep {FEW} or more out "
            "(--heldout_samples)"
        )
    return [*filter(None, (unmoved(after.scores), few, gained_by_any(before.scores, after.scores)))]


def unmoved(scores: Mapping[str, float]) -> str | None:
    """A line where the policy is still where it began.

    >>> unmoved({"KL": 0.003})[:68]
    'NOT MOVED: the policy is 0.003 nats a token from its start, less tha'
    """
    kl = scores.get("KL", math.nan)
    return VERDICTS["not moved"].format(since="", kl=max(kl, 0.0), least_kl=LEAST_KL) if kl < LEAST_KL else None


def gained_by_any(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """A warning where what was written earns more, and goes with its own row no better than before.

    before, after: scores of `HeldOut`.

    >>> before = {"word improvement %": 0.0, "found among 8": 0.5}
    >>> gained_by_any(before, {"word improvement %": 16.0, "found among 8": 0.5})[:47]
    'ANY ROW: completions earn 16.0 points more, and'
    >>> gained_by_any(before, {"word improvement %": 16.0, "found among 8": 0.9})
    """
    [found] = [name for name in before if name.startswith(FOUND)] or [None]
    levels = [name for name in before if name.endswith((" improvement %", " improvement, nats"))]
    if found is None:
        return None
    nested = levels[0].endswith("nats")
    rise = (100 if nested else 1) * sum(after[name] - before[name] for name in levels) / len(levels)
    earned = after.get("reward", math.inf) - before.get("reward", 0.0)  # less than the levels where they are capped
    if rise <= LEAST_GAIN or earned <= 0 or after[found] > before[found]:
        return None
    k, shares = found.removeprefix(FOUND), {"before": before[found], "after": after[found]}
    return VERDICTS["any row"].format(since="", rise=gain(rise, nested, "{:.1f} points"), k=k, **shares)


def write_heldout(path: Path, sampling: dict, rewarded: dict, before: HeldOut, after: HeldOut | None = None) -> None:
    """JSON `{"sampling", "rewarded", "before": {"prompts", "completions", "rewards", "scores", ...}, "after": the same
    or null}`.

    sampling: how `mlppl.training.heldout.evaluate` sampled. rewarded: by what. What is nan becomes null.
    """
    content = {"sampling": sampling, "rewarded": rewarded, "before": asdict(before), "after": after and asdict(after)}
    text = json.dumps(without_nan(content), ensure_ascii=False, indent=1, allow_nan=False)
    # A list of numbers on one line. Inside of a string there is no line break.
    number = r"(?:-?\d[\d.e+-]*|null)"
    numbers = rf"\[\n\s+({number}(?:,\n\s+{number})*)\n\s+\]"
    text = re.sub(numbers, lambda one: "[" + " ".join(one[1].split()) + "]", text)
    write_text(path, text, "surrogatepass")


def read_heldout(path: Path) -> tuple[dict, dict, HeldOut, HeldOut | None]:
    """(sampling, rewarded, before, after) of `write_heldout`. A file of an earlier version has no `by_prompt`.

    Raises `InputError` for a file that is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
        sides = [kept[side] and _held_out(kept[side]) for side in ("before", "after")]
        return kept["sampling"], dict(kept.get("rewarded", {})), *sides
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {error!r:.200}: this script did not write it so; delete it to measure anew"
        ) from error


def _held_out(kept: Mapping) -> HeldOut:
    def numbers(values) -> list[float]:
        return [math.nan if value is None else float(value) for value in values]

    prompts, by_prompt = kept["prompts"], kept.get("by_prompt", {})
    by_prompt = {name: numbers(values) for name, values in by_prompt.items()}
    if wrong := [name for name, values in by_prompt.items() if len(values) != len(prompts)]:
        raise ValueError(f"by_prompt {wrong[0]!r} has another number of prompts")
    scores = dict(zip(kept["scores"], numbers(kept["scores"].values()), strict=True))
    rewards = [numbers(group) for group in kept.get("rewards", [])]
    names = dict(kept.get("names", {}))
    return HeldOut(prompts, kept["completions"], rewards, scores, kept.get("completion_ids"), by_prompt, names)
