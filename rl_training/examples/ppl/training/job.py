"""What is asked for, checked as far as it can be without a model; Unsloth is imported here, before TRL."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import cli
from ..baselines.file import Baselines, check_meta, read_meta
from ..config import Sampling
from ..data import PromptForm, check_references, find_columns, load_split, prepare_rows, prompt_key, split_heldout
from ..errors import BaselineError, InputError
from ..files import check_folder
from ..models import import_unsloth, model_path
from ..processes import is_first
from .settings import (
    CONFIG_FILE,
    check_reporters,
    find_checkpoint,
    grpo_config,
    loading,
    plan_batches,
    reward_settings,
    write_config,
)


@dataclass
class Job:
    args: argparse.Namespace
    command: list[str]  # the command line's words after the script's name
    checkpoint: str | None  # to go on from
    settings: dict  # keywords of the reward
    sampling: Sampling
    baselines: Baselines | None
    column_meta: Baselines  # no rows: how the data set's columns `baseline_...` were made, if it says so
    policy_load: dict  # keywords of `load_model`
    scorer_load: dict
    train_rows: Any  # data sets of `prepare_dataset`
    heldout_rows: Any
    eval_rows: Any | None
    without_unsloth: str | None  # why, if it is not used
    config: Any  # TRL's GRPOConfig
    asked: dict  # its fields as they were asked for
    defaults: dict  # and as they are otherwise

    @property
    def chat(self) -> dict:
        """The keywords of `ppl.prompts.render_prompt`: the same for policy, scorer and held-out sampling."""
        return {name: self.settings[name] for name in ("chat_template_kwargs", "tools")}

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    def guarded_prompts(self, tokenizer) -> dict:
        """The keywords of the guard with which what repeats the prompt counts as a loop; none where it may.

        With a reference as target a completion does not earn by what it repeats.
        """
        if self.args.allow_copies or self.args.target == "reference":
            return {}
        return {"tokenizer": tokenizer, "chat": self.chat}

    @property
    def config_file(self) -> Path:
        return self.output / CONFIG_FILE

    def write_config(self) -> None:
        """Make the output folder, and write down every setting of the run."""
        self.output.mkdir(parents=True, exist_ok=True)
        chosen = {**vars(self.args), **self.policy_load, "heldout_samples": len(self.heldout_rows)}
        if self.config.process_index == 0:
            write_config(self.config_file, chosen, self.asked, self.defaults)


def prepare(args: argparse.Namespace, rest: list[str], command: list[str], prepare_dataset: Callable) -> Job:
    """Raises `InputError` for what cannot be done. rest: words of the command line that are GRPOConfig's.

    prepare_dataset: what makes rows of a data set, see the training script.
    """
    # What a server scores with is not loaded here.
    for name in filter(None, (args.model_name, None if args.scorer_url else args.scorer_model)):
        model_path(name)
    form, sampling = cli.prompt_form(args), cli.sampling(args)
    check_output(args.output_dir)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    settings = reward_settings(args)
    check_reporters(args)
    batches = plan_batches(
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.num_generations,
        int(os.environ.get("WORLD_SIZE", "1")),
        any(word.startswith(("--steps_per_generation", "--generation_batch_size")) for word in rest),
    )
    baselines = Baselines.load(args.baselines_path) if args.baselines_path is not None else None
    # A data set that compute_baselines_trl.py wrote has them as columns, and says the same of how they were made.
    column_meta = Baselines({}, read_meta(Path(args.dataset_name, ".baselines")), args.dataset_name)
    made = baselines or column_meta
    if not args.allow_baseline_mismatch:
        config = cli.reward_config(args)
        scorer = {"name": args.scorer_model or args.model_name}
        expected = {
            "prompt": form.identity,
            "definitions": config.definitions,
            "target": config.target,
            "model": scorer,
        }
        check_meta(made, expected)
    policy_load, scorer_load = loading(args, made.meta)
    notices: list[str] = []
    rows = load_rows(args, form, args.dataset_split, baselines, prepare_dataset, notices, args.max_samples)
    train_rows, heldout_rows = split_heldout(rows, args.heldout_samples, args.seed)
    if left := len(rows) - len(train_rows) - len(heldout_rows):
        notices.append(f"{left} of {len(rows)} rows are not trained on: their prompts are those of held-out rows")
    eval_rows = None
    if args.eval_split:
        eval_rows = load_rows(args, form, args.eval_split, baselines, prepare_dataset, notices)
        trained = set(map(prompt_key, train_rows["prompt"]))
        if seen := sum(prompt_key(prompt) in trained for prompt in eval_rows["prompt"]):
            of = f"{seen} of {len(eval_rows)} rows of --eval_split {args.eval_split}"
            notices.append(f"{of} have prompts that are trained on")
    without_unsloth = "--no_unsloth" if args.no_unsloth else import_unsloth()
    config, asked, defaults = grpo_config(args, rest, batches)
    config.eval_on_start = config.eval_on_start and checkpoint is None
    check_batch(len(train_rows), config)
    if config.push_to_hub:
        check_hub(config)
    if is_first():
        print("".join(f"{notice}\n" for notice in notices), end="", file=sys.stderr)
    sampling = replace(sampling, max_new_tokens=config.max_completion_length)
    return Job(
        args, command, checkpoint, settings, sampling, baselines, column_meta, policy_load, scorer_load, train_rows,
        heldout_rows, eval_rows, without_unsloth, config, asked, defaults,
    )  # fmt: skip


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


def push_command(config) -> str:
    """The command that pushes a run's folder as --push_to_hub does."""
    options = ["--private"] if config.hub_private_repo else []
    options += ["--revision", config.hub_revision] if config.hub_revision else []
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    return shlex.join(["hf", "upload", name, config.output_dir, ".", "--exclude", "checkpoint-*", *options])


