"""Is there anything to learn from the rewards? Shares for the log, and in words which failure a run is in."""

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from ..data import message_text, prompt_key
from ..processes import is_sharded
from ..reward.terms import as_nats
from ..scoring.surprisal import is_scorer
from .found import found_among


def distinct(texts: Sequence[str], n: int) -> float:
    """Mean over texts of their distinct runs of n words over all their runs of n words: 1 says nothing twice.

    Source: Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055, within each text.
    nan if no text has n words.
    """
    shares = []
    for text in texts:
        words = message_text(text).lower().split()
        runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        if runs:
            shares.append(len(set(runs)) / len(runs))
    return sum(shares) / len(shares) if shares else float("nan")


def described(texts: Sequence[str]) -> dict[str, float]:
    """What held-out tables say of texts themselves.

    >>> described(["a b a b a", "c d"])
    {'distinct-2': 0.75, 'repetition': 0.33333333333333337, 'words': 3.5}
    """
    return {
        "distinct-2": distinct(texts, 2),
        "repetition": 1 - distinct(texts, 3),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }


WINDOW = 20  # steps that a verdict looks back
START = 5  # reward calls that later ones are compared with
NEARLY_ALL = 0.9
LEAST_DISTINCT = 0.9  # of the start
LEAST_LENGTH = 0.5  # of the start
PAID = 5.0  # %, how far a level's improvement rises, and another's falls below 0 and below its start
LEAST_GAIN = 2.0  # points of improvement; less is not looked into
MOST_ROWS = 16  # of which the last completions are looked for among 8
LEAST_KL, MOST_KL = 0.02, 0.5  # nats a token; runs of which the texts stayed what they were ended at 0.05 to 0.35

NOTHING_TO_LEARN = {"saturated", "all zero", "no spread"}
VERDICTS = {
    "saturated": "{seen}. SATURATED: {at_top:.0%} of the completions are at the top threshold, with {improvement} "
    "over their baselines. Measure against the model's own writing (compute_baselines_trl.py --generate "
    "4, with this run's sampling flags), sample at --temperature 1 and --top_p 1, or set stricter --reward_thresholds. "
    "If a run has come there by itself, it has earned all that there is: stop, or begin anew with a lower "
    "--learning_rate.",
    "all zero": "{seen}. ALL ZERO: {nothing:.0%} of the completions earn nothing, {why}",
    "no spread": "{seen}. NO SPREAD: {at_zero:.0%} of the completions are at 0, {at_top:.0%} at the top threshold, the "
    "others between, but alike within their groups. Reward the log-likelihood ratio (--reward_form nats), or sample "
    "more freely (--temperature 1, a larger --num_generations).",
    "gamed": "GAMED: in the last {window} steps distinct-2 is {distinct_2:.2f} and the length {length:.2f} of what "
    "they were at the start: the model earns by loops, blandness or brevity. Hold the policy near its start (--beta "
    "0.04), lower --learning_rate, keep --loop_penalty on, or measure what the model does not write (--target "
    "reference). A checkpoint from before is the one to keep.",
    "level pays": "ONE LEVEL PAYS FOR ANOTHER: since the start the {better} level has risen by {rise} to an "
    "improvement that the {worse} level pays for: {fall} from its baseline. Weigh the levels alike "
    "(--ppl_weights 1 1 1), let each be normalised by itself (--per_level), or hold the policy near its start (--beta "
    "0.04).",
    "any row": "ANY ROW: {since}completions earn {rise} more, and are found among {k} rows as "
    "theirs no better ({before:.0%} -> {after:.0%}): what is learned is a manner of writing, whatever it says. Show "
    "the scorer examples (--examples 3), compare with other rows (--contrast 2), and read the completions.",
    "not moved": "NOT MOVED: {since}the policy is {kl:.3f} nats a token from its start, less than {least_kl}: nothing "
    "moved. Raise --learning_rate (five times is a usual step), and see that --warmup_steps are few beside the "
    "steps of the run.",
    "moved far": "MOVED FAR: after {steps} steps the policy is {kl:.2f} nats a token from its start, more than "
    "{most_kl}. Read the completions: what is paid may be a manner of writing, whatever it says. Hold the policy near "
    "its start (--beta 0.1), or lower --learning_rate.",
}
# Why all earn nothing, by the share of completions of which it is true.
WHY_ZERO = {
    "missing": "{missing:.0%}: no baseline. The data set and the baselines do not belong together: compute them on "
    "this data set and split.",
    "first_visit": "{first_visit:.0%}: first visit. A completion that is a prompt's first and only one has none to be "
    "compared with: sample more for each (--num_generations 8), or give --baselines_path.",
    "unscorable": "{unscorable:.0%}: blank. The completions are empty or blank: check the prompts' format, and that "
    "--max_new_tokens is not tiny.",
}
OUT_OF_REACH = (
    "with {improvement} over their baselines. The baselines are texts that the model cannot match "
    "yet: measure against its own writing (compute_baselines_trl.py --generate 4), or reward the log-likelihood ratio "
    "(--reward_form nats)."
)


