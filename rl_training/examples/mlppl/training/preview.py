"""What a run will do, said before its first step; and that step, shown and not kept (--dry_run)."""

import math
import re
import textwrap
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerState

from ..config import ALL_LEVELS
from ..data import message_text
from ..processes import is_first
from ..prompts import render_prompt
from ..reward.function import MultiLevelPPLRewardFunction
from ..reward.terms import as_nats
from ..scoring.contexts import Views
from ..scoring.sampling import prompt_ids
from .diagnostics import Diagnostics
from .job import Job
from .trainer import or_none

WIDTH = 96  # of a line
OWN = "multi_level_ppl"  # the reward's name, and what its levels' names begin with
MOST = 280  # characters of a text; of a longer one the middle is left out


def announce(job: Job, trainer, reward_fn: MultiLevelPPLRewardFunction) -> None:
    """Print what the run reads, how many steps it makes, and where its results go."""
    args, state, group = trainer.args, TrainerState(), trainer.args.num_generations
    epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    state.compute_steps(args, steps)
    prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size / group
    by_steps = args.save_strategy == "steps"
    saved = f"{_every(state.save_steps)} and at the end" if by_steps else f"--save_strategy {args.save_strategy.value}"
    evaluated = "" if job.eval_rows is None else f", {len(job.eval_rows):,} evaluated while training"
    lines = [
        f"Data: {job.dataset_name}, split {job.dataset_split}",
        _columns(job),
        *_texts(job, reward_fn),
        f"Rows: {len(job.train_rows):,} to train on, {len(job.heldout_rows):,} held out{evaluated}",
        f"A step: {_prompts(prompts)}, {group} completions of each, of at most {job.sampling.max_new_tokens} tokens",
        f"Steps: {steps:,}, a log line {_every(state.logging_steps)}; how long they take is said after the first one",
        f"Checkpoints: {job.output / 'checkpoint-N'}, {saved}",
        f"Report, kept up to date: {job.output / 'report.html'}",
        *([] if job.checkpoint is None else [f"Going on from {job.checkpoint}"]),
    ]
    if is_first():
        print("\n".join(["This run", *(f"  {line}" for line in lines)]), flush=True)


def _prompts(number: float) -> str:
    return "1 prompt" if number == 1 else f"{number:g} prompts"


def _every(steps: float) -> str:
    return "at each step" if steps == 1 else f"every {steps:g} steps"


def _columns(job: Job) -> str:
    prompt, reference, _ = job.columns
    name = "references" if job.reward.target == "reference" else "completions"
    if job.form.prompt_sentences:
        return f"Columns: of {prompt} the first {job.form.prompt_sentences} sentences are prompts, the rest {name}"
    return f"Columns: {prompt} has the prompts" + (f", {reference} the {name}" if reference else "")


def _texts(job: Job, reward_fn: MultiLevelPPLRewardFunction) -> list[str]:
    """The first row as policy and scorer read it; what the scorer reads only where it is something else."""
    row, tokenizer, chat = job.train_rows[0], reward_fn.policy.tokenizer, job.chat
    prompt, reference = row["prompt"], message_text(row.get("reference") or "")
    lines = [_line("The policy reads", tokenizer.decode(prompt_ids([prompt], tokenizer, **chat)[0]))]
    if job.reward.target == "reference":
        context = reward_fn.reference_context(prompt, "{completion}")
        return [*lines, _line("The scorer reads", context), _line("and scores", reference)]
    scored: Any = reward_fn.calculator.text(prompt, "")  # no completion: one that a chat template refuses is not read
    context = scored[-1][0][0] if isinstance(scored, Views) else scored[0]
    if context != render_prompt(prompt, tokenizer, **chat):
        lines.append(_line("The scorer reads", context))
    return [*lines, _line("Its completion in the data", reference)] if reference else lines