def check_batch(rows: int, config) -> None:
    """Raises `InputError` if the rows are too few for one batch: TRL would train no step and report success."""
    prompts = config.generation_batch_size // config.num_generations
    if rows < prompts:
        raise InputError(
            f"{rows} rows are left to train on, and one batch samples completions for {prompts} prompts: lower "
            "--per_device_train_batch_size, --gradient_accumulation_steps or --heldout_samples, or bring more rows"
        )


def load_rows(
    args: argparse.Namespace,
    form: PromptForm,
    split: str,
    baselines: Baselines | None,
    prepare_dataset: Callable,
    notices: list[str],
    most: int | None = None,
):
    """A split's first rows as `prepare_dataset` makes them. How many it left out is added to the notices.

    Raises `InputError` if one has no baseline and needs it, or one that is another text's.
    """
    dataset = load_split(args.dataset_name, args.dataset_config, split, text_columns=cli.column_options(args)[:3])
    if most is not None:
        dataset = dataset.select(range(min(most, len(dataset))))
    columns = find_columns(dataset.column_names, *cli.column_options(args))
    rows = prepare_dataset(dataset, columns, form)
    if not len(rows):
        raise InputError(f"split {split!r} of data set {args.dataset_name!r} holds no row with a prompt")
    if len(rows) < len(dataset):
        left_out = f"{len(dataset) - len(rows)} of {len(dataset)} rows of split {split!r} are left out"
        notices.append(f"{left_out}: no prompt" + (", or no text behind it" if form.prompt_sentences else ""))
    if set(cli.reward_config(args).baseline_columns) & set(dataset.column_names) & set(rows.column_names):
        _check_unedited(rows, prepare_rows(dataset, columns, form), args.dataset_name)
    references = rows["reference"] if args.target == "reference" else None
    if references is not None:
        check_references(rows, columns, form, blank_is_wrong=args.missing == "error")
    if baselines is not None:
        baselines.check_coverage(rows["id"], rows["prompt"], references, needed=args.missing == "error")
    return rows


def _check_unedited(rows, as_they_came, name: str) -> None:
    """The data set's own baselines are of its own prompts."""
    prompts = dict(zip(as_they_came["id"], as_they_came["prompt"], strict=True))
    for index, (row_id, prompt) in enumerate(zip(rows["id"], rows["prompt"], strict=True)):
        if prompts.get(row_id, prompt) != prompt:
            raise BaselineError(
                f"row {index}, id {row_id!r:.40}: prepare_dataset changed the prompt, and the columns baseline_... of "
                f"{name} are of the unchanged one: compute baselines of the changed rows, or drop the columns"
            )
