"""A training run as one HTML page: its curves, held-out prompts before and after, its settings and its command."""

import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from ..cli import in_kernel
from ..config import COLORS, LEVELS
from ..data import Text, message_text
from ..files import write_atomically, write_text
from ..processes import is_first
from ..scoring.heatmap import ENVIRONMENT, Framed, heatmap, number
from ..training.heldout import SWAPPED, HeldOut, gained_by_any
from ..training.job import Job
from ..training.settings import launched
from .charts import charts

# --- comparison ------------------------------------------------------------------------------------------------------

# What a training run leaves to look at: the reward's curve, and held-out scores before and after.


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


# --- loggers ---------------------------------------------------------------------------------------------------------

# The report in what else shows the run: a file in Weights & Biases and trackio, its name in TensorBoard.

NAME = "report"


def hand_over(path: Path, reporters: Sequence[str], step: int) -> None:
    """The finished page: an artifact of the run of Weights & Biases, a text of TensorBoard's run.

    path: of the page, in the run's output folder. reporters: GRPOConfig's `report_to`. step: the last one.
    """
    wandb = sys.modules.get("wandb")
    if "wandb" in reporters and wandb is not None and wandb.run is not None:
        artifact = wandb.Artifact(f"{NAME}-{wandb.run.id}", type=NAME)
        artifact.add_file(str(path))
        wandb.run.log_artifact(artifact)
    if "tensorboard" in reporters:
        from torch.utils.tensorboard import SummaryWriter

        logs = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or path.with_name("runs"))
        newest = max(logs.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
        with SummaryWriter(str(newest.parent)) as writer:  # a page of its own is more than its texts can show
            writer.add_text(NAME, f"Open [{path.name}]({path.resolve().as_uri()}) in a browser.", step)


def hand_to_trackio(path: Path, reporters: Sequence[str]) -> None:
    """The page as it is when training ends, an artifact of trackio's run: that is over before held-out prompts are
    measured again."""
    if "trackio" in reporters:
        import trackio

        trackio.log_artifact(path, name=NAME, type=NAME)


# --- notebook --------------------------------------------------------------------------------------------------------

# In a notebook, the curves of a run that goes on.

SECONDS_OF_CURVES = 1  # at least, between two drawings of the curves


class LiveCurves:
    """The curves of a run below the cell that trains, drawn anew as they grow; outside of a notebook nothing."""

    def __init__(self, colors: tuple[Mapping[str, str], Mapping[str, str]]) -> None:
        self.colors = colors
        self._handle = None
        self._drawn = 0.0

    def draw(self, log_history: Sequence[Mapping], progress: tuple[int, int], at_once: bool = False) -> None:
        """log_history: TRL's. progress: steps done, of how many. at_once: also if the last drawing is just done."""
        if not in_kernel() or not (at_once or time.monotonic() - self._drawn > SECONDS_OF_CURVES):
            return
        from IPython.display import display

        drawn, _, _ = charts(log_history)
        shown = Framed(str(ENVIRONMENT.get_template("run.html.j2").module.curves(drawn, progress, self.colors)), 460)
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)
        self._drawn = time.monotonic()


# --- run -------------------------------------------------------------------------------------------------------------

SHOWN = 8  # prompts whose completions stand on the page
SECONDS = 60  # at least, between two writings while the run goes on
# On a light and a dark page, of lines: as in the plots, but with a contrast of 3 or more (WCAG 2.2 AA).
LINE_COLORS = (
    {**COLORS, "phrase": "#c26a00"},
    {"word": "#5cb8f0", "phrase": "#f0a83c", "sentence": "#cfcac3"},
)
SECRETS = ("--hub_token", "--push_to_hub_token")

# What a held-out score says, for those whose name does not.
NOTES = {
    "reward": "of the perplexities alone",
    "KL": "how far the policy moved, nats a token",
    "distinct-2": "word pairs said once; 1: none twice",
    "repetition": "share of repeated word triples",
    "words": "a completion",
    SWAPPED: "mean of the three levels; what only belongs to its prompt does nothing here",
    "loop penalty": "added to the reward",
}


class Completion(NamedTuple):
    """A held-out completion as the page shows it: `text` coloured by surprisal, `lead` before it in plain letters."""

    lead: str
    text: str
    explained: dict[str, list[dict]]
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
            context = reward_fn.calculator.render(prompt)
            put = reward_fn.config.reference_context
            pair = (put.context(context, put.extracted(lead)[0]), text)
        explained = reward_fn.calculator.explain_pair(reward_fn.model, pair)
        completions.append(Completion(lead, text, explained, explained.perplexities, held_out.rewards[index][0]))
    return completions


def start_report(job: Job, reward_fn, before: HeldOut) -> "RunPage":
    """The page of a run that is about to begin, a callback of its trainer. Several processes must all call."""
    facts = {
        "Data": job.args.dataset_name,
        "Target": job.args.target,
        "Weights": "word {:g}, phrase {:g}, sentence {:g}".format(*job.settings["weights"]),
        "Baselines": job.args.baselines_path or "no file",
    }
    shown = explain_heldout(reward_fn, before, list(job.heldout_rows["reference"]))
    path, command = job.output / "report.html", command_line(launched(job.command))
    if is_first():
        print(f"Report, kept up to date: {path}")
    return RunPage(path, job.args.model_name, facts, command, job.config_file, before, shown)