def gain(points: float, nested: bool, usual: str) -> str:
    """How a gain is told: in percent or points, of nested levels in nats a token, of which a point is a hundredth.

    >>> gain(12.3, False, "{:.0f} points"), gain(12.3, True, "{:.0f} points")
    ('12 points', '+0.12 nats a token')
    """
    return f"{points / 100:+.2f} nats a token" if nested else usual.format(points)


class _Sample(NamedTuple):
    prompt: str
    reward: float | None  # as the trainer gets it
    at_zero: bool
    at_top: bool
    scored: bool
    skipped: bool
    first_visit: bool
    improvement: float
    levels: tuple[float, ...]  # improvements, %, of nested levels in hundredths of a nat
    distinct_2: float
    length: int  # characters


class _Call(NamedTuple):
    step: int
    groups: int
    without_spread: int
    shares: dict[str, float]
    improvement: float
    levels: tuple[float, ...] | None  # of the scored completions, means; None without one
    distinct_2: float
    length: float


class Diagnostics(TrainerCallback):
    """A callback of the trainer that listens to a reward function: `trainer.add_callback(Diagnostics(reward_fn))`.

    Each call logs, over all processes, `diagnostics/at_zero` and `diagnostics/at_top` (shares of completions at 0 or
    below, and at the top threshold), `no_spread` (of groups whose rewards, but for blank completions, are all equal),
    `unscorable`, `missing` (without a baseline), `first_visit`, `distinct_2`, and `distinct_2_of_start` and
    `length_of_start`, relative to the mean of the first `START` calls.

    After a step it says once, with the remedy, which of `VERDICTS` the last `WINDOW` steps show: rewards that are
    saturated, all zero (and why) or alike for another reason, where 90 % of the groups have no spread; a distinct-2
    below 0.9 of the start's, or a length below half of it; a level that has risen since the start by more than `PAID` %
    while another fell, by more than that below its baseline; and where groups have spread, a policy that is still where
    it began after `WINDOW` steps, or far from there later.

    kl: of prompts and what was written for them (ids or texts), gives the policy's distance from its start in nats a
    token, or None; asked every `WINDOW` steps until it is far. As often the last completions are looked for among their
    rows (`mlppl.training.found`), under the reward's own scorer.
    """

    def __init__(self, reward_fn, kl: Callable[[list, list], float | None] | None = None) -> None:
        self.kl = kl
        self.start_levels: list[list[float]] = []  # improvements of the levels in the first calls
        self.start: list[list[float]] = []  # [distinct-2, length] of the first calls
        self.named: list[str] = []  # failures already told
        self.found: list[list[float]] = []  # [step, top-1, improvement] at the first look, and at the last one
        self._reward_fn, self._levels, self._top = reward_fn, reward_fn.config.levels, reward_fn.config.highest
        self._nested = reward_fn.config.aggregation == "nested"
        self._recent: dict[str, tuple] = {}  # the last prompts: (prompt, a completion, its reference)
        self._calls: deque[_Call] = deque()
        self._steps = 0
        self._written: tuple[list, list] = ([], [])  # in the last step: prompts, and ids or texts
        self._in_step = False  # else it is an evaluation that asks for rewards
        reward_fn.listen(self.observe)

    def observe(self, call) -> None:
        """call: `mlppl.reward.function.Call`."""
        measured, earned, completion_ids = call.measured, call.earned, call.columns.get("completion_ids")
        improvement, average = earned.improvement, earned.average
        if self._nested:
            improvement = 100 * as_nats(improvement)
            average = np.average(improvement, axis=1, weights=self._reward_fn.config.weights)
        log_metric = call.columns.get("log_metric")
        local = [
            _Sample(
                repr(prompt), reward, raw <= 0, raw >= self._top, scored, skipped, first, average, tuple(levels),
                distinct([text], 2), len(text),
            )
            for prompt, text, reward, raw, scored, skipped, first, average, levels in zip(
                call.prompts, call.texts, call.rewards, earned.rewards.tolist(), measured.scored.tolist(),
                measured.skipped.tolist(), measured.first_visit.tolist(), average.tolist(), improvement.tolist(),
                strict=True,
            )
        ]  # fmt: skip
        # A process may hold part of a group: together they are whole, and stand side by side.
        samples = local
        if torch.distributed.is_initialized():
            parts: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, local)
            samples = [sample for part in parts for sample in part]
        summary = _summary(samples, self._steps)
        if self._in_step:
            self._calls.append(summary)
            self._written = (list(call.prompts), list(call.texts if completion_ids is None else completion_ids))
            for row in zip(call.prompts, call.texts, call.columns.get("reference") or call.texts, strict=True):
                self._recent.pop(prompt_key(row[0]), None)
                self._recent[prompt_key(row[0])] = row
            self._recent = dict(list(self._recent.items())[-MOST_ROWS:])
            if len(self.start) < START:
                self.start.append([summary.distinct_2, summary.length])
            if len(self.start_levels) < START and summary.levels is not None:
                self.start_levels.append(list(summary.levels))
        if log_metric is not None:
            of_start = self._of_start([summary])
            metrics = {
                **summary.shares,
                "no_spread": summary.without_spread / max(summary.groups, 1),
                "distinct_2": summary.distinct_2,
                "distinct_2_of_start": of_start[0],
                "length_of_start": of_start[1],
            }
            for name, value in metrics.items():
                log_metric(f"diagnostics/{name}", value)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._in_step = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._in_step = False
        self._steps += 1
        while self._calls and self._calls[0].step < self._steps - WINDOW:
            self._calls.popleft()
        verdicts = self.verdicts()
        # Where nothing can be learned, that is why it has not moved. What has been told is not asked for again.
        asks = self._steps % WINDOW == 0 and "moved far" not in self.named and not verdicts.keys() & NOTHING_TO_LEARN
        kl = self.kl(*self._written) if asks and self.kl is not None else None
        if kl is not None and kl < LEAST_KL and self._steps == WINDOW:
            verdicts["not moved"] = VERDICTS["not moved"].format(
                since=f"after {WINDOW} steps ", kl=max(kl, 0.0), least_kl=LEAST_KL
            )
        if kl is not None and kl > MOST_KL:
            verdicts["moved far"] = VERDICTS["moved far"].format(steps=self._steps, kl=kl, most_kl=MOST_KL)
        if self._steps % WINDOW == 0 and (any_row := self._any_row()):
            verdicts["any row"] = any_row
        for name, text in verdicts.items():
            if name not in self.named:
                self.named.append(name)
                if state.is_world_process_zero:
                    tqdm.write(f"step {state.global_step}: {text}")

    def verdicts(self, least: int = WINDOW) -> dict[str, str]:
        """The failures that the last `WINDOW` steps show, by name, each in words with its remedy. least: before so many
        steps there are none."""
        if self._steps < least or not self._calls:
            return {}
        groups = sum(call.groups for call in self._calls)
        flat = sum(call.without_spread for call in self._calls) / max(groups, 1)
        distinct_2, length = self._of_start(self._calls)
        numbers: dict = {
            **{name: np.mean([call.shares[name] for call in self._calls]) for name in self._calls[0].shares},
            "improvement": self._gain(np.mean([call.improvement for call in self._calls]), "{:+.1f} % improvement"),
            "seen": f"{'In this step' if self._steps == 1 else f'In the last {WINDOW} steps'} {flat:.0%} of the groups "
            "had no spread: GRPO learns nothing",
            "window": WINDOW, "distinct_2": distinct_2, "length": length,
        }  # fmt: skip
        numbers["nothing"] = numbers["at_zero"] + numbers["missing"]
        cause = max(WHY_ZERO, key=lambda name: numbers[name])
        numbers["why"] = (WHY_ZERO[cause] if numbers[cause] >= 0.5 else OUT_OF_REACH).format(**numbers)
        found = []
        if flat >= NEARLY_ALL and numbers["at_top"] >= NEARLY_ALL:
            found.append("saturated")
        elif flat >= NEARLY_ALL:
            found.append("all zero" if numbers["nothing"] >= NEARLY_ALL else "no spread")
        if distinct_2 < LEAST_DISTINCT or length < LEAST_LENGTH:
            found.append("gamed")
        if paying := self._paying():
            numbers |= dict(zip(("better", "worse", "rise", "fall"), paying, strict=True))
            found.append("level pays")
        return {name: VERDICTS[name].format(**numbers) for name in found}

    def _any_row(self) -> str | None:
        """A verdict if completions earn more than at the first look, and go with their own rows no better."""
        scorer = self._reward_fn.model
        if not is_scorer(scorer) and is_sharded(scorer):  # in each process other rows, all would have to ask as often
            return None
        prompts, texts, references = zip(*self._recent.values(), strict=True) if self._recent else ((), (), ())
        seen = found_among(self._reward_fn, prompts, [[text] for text in texts], references)
        if seen is None:
            return None
        k, improvement = seen[0], float(np.mean([call.improvement for call in self._calls]))
        self.found = [*self.found[:1], [self._steps, seen[1].top_1, improvement]]
        (first, before, earned), (_, after, earns) = self.found[0], self.found[-1]
        if earns - earned <= LEAST_GAIN or after > before:
            return None
        rise = self._gain(earns - earned, "{:.1f} points")
        return VERDICTS["any row"].format(since=f"since step {first} ", rise=rise, k=k, before=before, after=after)

    def _gain(self, points: float | np.floating, usual: str) -> str:
        return gain(float(points), self._nested, usual)

    def _paying(self) -> tuple[str, str, str, str] | None:
        """(the level that rose most, the one that fell furthest, by how much, its improvement), if both count."""
        now = [call.levels for call in self._calls if call.levels is not None]
        if len(self.start_levels) < START or not now:
            return None
        means, start = np.mean(now, axis=0), np.mean(self.start_levels, axis=0)
        change = means - start
        better, worse = int(change.argmax()), int(np.argmin(np.maximum(means, change)))
        if change[better] > PAID and max(means[worse], change[worse]) < -PAID:
            rise, fall = self._gain(change[better], "{:.0f} points"), self._gain(means[worse], "{:+.0f} %")
            return self._levels[better], self._levels[worse], rise, fall
        return None

    def _of_start(self, calls) -> tuple[float, float]:
        """(distinct-2, length) of the calls relative to the start; 1 before there is one."""
        now = np.mean([[call.distinct_2, call.length] for call in calls], axis=0)
        start = np.mean(self.start, axis=0) if self.start else now
        distinct_2, length = np.divide(now, start, out=np.ones(2), where=start > 0).tolist()
        return distinct_2, length

    def state_dict(self) -> dict:
        """What a resumed run needs to be compared with the same start, and not to repeat itself."""
        return {"start": self.start, "start_levels": self.start_levels, "named": self.named, "found": self.found}

    def load_state_dict(self, state: Mapping) -> None:
        self.start, self.named = list(state["start"]), list(state["named"])
        # Checkpoints of before have none.
        self.start_levels, self.found = list(state.get("start_levels", [])), list(state.get("found", []))