def _line(label: str, text: str) -> str:
    """A text in quotes, line breaks as \\n; a long one without its middle."""
    if len(text) > MOST:
        text = f"{text[: MOST // 2]} [...] {text[-MOST // 2 :]}"
    shown = re.sub(r"[\n\r\t]", lambda one: repr(one[0])[1:-1], text)
    return _wrapped(f'{label}: "{shown}"')


def _wrapped(line: str) -> str:
    """On lines of at most `WIDTH` columns, those below the first indented."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, WIDTH - 2, subsequent_indent=indent, break_on_hyphens=False)


# --- dry run ---------------------------------------------------------------------------------------------------------


class _OneStep(TrainerCallback):
    """Ends the training after its first step, with nothing saved, logged or evaluated. Must come last."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True
        control.should_save = control.should_evaluate = control.should_log = False

    on_epoch_end = on_step_end


def dry_run(job: Job, trainer, diagnostics: Diagnostics) -> int:
    """One step by the trainer itself, and what it sampled and earned, group by group. The exit code."""
    trainer.add_callback(_OneStep())
    trainer.train(resume_from_checkpoint=job.checkpoint)
    if is_first():
        print(batch_in_words(trainer, nested=job.reward.aggregation == "nested"))
        for text in diagnostics.verdicts(least=1).values():
            print(_wrapped(text))
        print(f"Nothing was written to {job.output}. Without --dry_run the run begins.")
    trainer.accelerator.end_training()
    return 0


def batch_in_words(trainer, nested: bool) -> str:
    """The completions that a trainer sampled last, of all its processes, and what each earned: from TRL's own table.

    The reward, what other functions add to it, and each level's improvement, with --per_level also what that adds. An
    improvement is in percent, of nested levels in nats a token."""
    table, size = trainer._logs, trainer.args.num_generations
    weighted = pd.DataFrame(dict(table["rewards"])) * trainer.reward_weights.tolist()
    others = [name for name in weighted if not name.startswith(OWN)]
    extra = pd.DataFrame(dict(table["extra"]))
    levels = [name for name in ALL_LEVELS if f"reward_{name}" in extra]
    rows = weighted.assign(reward=weighted.sum(axis=1, min_count=1)).astype(float)
    for level in levels:  # a blank completion has none, as in the log's means
        rows[level] = extra[f"reward_{level}"].where(extra[f"ppl/{level}"].notna()).astype(float)
        rows[level] = as_nats(rows[level]) if nested else rows[level]

    def told(numbers) -> str:
        shown = [f"{name} {or_none(numbers[name], '{:.3f}')}" for name in ("reward", *others)]
        for level in levels:
            name = f"{OWN}_{level}"  # there with --per_level
            own = f" ({or_none(numbers[name], '{:.3f}')})" if name in rows else ""
            shown.append(f"{level} {or_none(numbers[level], '{:+.2f} nats' if nested else '{:+.1f} %')}{own}")
        return ", ".join(shown)

    lines, flat, groups = [], 0, rows.groupby(rows.index // size)
    for number, group in groups:
        lines += ["", _line(f"Prompt {number + 1}", message_text(table["prompt"][group.index[0]]))]
        for index, numbers in group.iterrows():
            lines.append(_wrapped(f"  {told(numbers)}"))
            lines.append(_line("    wrote", message_text(table["completion"][index])))
        flat += not group["reward"].max() - group["reward"].min() > 1e-9
        lines.append(f"  spread of these rewards: {or_none(group['reward'].std(), '{:.3f}')}")
    return "\n".join([
        *lines,
        "",
        f"All {len(rows)} completions of {_prompts(len(groups))}; a spread is a standard deviation",
        _wrapped(f"  mean: {told(rows.mean())}"),
        _wrapped(f"  spread: {told(rows.std()).replace('+', '')}"),
        f"  groups without spread, from which nothing is learned: {flat} of {len(groups)}",
    ])  # fmt: skip