def finish_report(job: Job, page: "RunPage", reward_fn, after: HeldOut, state) -> None:
    """The page's last state, the reward's curve, and held-out scores before and after. Several processes must all call.

    state: the trainer's.
    """
    shown = explain_heldout(reward_fn, after, list(job.heldout_rows["reference"]))
    if not is_first():
        return
    page.write(state, after, shown)
    hand_over(page.path, job.config.report_to, state.global_step)
    plot_training(state.log_history, job.output / "reward.png")
    print_comparison(page.before, after)
    print(f"{'Model' if job.args.full_finetuning else 'Adapter'} and tokenizer: {job.output}")
    print(f"Reward curve: {job.output / 'reward.png'}\nReport: {page.path}")


class RunPage(TrainerCallback):
    """Keeps `path` up to date while a run goes on, at most once a minute; `write` with `after` makes it final.

    In a notebook the curves also grow below the cell.

    title: of the page. facts: names and values below it. command: as `command_line` gives it. config: the file of
    settings that `ppl.training.settings.write_config` writes. before: held-out prompts before the first step. shown:
    what `explain_heldout` gives of them.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        facts: Mapping[str, str],
        command: str,
        config: Path,
        before: HeldOut,
        shown: Sequence[Completion],
    ) -> None:
        self.path = path
        self.title = title
        self.facts = facts
        self.command = command
        self.config = config
        self.before = before
        self.shown = shown
        self._written = -math.inf
        self._curves = LiveCurves(LINE_COLORS)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._curves.draw(state.log_history, (state.global_step, state.max_steps), at_once=True)
        self.write(state)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self._curves.draw(state.log_history, (state.global_step, state.max_steps))
        if time.monotonic() - self._written > SECONDS:
            self.write(state)
        if "train_runtime" in logs and state.is_world_process_zero:  # the last entry
            self.write(state)
            hand_to_trackio(self.path, args.report_to)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._curves.draw(state.log_history, (state.global_step, state.max_steps), at_once=True)
        self.write(state)

    def write(self, state, after: HeldOut | None = None, shown_after: Sequence[Completion] = ()) -> None:
        """state: the trainer's. Only the first of several processes writes."""
        if not state.is_world_process_zero:
            return
        html = run_page(
            self.title, self.facts, self.command, self.config.read_text(encoding="utf-8"),
            state.log_history, (state.global_step, state.max_steps),
            self.before, self.shown, after, shown_after,
        )  # fmt: skip
        write_text(self.path, html, "replace")  # a lone surrogate in a text has no UTF-8
        self._written = time.monotonic()


def run_page(
    title: str,
    facts: Mapping[str, str],
    command: str,
    config: str,
    log_history: Sequence[Mapping],
    progress: tuple[int, int],
    before: HeldOut,
    shown_before: Sequence[Completion],
    after: HeldOut | None = None,
    shown_after: Sequence[Completion] = (),
) -> str:
    """The page. progress: steps done, of how many. after: held-out prompts after the last step; None: not yet."""
    drawn, others, merged = charts(log_history)
    scores = [
        (name, NOTES.get(name, ""), *_before_after(value, after.scores.get(name, math.nan) if after else None))
        for name, value in before.scores.items()
    ]
    pairs = [
        {
            "prompt": _prompt(before.prompts[index]),
            "before": _figure("Before", one),
            "after": _figure("After", shown_after[index]) if shown_after else None,
        }
        for index, one in enumerate(shown_before)
    ]
    blocks = [block.splitlines() for block in config.strip().split("\n\n")]
    template = ENVIRONMENT.get_template("run.html.j2").module
    return str(
        template.page(
            title=title,
            facts=facts,
            written=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
            progress=progress,
            charts=drawn,
            other_charts=others,
            merged=merged,
            tiles=[
                (name, _short(value), _short(after.scores.get(name, math.nan)) if after else "")
                for name, value in before.scores.items()
                if name == "reward" or name.endswith(" PPL")
            ],
            scores=scores,
            finished=after is not None,
            prompts=len(before.prompts),
            completions=sum(map(len, before.completions)),
            pairs=pairs,
            coloured="references" if any(one.lead for one in shown_before) else "completions",
            # Settings of the run, then what was left alone: comments in the file.
            settings=[block for block in blocks if not all(line.startswith("#") for line in block)],
            defaults=[block for block in blocks if all(line.startswith("#") for line in block)],
            command=command,
            colors=LINE_COLORS,
        )
    )


def command_line(words: Sequence[str]) -> str:
    """A command to read and to run again, without what is nobody's business: the value of a flag in `SECRETS`."""
    shown = list(words)
    for index, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in SECRETS and equals:
            shown[index] = f"{flag}=***"
        elif flag in SECRETS and index + 1 < len(shown):
            shown[index + 1] = "***"
    return shlex.join(shown)


def _before_after(before: float, after: float | None) -> tuple[str, str, str]:
    if after is None:
        return _score(before), "", ""
    return _score(before), _score(after), _score(after - before, sign="+")


def _score(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{value:{sign}{',.3f' if abs(value) < 1e5 else '.2e'}}".replace("-", "−")


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{'−' if value < 0 else ''}{number(abs(value))}"


def _prompt(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message_text([message])}" for message in prompt)


def _figure(name: str, one: Completion):
    reward = "skipped" if math.isnan(one.reward) else f"reward {one.reward:.2f}".replace("-", "−")
    return heatmap(
        one.explained, one.text, one.perplexities, caption=f"{name}: {reward}", context=one.lead,
        context_name="Completion; below it the reference, which is scored", top=0,
    )  # fmt: skip
