"""What is asked for, checked as far as it can be without a model; Unsloth is imported here, before TRL."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import cli
from ..baselines.file import Baselines, check_meta, read_meta
from ..data import (
    FIRST,
    Shown,
    check_references,
    find_columns,
    load_split,
    prepare_rows,
    prompt_key,
    read_shown,
    shown_key,
    split_heldout,
)
from ..errors import BaselineError, InputError
from ..files import check_folder, write_text
from ..models import import_unsloth
from ..processes import is_first
from ..reward.loop_guard import check_weight
from .settings import (
    CONFIG_FILE,
    check_reporters,
    check_unused,
    config_text,
    find_checkpoint,
    grpo_config,
    models,
    plan_batches,
)


class Job:
    """What the flags of a run ask for, by names. Raises `InputError` for what cannot be done.

    dataset_name, dataset_split, loop_penalty, per_level, allow_copies: the flags. models: what is trained and what
    scores, `mlppl.training.settings.Models`. reward: `mlppl.config.RewardConfig`. sampling: `mlppl.config.Sampling`.
    chat: keywords of `mlppl.prompts.render_prompt`, for policy, scorer and held-out sampling. baselines: None without a
    file; column_meta: without rows, how the data set's columns `baseline_...` were made, if it says so. train_rows,
    heldout_rows, eval_rows (or None): data sets of `prepare_dataset`. columns and form: `mlppl.data.Columns` and
    `PromptForm` of what is trained on. output: the run's folder; with --dry_run config has another one, which goes.
    checkpoint: to go on from, or None. without_unsloth: why, if it is not used. config: TRL's GRPOConfig; asked: its
    fields as they were asked for. command: the command line's words after the script's name. contexts: keywords of the
    calculator, rows that the scorer reads, which are in none of the others.
    """

    def __init__(
        self, args: argparse.Namespace, rest: list[str], command: list[str], prepare_dataset: Callable
    ) -> None:
        """rest: words of the command line that are GRPOConfig's. prepare_dataset: what makes rows of a data set, see
        the training script."""
        self.command, self.dataset_name, self.dataset_split = command, args.dataset_name, args.dataset_split
        self.loop_penalty, self.per_level, self.allow_copies = args.loop_penalty, args.per_level, args.allow_copies
        check_weight(args.loop_penalty)
        self.checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
        check_reporters(args.report_to or (["wandb"] if args.wandb_project else []))
        numbers = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_generations
        sampled_apart = any(word.startswith(("--steps_per_generation", "--generation_batch_size")) for word in rest)
        batches = plan_batches(*numbers, int(os.environ.get("WORLD_SIZE", "1")), sampled_apart)
        check_output(args.output_dir)
        self.reward, sampling, self.form = cli.reward_config(args), cli.sampling(args), cli.prompt_form(args)
        if self.per_level and not (self.reward.reference_context.reads_prompt or self.allow_copies):
            raise InputError(
                "--per_level has no guard against quoting the reference, which a --template without {prompt} pays for: "
                "leave it out, or add --allow_copies"
            )
        self._config_name, self._columns, self._prepare = args.dataset_config, cli.column_options(args), prepare_dataset
        self.chat = cli.chat_options(args)

        self.baselines = (
            None if args.baselines_path is None else Baselines.load(args.baselines_path, self.reward.levels)
        )
        # A data set that compute_baselines_trl.py wrote has them as columns, and says the same of how they were made.
        self.column_meta = Baselines({}, read_meta(Path(args.dataset_name, ".baselines")), args.dataset_name)
        made = self.baselines or self.column_meta
        if not self.reward.allow_baseline_mismatch:
            same = {"definitions": self.reward.definitions, "target": self.reward.target, "prompt": self.form.identity}
            check_meta(made, {**same, "model": {"name": args.scorer_model or args.model_name}})
        self.models = models(args, made.meta)

        self._notices: list[str] = []
        self._shown: dict[str, list[Shown]] = {"examples": [], "others": []}
        rows = self._load_rows(self.dataset_split, args)
        self.train_rows, self.heldout_rows = split_heldout(rows, args.heldout_samples, args.seed)
        if left := len(rows) - len(self.train_rows) - len(self.heldout_rows):
            of = f"{left} of {len(rows)} rows"
            self._notices.append(f"{of} are not trained on: their prompts are those of held-out rows")
        self.eval_rows = self._load_rows(args.eval_split) if args.eval_split else None
        self.contexts = {**self._shown, "prompt_template": args.prompt_template}
        if self.eval_rows is not None:
            trained = set(map(prompt_key, self.train_rows["prompt"]))
            if seen := sum(prompt_key(prompt) in trained for prompt in self.eval_rows["prompt"]):
                of = f"{seen} of {len(self.eval_rows)} rows of --eval_split {args.eval_split}"
                self._notices.append(f"{of} have prompts that are trained on")
        self._replaces = args.overwrite and self.checkpoint is None
        if not self._replaces and self.checkpoint is None:
            check_unused(args.output_dir)
        self.without_unsloth = "--no_unsloth" if args.no_unsloth else import_unsloth()
        self.config, self.asked, defaults = grpo_config(args, rest, batches)
        self.config.eval_on_start = self.config.eval_on_start and self.checkpoint is None
        self.output = Path(self.config.output_dir)
        self.sampling = replace(sampling, max_new_tokens=self.config.max_completion_length)
        flags = {**vars(args), **self.models.policy_load, "heldout_samples": len(self.heldout_rows)}
        self._config_text = config_text(flags, self.asked, defaults)
        check_batch(len(self.train_rows), self.config)
        if args.dry_run:
            self._nowhere = TemporaryDirectory()
            nothing = {"report_to": [], "log_completions": False, "push_to_hub": False, "eval_on_start": False}
            for name, value in {**nothing, "output_dir": self._nowhere.name}.items():
                setattr(self.config, name, value)
                self.asked[name] = value
        if self.config.push_to_hub:
            check_hub(self.config)
        if is_first():
            print("".join(f"{notice}\n" for notice in self._notices), end="", file=sys.stderr)

    @property
    def config_file(self) -> Path:
        return self.output / CONFIG_FILE

    @property
    def has_columns(self) -> bool:
        """Whether the data set carries its baselines."""
        return set(self.reward.baseline_columns) <= set(self.train_rows.column_names)

    def write_config(self) -> None:
        """Make the output folder, and write down every setting of the run; what --overwrite replaces goes."""
        self.output.mkdir(parents=True, exist_ok=True)
        if self.config.process_index == 0:
            if self._replaces:
                for folder in [*self.output.glob("checkpoint-*"), self.output / "merged"]:
                    shutil.rmtree(folder, ignore_errors=True)
                (self.output / "reward.png").unlink(missing_ok=True)  # a run of one log entry makes none
            write_text(self.config_file, self._config_text)

    def guarded_prompts(self, tokenizer) -> dict:
        """The keywords of the guard with which what repeats the prompt counts as a loop; none where it may.

        With a reference as target a completion does not earn by what it repeats.
        """
        if self.allow_copies or self.reward.target == "reference":
            return {}
        return {"tokenizer": tokenizer, "chat": self.chat}

    def _first_rows(self, dataset, columns) -> Iterator[Shown]:
        """Those that examples and other rows are drawn from, made when they are asked for."""
        rows = self._prepare(dataset.select(range(min(FIRST, len(dataset)))), columns, self.form)
        yield from zip(rows["prompt"], rows["reference"], strict=True)

    def _load_rows(self, split: str, drawn: argparse.Namespace | None = None):
        """A split's rows as `prepare_dataset` makes them, examples left out. How many it left out is noted.

        drawn: flags that say how many rows are used, and which are drawn from them to be shown to the scorer.
        Raises `InputError` if one has no baseline and needs it, or one that is another text's.
        """
        dataset = load_split(self.dataset_name, self._config_name, split, text_columns=self._columns[:3])
        columns = find_columns(dataset.column_names, *self._columns)
        if drawn is not None:
            self.columns = columns
            self._shown = cli.shown_rows(drawn, self._first_rows(dataset, columns))
            # Baselines of several splits drew from all of them.
            kept = Path(f"{drawn.baselines_path}.others.jsonl")
            if drawn.baselines_path and "prompt" in self.reward.levels and kept.exists():
                self._shown["others"] = read_shown(kept)
            if drawn.max_samples is not None:
                dataset = dataset.select(range(min(drawn.max_samples, len(dataset))))
        rows = self._prepare(dataset, columns, self.form)
        if not len(rows):
            raise InputError(f"split {split!r} of data set {self.dataset_name!r} holds no row with a prompt")
        if len(rows) < len(dataset):
            left_out = f"{len(dataset) - len(rows)} of {len(dataset)} rows of split {split!r} are left out"
            why = "no prompt" + (", or no text behind it" if self.form.prompt_sentences else "")
            self._notices.append(f"{left_out}: {why}")
        if set(self.reward.baseline_columns) & set(dataset.column_names) & set(rows.column_names):
            unedited = prepare_rows(dataset, columns, self.form)
            prompts = dict(zip(unedited["id"], unedited["prompt"], strict=True))
            for index, (row_id, prompt) in enumerate(zip(rows["id"], rows["prompt"], strict=True)):
                if prompts.get(row_id, prompt) != prompt:
                    raise BaselineError(
                        f"row {index}, id {row_id!r:.40}: prepare_dataset changed the prompt, and the columns baseline_"
                        f"... of {self.dataset_name} are of the unchanged one: compute baselines of the changed rows, "
                        "or drop the columns"
                    )
        if shown := {shown_key(prompt) for prompt, _ in self._shown["examples"]}:
            rows = rows.select([index for index, one in enumerate(rows["prompt"]) if shown_key(one) not in shown])
        references, needed = None, self.reward.missing == "error"
        if self.reward.target == "reference":
            references = rows["reference"]
            check_references(rows, columns, self.form, blank_is_wrong=needed)
        if self.baselines is not None:
            self.baselines.check_coverage(rows["id"], rows["prompt"], references, needed=needed)
        return rows


def check_output(folder: str) -> None:
    """Raises `InputError` unless `folder` is a folder that can be written to, or can be made."""
    there = next(one for one in (Path(folder), *Path(folder).absolute().parents) if one.exists())
    if not folder or not there.is_dir():
        raise InputError(f"--output_dir is {folder!r}, expected a folder, or the name of one to make")
    check_folder(there, "--output_dir", folder)


def check_hub(config) -> None:
    """Raises `InputError` unless the repository that --push_to_hub fills is there, or can be made: the trainer does the
    same when the model is loaded."""
    from huggingface_hub import HfApi

    if not is_first():
        return
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    try:
        HfApi().create_repo(name, token=config.hub_token, private=config.hub_private_repo, exist_ok=True)
    except Exception as error:  # of the network, the hub's answer, a name that it does not take
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise InputError(
            f"--push_to_hub: the hub does not take {name!r} ({reason}): see to the network, to `hf auth login` or "
            f"HF_TOKEN, and to --hub_model_id; or leave it out and push later, with {push_command(config)}"
        ) from error


def push_command(config, folder: str | None = None) -> str:
    """The command that pushes a run's folder as --push_to_hub does. folder: its name where the command is called."""
    options = ["--private"] if config.hub_private_repo else []
    options += ["--revision", config.hub_revision] if config.hub_revision else []
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    return shlex.join(["hf", "upload", name, folder or config.output_dir, ".", "--exclude", "checkpoint-*", *options])


def check_batch(rows: int, config) -> None:
    """Raises `InputError` if the rows are too few for one batch: TRL would train no step and report success."""
    prompts = config.generation_batch_size // config.num_generations
    if rows < prompts:
        raise InputError(
            f"{rows} rows are left to train on, and one batch samples completions for {prompts} prompts: lower "
            "--per_device_train_batch_size, --gradient_accumulation_steps or --heldout_samples, or bring more rows"
        )
