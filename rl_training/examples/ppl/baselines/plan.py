"""What is asked for, checked as far as it can be without a model."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import cli
from ..data import Columns, PromptForm, find_columns, has_reference, load_split
from ..errors import InputError
from ..files import check_folder, writable_file
from ..identity import differences
from ..models import model_path
from ..reference_context import ReferenceContext
from ..retired import retired
from ..splits import column_names
from .file import SUFFIXES
from .meta import read_meta
from .parts import Parts
from .rows import Row, read_rows
from .scores import generation

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


class Job(NamedTuple):
    args: argparse.Namespace
    output: Path
    parts: Parts
    dataset: Any  # datasets.Dataset, with --streaming datasets.IterableDataset
    columns: Columns
    form: PromptForm
    texts: int | None  # rows to score, where that is known
    settings: dict  # which parts must have been made with

    def rows(self) -> Iterator[Row | None]:
        # What the model writes itself needs no reference.
        scored = "reference" if has_reference(self.columns, self.form) and not self.args.generate else "prompt"
        return read_rows(self.dataset, self.columns, self.form, self.args.num_samples, scored)

    def is_conversational(self) -> bool:
        """Whether prompts are chat messages: those of the first row with text tell."""
        first = next(filter(None, self.rows()), None)
        return first is not None and not isinstance(first.prompt, str)


def prepare(args: argparse.Namespace, survey: bool = True) -> Job:
    """Raises `InputError` for what cannot be done. `survey`: read the whole data set once, unless it is streamed."""
    output = output_path(args)
    parts = Parts(output)
    check_model(args)
    ReferenceContext(template=args.template, target=args.target)
    form = cli.prompt_form(args)
    cli.chat_options(args)
    if args.plot is not None:
        plot = writable_file(args.plot, "--plot", PLOT_SUFFIXES)
        if plot.exists() and not args.overwrite and parts.settings().get("plot") != args.plot:
            raise InputError(f"{plot} exists: replace it with --overwrite, or choose another --plot")
    flags = ("model_name", "load_in_4bit", "dtype", "max_seq_length", "dataset_name", "dataset_config", "dataset_split")
    flags += ("num_samples", "target", "template", "max_phrase_words", "language", "aggregation")
    flags += ("chat_template_path", "chat_template_kwargs", "tools")
    settings = {**{name: getattr(args, name) for name in flags}, "generated": generation(args), **form.identity}
    parts.check(settings)
    if output.exists() and not args.overwrite and not is_complete(parts, output):
        raise InputError(f"{output} exists: replace it with --overwrite, or choose another --output_path")
    if args.output_dataset is not None:
        check_dataset_folder(args, parts)

    texts = cli.column_options(args)[:3]
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split, args.streaming, texts)
    names = column_names(dataset)
    if not names:
        raise InputError(f"split {args.dataset_split!r} of data set {args.dataset_name!r} holds no row")
    columns = find_columns(names, *cli.column_options(args))
    if args.target == "reference" and not has_reference(columns, form):
        raise InputError(
            f"--target reference needs a text to measure, and the data set has the columns {', '.join(names)}: name it "
            "with --reference_column NAME"
        )
    if args.generate and args.target == "reference":
        raise InputError("--generate samples completions, --target reference measures the data set's texts: drop one")
    settings["columns"] = columns._asdict()
    parts.check(settings)
    job = Job(args, output, parts, dataset, columns, form, None, settings)
    if not survey:
        return job
    seen = texts = 0
    for row in job.rows():
        seen += 1
        texts += row is not None
        if args.streaming and texts:
            return job
    if not texts:
        raise InputError(
            f"none of the {seen} rows of split {args.dataset_split!r} of data set {args.dataset_name!r} has text in "
            f"column {columns.reference or columns.prompt}: name another with --reference_column or --prompt_column"
        )
    return job._replace(texts=texts)


def check_model(args: argparse.Namespace) -> None:
    """Raises `InputError` for a model that is not there, and for ways of loading one where a server has loaded it."""
    if not args.scorer_url or args.generate:
        model_path(args.model_name)
    elif args.load_in_4bit is not None or args.dtype != "auto":
        raise InputError("--scorer_url scores with the model as the server loaded it: drop --load_in_4bit and --dtype")


def output_path(args: argparse.Namespace) -> Path:
    if gone := retired("baselines", args.output_path):
        raise InputError(f"--output_path {args.output_path}: {gone}")
    return writable_file(args.output_path, "--output_path", SUFFIXES)


def is_complete(parts: Parts, output: Path) -> bool:
    """Whether the run that made `parts` came to its end, all but their removal: its meta file names the run."""
    run = parts.settings().get("run")
    return run is not None and output.exists() and read_meta(output).get("run") == run


def dataset_file(args: argparse.Namespace) -> Path:
    # A name that `datasets` finds a split of any name by.
    return Path(args.output_dataset, "data", f"{args.dataset_split}-00000-of-00001.parquet")


def dataset_baselines(args: argparse.Namespace) -> Path:
    # Hidden, so that `datasets` takes the meta file of this name for no part of the data.
    return Path(args.output_dataset, ".baselines")


def check_other_splits(args: argparse.Namespace, identity: dict) -> None:
    """Splits made with different models would look like one data set."""
    if differing := differences(read_meta(dataset_baselines(args)), identity):
        values = ", ".join(f"{name} {theirs}, now {mine}" for name, (theirs, mine) in differing.items())
        raise InputError(
            f"--output_dataset {args.output_dataset} was made with other settings ({values}): choose a new folder"
        )


def check_dataset_folder(args: argparse.Namespace, parts: Parts) -> None:
    folder, file = Path(args.output_dataset), dataset_file(args)
    if not args.dataset_split.replace("_", "").replace(".", "").isalnum():
        raise InputError(f"--output_dataset needs one whole split, --dataset_split is {args.dataset_split!r}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dataset {folder} is a file: expected a folder")
    check_folder(folder if folder.exists() else folder.parent, "--output_dataset", str(folder))
    there = os.listdir(folder) if folder.exists() else []
    if foreign := [name for name in there if name != "data" and not name.startswith(".")]:
        raise InputError(f"--output_dataset {folder} holds {foreign[0]}, which is no part of it: choose a new folder")
    if file.exists() and not args.overwrite and parts.settings().get("output_dataset") != args.output_dataset:
        raise InputError(f"{file} exists: replace it with --overwrite, or choose another --output_dataset")
