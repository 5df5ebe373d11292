"""A training run as one HTML page: its curves, held-out prompts before and after, its settings and its command."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainerCallback

from ..cli import in_kernel
from ..config import ALL_LEVELS, COLORS
from ..data import Text, message_text
from ..files import write_atomically, write_text
from ..processes import is_first
from ..reward.terms import as_nats
from ..scoring.calculator import Explained
from ..scoring.heatmap import ENVIRONMENT, Framed, heatmap, number
from ..training.heldout import SWAPPED, SWAPPED_NATS
from ..training.job import Job
from ..training.results import PPL, HeldOut, Row, decimal, remarks, rows, unmoved
from ..training.settings import launched
from .charts import charts, dashes

SHOWN = 8  # prompts whose completions stand on the page
# On a light and a dark page, of lines: as in the plots, but with a contrast of 3 or more (WCAG 2.2 AA).
LINE_COLORS = (
    {**COLORS, "phrase": "#c26a00"},
    {
        **COLORS,
        "word": "#5cb8f0",
        "phrase": "#f0a83c",
        "sentence": "#cfcac3",
        "prompt": "#3ecf9f",
        "examples": "#e6a3c8",
    },
)
SECRETS = ("--hub_token", "--push_to_hub_token")
# What a held-out score says, for those whose name does not.
NOTES = {
    "reward": "of the perplexities alone",
    "KL": "how far the policy moved, nats a token",
    "distinct-2": "word pairs said once; 1: none twice",
    "repetition": "share of repeated word triples",
    "words": "a completion",
    SWAPPED: "mean of the levels; what only belongs to its prompt does nothing here",
    SWAPPED_NATS: "mean of the levels; what only belongs to its prompt does nothing here",
    "loop penalty": "added to the reward",
    "copy penalty": "added to the reward",
}


def notes_of(table: Sequence[Row]) -> dict[str, str]:
    """What stands beside the names of these rows."""
    return NOTES | {row.name: row.unit for row in table if row.unit}


def plot_training(logs: Sequence[Mapping], path: Path, nested: bool = False) -> None:
    """PNG with the reward and the improvement of each level over the optimizer steps of a run.

    logs: entries of TRL's log, which hold `step`, `reward`, `reward_std`, `reward_word`, ... nested: whether the levels
    are, whose improvement is shown in nats.
    """
    from matplotlib.figure import Figure  # and not pyplot's, which is the caller's own

    steps = [entry["step"] for entry in logs]
    reward = np.array([entry["reward"] for entry in logs])
    spread = np.array([entry.get("reward_std") or 0.0 for entry in logs])
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    around = {"color": "0.3", "alpha": 0.15, "linewidth": 0, "label": "± standard deviation"}
    top.fill_between(steps, reward - spread, reward + spread, **around)
    top.plot(steps, reward, color="0.2", marker="o", markersize=3, label="mean reward")
    top.set(ylabel="reward", title="Reward of the sampled completions")
    for place, level in enumerate(ALL_LEVELS):
        if any(f"reward_{level}" in entry for entry in logs):
            values = np.array([entry.get(f"reward_{level}", math.nan) for entry in logs])
            style = {"linestyle": (0, tuple(dashes(place))), "color": COLORS[level], "marker": "o", "markersize": 3}
            bottom.plot(steps, as_nats(values) if nested else values, label=level, **style)
    bottom.axhline(0, color="0.6", linewidth=0.8)
    unit = "nats a token" if nested else "%"
    bottom.set(ylabel=f"improvement over baseline, {unit}", xlabel="optimizer step")
    for axes in (top, bottom):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def hand_over(path: Path, reporters: Sequence[str], step: int) -> None:
    """Give the finished page to what else shows the run: a file in Weights & Biases, its name in TensorBoard.

    path: of the page, in the run's output folder. reporters: GRPOConfig's `report_to`. step: the last one.
    """
    if "wandb" in reporters:
        import wandb

        if wandb.run is not None:
            wandb.run.log_artifact(str(path), name=f"report-{wandb.run.id}", type="report")
    if "tensorboard" in reporters:
        from torch.utils.tensorboard import SummaryWriter

        logs = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or path.with_name("runs"))
        newest = max(logs.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
        with SummaryWriter(str(newest.parent)) as writer:  # a page of its own is more than its texts can show
            writer.add_text("report", f"Open [{path.name}]({path.resolve().as_uri()}) in a browser.", step)


class Completion(NamedTuple):
    """A held-out completion as the page shows it: `text` coloured by surprisal, `lead` before it in plain letters."""

    lead: str
    text: str
    explained: Explained
    perplexities: dict[str, float]
    reward: float


def explain_heldout(reward_fn, held_out: HeldOut, references: Sequence[Text]) -> list[Completion]:
    """The first completion of each of the first `SHOWN` prompts, with the surprisal that the frozen scorer gives it.

    references: one a prompt. With `target="reference"` they are what is scored and coloured, and the completion leads
    up to them. Several processes must all call: a model may be spread over them.
    """
    completions = []
    for index, prompt in enumerate(held_out.prompts[:SHOWN]):
        ids = held_out.completion_ids and [held_out.completion_ids[index][0]]
        [pair], [text] = reward_fn.written([prompt], [held_out.completions[index][0]], ids)
        lead = ""
        if reward_fn.config.target == "reference":
            lead, text = text, message_text(references[index] or "")
            part, _ = reward_fn.config.reference_context.extracted(lead)
            scored = (reward_fn.reference_context(prompt, part), text)
        else:
            scored = reward_fn.calculator.contexts.of(prompt, text, pair)
        explained = reward_fn.calculator.explain_pair(reward_fn.model, scored)
        explained.names = held_out.names
        # As it was scored: read without its chat a completion has a space before it.
        completions.append(
            Completion(lead, explained.text, explained, explained.perplexities, held_out.rewards[index][0])
        )
    return completions


def start_report(job: Job, reward_fn, before: HeldOut) -> "RunPage":
    """The page of a run that is about to begin, a callback of its trainer. Several processes must all call."""
    without = "the data set's columns" if job.has_columns else "no file"
    facts = {
        "Data": job.dataset_name,
        "Target": job.reward.target,
        "Weights": ", ".join(map("{} {:g}".format, job.reward.levels, job.reward.weights)),
        "Baselines": without if job.baselines is None else job.baselines.source,
    }
    shown = explain_heldout(reward_fn, before, list(job.heldout_rows["reference"]))
    command = command_line(launched(job.command))
    return RunPage(job.output / "report.html", job.models.name, facts, command, job.config_file, before, shown)


def finish_report(job: Job, page: "RunPage", reward_fn, after: HeldOut, state) -> None:
    """The page's last state, the reward's curve, and held-out scores before and after. Several processes must all call.

    state: the trainer's.
    """
    shown = explain_heldout(reward_fn, after, list(job.heldout_rows["reference"]))
    if not is_first():
        return
    page.write(state, after, shown)
    hand_over(page.path, job.config.report_to, state.global_step)
    # None: all rows of a step were skipped.
    logs, picture = [entry for entry in state.log_history if entry.get("reward") is not None], job.output / "reward.png"
    if len(logs) > 1:  # a single dot is no curve
        plot_training(logs, picture, bool(after.names))
    print(f"{'Model' if job.models.lora is None else 'Adapter'} and tokenizer: {job.output}")
    if len(logs) > 1:
        print(f"Reward curve: {picture}")
    print(f"Report: {page.path}")


@dataclass(eq=False)
class RunPage(TrainerCallback):
    """Keeps `path` up to date with every log entry; `write` with `after` makes it final. In a notebook the curves also
    grow below the cell.

    title: of the page. facts: names and values below it. command: as `command_line` gives it. config: the file of
    settings that `mlppl.training.job.Job.write_config` writes. before: held-out prompts before the first step. shown:
    what `explain_heldout` gives of them.
    """

    path: Path
    title: str
    facts: Mapping[str, str]
    command: str
    config: Path
    before: HeldOut
    shown: Sequence[Completion]
    _cell: Any = None  # where a notebook shows the curves

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.write(state)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self.write(state)
        # At the last entry trackio's run still goes on; it is over before held-out prompts are measured again.
        if "train_runtime" in logs and state.is_world_process_zero and "trackio" in args.report_to:
            import trackio

            trackio.log_artifact(self.path, name="report", type="report")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.write(state)

    def write(self, state, after: HeldOut | None = None, shown_after: Sequence[Completion] = ()) -> None:
        """state: the trainer's. after: held-out prompts after the last step; None: not yet. shown_after: what
        `explain_heldout` gives of them. Only the first of several processes writes."""
        if not state.is_world_process_zero:
            return
        drawn, others, merged = charts(state.log_history, self.before.names)
        progress, table = (state.global_step, state.max_steps), rows(self.before, after)
        headlines = {"reward", *self.before.names.values()}
        prompts = map(_prompt, self.before.prompts[: len(self.shown)])
        figures = ([_figure("Before", one) for one in self.shown], [_figure("After", one) for one in shown_after])
        blocks = [block.splitlines() for block in self.config.read_text(encoding="utf-8").strip().split("\n\n")]
        defaults = [block for block in blocks if all(line.startswith("#") for line in block)]  # comments in the file
        template = ENVIRONMENT.get_template("run.html.j2").module
        html = template.page(
            title=self.title,
            facts=self.facts,
            written=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
            progress=progress,
            charts=drawn,
            other_charts=others,
            merged=merged,
            scores=table,
            headlines=[row for row in table if row.name in headlines or row.name.endswith(PPL)],
            unmoved=after is not None and unmoved(after.scores) is not None,
            remarks=remarks(self.before, after) if after else [],
            notes=notes_of(table),
            finished=after is not None,
            prompts=len(self.before.prompts),
            completions=sum(map(len, self.before.completions)),
            pairs=list(zip_longest(prompts, *figures)),
            coloured="references" if any(one.lead for one in self.shown) else "completions",
            settings=[block for block in blocks if block not in defaults],
            defaults=defaults,
            command=self.command,
            colors=LINE_COLORS,
        )
        write_text(self.path, str(html), "replace")  # a lone surrogate in a text has no UTF-8
        if in_kernel():
            from IPython.display import display

            curves = Framed(str(template.curves(drawn, progress, LINE_COLORS)), 460)
            if self._cell is None:
                self._cell = display(curves, display_id=True)
            else:
                self._cell.update(curves)


def command_line(words: Sequence[str]) -> str:
    """A command to read and to run again, without what is nobody's business: the value of a flag in `SECRETS`."""
    shown: list[str] = []
    for word in words:
        flag, equals, _ = word.partition("=")
        if shown and shown[-1] in SECRETS:
            shown.append("***")
        else:
            shown.append(f"{flag}=***" if flag in SECRETS and equals else word)
    return shlex.join(shown)


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{'−' if value < 0 else ''}{number(abs(value))}"


ENVIRONMENT.filters |= {
    "short": _short,
    "decimal": decimal,
    "minus": lambda shown: shown.replace("-", "−").replace("± ", "±\xa0"),
}


def _prompt(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message_text([message])}" for message in prompt)


def _figure(name: str, one: Completion):
    reward = "skipped" if math.isnan(one.reward) else f"reward {one.reward:.2f}".replace("-", "−")
    return heatmap(
        one.explained, one.text, one.perplexities, caption=f"{name}: {reward}", context=one.lead,
        context_name="Completion; below it the reference, which is scored", top=0, names=one.explained.names,
    )  # fmt: skip