def _summary(samples: Sequence[_Sample], step: int) -> _Call:
    # A blank completion among equal rewards is no spread to learn writing from.
    groups = [
        [s.reward for s in group if s.reward is not None and (s.scored or s.first_visit)]
        for _, group in itertools.groupby(samples, key=lambda sample: sample.prompt)
    ]
    kept = [sample for sample in samples if sample.scored]
    distinct_2 = [sample.distinct_2 for sample in samples if sample.distinct_2 == sample.distinct_2]
    total = max(len(samples), 1)
    shares = {
        "at_zero": sum(not s.skipped and s.at_zero for s in samples) / total,
        "at_top": sum(not s.skipped and s.at_top for s in samples) / total,
        "unscorable": sum(not s.skipped and not s.scored and not s.first_visit for s in samples) / total,
        "missing": sum(s.skipped for s in samples) / total,
        "first_visit": sum(s.first_visit for s in samples) / total,
    }
    return _Call(
        step,
        len(groups),
        sum(not group or max(group) - min(group) <= 1e-9 for group in groups),
        shares,
        float(np.mean([sample.improvement for sample in kept])) if kept else 0.0,
        tuple(np.mean([sample.levels for sample in kept], axis=0).tolist()) if kept else None,
        float(np.mean(distinct_2)) if distinct_2 else 1.0,  # without two words, nothing is said twice
        float(np.mean([sample.length for sample in samples])) if samples else 0.0,
    )


def in_one_line(logs: Mapping[str, float]) -> str:
    """What of a log entry belongs into the progress line; "" without diagnostics."""
    names = {"at_zero": "at 0", "at_top": "at top", "no_spread": "groups alike"}
    shares = {text: logs.get(f"diagnostics/{name}") for name, text in names.items()}
    return "".join(f", {text} {share:.0%}" for text, share in shares.items() if share is not None)
