"""A data set -> its baselines file, by however many processes, from wherever an earlier run stopped."""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from .. import cli
from ..config import COLORS, LEVELS
from ..data import (
    Columns,
    PromptForm,
    Text,
    find_columns,
    has_reference,
    load_split,
    make_row,
    message_text,
    refuse_unscored,
    stable_id,
)
from ..errors import InputError, retired
from ..files import check_folder, writable_file, write_atomically
from ..models import load_model, model_path
from ..prompts import chat_identity
from ..splits import column_names, reading
from .file import SUFFIXES, TEXTS, beginning, meta_path, read_meta, versions, write_meta, write_records
from .parts import Parts, Processes, cannot_write

if TYPE_CHECKING:  # scoring imports transformers, and Unsloth must come before that
    from ..scoring.levels import Scores

# --- rows ------------------------------------------------------------------------------------------------------------

# A data set as it comes -> rows with text and an id of their own, in windows.


class Row(NamedTuple):
    number: int  # in the data set, from 0
    id: str | int
    prompt: Text
    reference: Text  # "" where the data set has none


class Window(NamedTuple):
    number: int
    rows: list[Row]
    blank: int  # rows without text before or between these
    digest: str  # of the rows' content


class Seen:
    """Ids that came by, 8 bytes each."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, dtype=np.uint64)

    def add(self, ids: Sequence[str | int]) -> list[bool]:
        """Of each id, whether it was there before."""
        hashes = [hashlib.blake2b(str(i).encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids]
        new = np.frombuffer(b"".join(hashes), dtype=np.uint64)
        distinct, first = np.unique(new, return_index=True)
        indices = np.searchsorted(self._hashes, distinct)
        known = np.append(self._hashes, 0)[indices] == distinct
        known &= indices < len(self._hashes)
        self._hashes = np.insert(self._hashes, indices[~known], distinct[~known])
        before = np.ones(len(new), dtype=bool)
        before[first[~known]] = False
        return before.tolist()


def read_rows(dataset, columns: Columns, form: PromptForm, limit: int | None, scored: str) -> Iterator[Row | None]:
    """The rows in the order of the data set, None for one without text, up to `limit` with text.

    scored: "prompt" or "reference", which of the two must have some.
    Raises `InputError` for what is no text or no id, and for an id that an `id` column has twice.
    """
    seen = Seen()
    number = kept = 0
    for batch in _batches(dataset, columns):
        rows = []
        for example in batch:
            row = make_row(example, number, columns, form)
            if scored == "reference":
                refuse_unscored(row["reference"], number)
            rows.append(Row(number, **row) if message_text(row[scored]).strip() else None)
            number += 1
        with_text = [row for row in rows if row is not None]
        if columns.id is not None:
            for row, twice in zip(with_text, seen.add([row.id for row in with_text]), strict=True):
                if twice:
                    raise InputError(
                        f"row {row.number} has the id {row.id!r}, as an earlier row has: ids must be distinct; without "
                        "such a column a hash of prompt and reference is the id"
                    )
        for row in rows:
            yield row
            kept += row is not None
            if kept == limit:
                return


def _batches(dataset, columns: Columns) -> Iterator[list[dict]]:
    names = list(dict.fromkeys(name for name in columns if name is not None))
    with reading():
        for batch in dataset.select_columns(names).iter(batch_size=1000):
            yield [dict(zip(names, values, strict=True)) for values in zip(*(batch[n] for n in names), strict=True)]


def windows(rows: Iterable[Row | None], most_rows: int, most_characters: int) -> Iterator[Window]:
    number = blank = characters = 0
    held: list[Row] = []
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row and row[1:]).encode())
        if row is None:
            blank += 1
            continue
        held.append(row)
        characters += len(message_text(row.prompt)) + len(message_text(row.reference))
        if len(held) == most_rows or characters >= most_characters:
            yield Window(number, held, blank, digest.hexdigest())
            number, held, blank, characters = number + 1, [], 0, 0
            digest = hashlib.blake2b(digest_size=8)
    if held or blank:
        yield Window(number, held, blank, digest.hexdigest())


# --- scores ----------------------------------------------------------------------------------------------------------

# Rows -> their perplexities: what a baseline is.


class Scorer(NamedTuple):
    score: Callable[[Sequence[Row]], "Scores"]
    identity: dict  # what the meta file says of model, tokenizer and definitions
    device: str


def load_scorer(args: argparse.Namespace, columns: Columns, device: str | None) -> Scorer:
    """A model that gives a row the perplexity of its reference given its prompt, or of its prompt alone.

    With --scorer_url it is a server's, and a model is only loaded here for --generate, to write the texts.
    """
    server, model, unsloth = None, None, False
    if args.scorer_url:
        from ..scoring.server import connect

        server, tokenizer = connect(args.scorer_url, args.model_name, args.chat_template_path)
    if server is None or args.generate:
        import torch

        in_4bit = is_4bit(args.model_name) if args.load_in_4bit is None else args.load_in_4bit
        # On a CPU and not quantised, Unsloth's model is that of transformers.
        on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
        unsloth = not args.no_unsloth and (in_4bit or on_gpu)
        model, tokenizer, reason = load_model(
            args.model_name,
            load_in_4bit=in_4bit,
            dtype=args.dtype,
            device=device,
            max_seq_length=args.max_seq_length,
            unsloth=unsloth,
            chat_template_path=args.chat_template_path,
        )
        if reason is not None:
            print(f"Without Unsloth: {reason}", file=sys.stderr)
        unsloth &= reason is None
    return _scorer_of(args, columns, server, model, tokenizer, unsloth)


def _scorer_of(args: argparse.Namespace, columns: Columns, server, model, tokenizer, unsloth: bool) -> Scorer:
    """server: what scores, None: the model. model: what writes for --generate, and where there is no server, scores."""
    from ..scoring.calculator import MultiLevelPPLCalculator
    from ..scoring.identity import identity
    from ..scoring.levels import Scores
    from ..scoring.sampling import sample
    from ..scoring.surprisal import as_scorer
    from ..scoring.tokens import Sampled

    form, chat = cli.prompt_form(args), cli.chat_options(args)
    config = cli.reward_config(args)
    definitions = (config.max_phrase_words, config.language, config.aggregation)
    calculator = MultiLevelPPLCalculator(tokenizer, *definitions, args.batch_size, **chat)
    scoring = model if server is None else server

    def score_own_writing(rows: Sequence[Row]) -> "Scores":
        """Per row the mean over completions that the model samples now: what a policy that starts from it can do."""
        completions = sample(
            model,
            tokenizer,
            [row.prompt for row in rows],
            num_generations=args.generate,
            **asdict(cli.sampling(args)),
            seed=args.seed + rows[0].number,  # the same wherever an earlier run stopped
            **chat,
        )
        pairs = [Sampled(tuple(one.prompt_ids), tuple(one.written)) for group in completions for one in group]
        perplexities, tokens, read, longest = calculator.score(scoring, pairs)
        perplexities = perplexities.reshape(len(rows), args.generate, -1)
        scored = ~np.isnan(perplexities[..., 0])
        total = np.where(scored[..., None], perplexities, 0.0).sum(axis=1)
        with np.errstate(invalid="ignore"):  # nan where the model wrote nothing that can be scored
            means = total / scored.sum(axis=1)[:, None]
        tokens, read = (counts.reshape(len(rows), args.generate).sum(axis=1) for counts in (tokens, read))
        return Scores(means, tokens, read, longest)

    def score(rows: Sequence[Row]) -> "Scores":
        if not has_reference(columns, form):
            pairs = [("", message_text(row.prompt)) for row in rows]
        elif config.target == "reference":
            contexts = [config.reference_context.context(calculator.render(row.prompt)) for row in rows]
            pairs = [(context, message_text(row.reference)) for context, row in zip(contexts, rows, strict=True)]
        else:
            pairs = [calculator.turns(row.prompt, row.reference) for row in rows]
        return calculator.score(scoring, pairs)

    made_with = {
        **identity(
            as_scorer(scoring, tokenizer),
            tokenizer,
            config,
            name=args.model_name,
            prompt=chat_identity(tokenizer, **chat),
            shown=calculator.contexts.identity,
        ),
        "generated": generation(args),
        "unsloth": unsloth,
        "versions": versions(),
    }
    device = "cpu" if model is None else model.device.type
    return Scorer(score_own_writing if args.generate else score, made_with, device)


def generation(args: argparse.Namespace) -> dict | None:
    """How completions are sampled for baselines of the model's own writing; None for those of the data set's texts."""
    return {"generate": args.generate, "seed": args.seed, **asdict(cli.sampling(args))} if args.generate else None


def is_4bit(name: str) -> bool:
    """Whether a checkpoint was saved with 4-bit weights, as those of Unsloth named ...-bnb-4bit are."""
    config = Path(model_path(name), "config.json")
    if not config.exists():
        return name.endswith("bnb-4bit")
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {}).get("load_in_4bit"))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config} is no JSON object ({error}): expected a model of transformers") from error


def score_window(window: Window, score: Callable[[Sequence[Row]], "Scores"]) -> tuple[dict, list[list]]:
    """What is counted, and per row [number, id, word, phrase, sentence, scored tokens, and of its texts the
    prompt's hash, the prompt's beginning, the reference's hash]."""
    records = []
    header = {"digest": window.digest, "rows": len(window.rows), "blank": window.blank}
    if window.rows:
        try:
            perplexities, tokens, read, longest = score(window.rows)
        except FloatingPointError as error:
            raise InputError(
                f"in rows {window.rows[0].number} to {window.rows[-1].number}: {error}: try --dtype float32 or bfloat16"
            ) from error
        for row, values, count in zip(window.rows, perplexities.tolist(), tokens.tolist(), strict=True):
            if count and not np.isfinite(values).all():
                raise InputError(f"row {row.number}, id {row.id!r}: perplexities {values}: leave the row out")
            if count:
                of_texts = (stable_id(row.prompt), beginning(row.prompt), stable_id(row.reference))
                records.append([row.number, row.id, *values, count, *of_texts])
        header |= {"tokens": int(tokens.sum()), "read": int(read.sum()), "longest": longest}
    return {"tokens": 0, "read": 0, "longest": 0, **header, "unscored": len(window.rows) - len(records)}, records


# --- plan ------------------------------------------------------------------------------------------------------------

# What is asked for, checked as far as it can be without a model.

_COLUMNS = [f"baseline_{level}" for level in LEVELS]
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
    from ..scoring.identity import differences

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


# --- plot ------------------------------------------------------------------------------------------------------------

# Plots of what was measured.


def plot_levels(levels: Mapping[str, Sequence[float]], path: str | Path, title: str) -> None:
    """Draw the distribution of each level's perplexities, on one logarithmic axis, with its median.

    levels: `{"word": float64 [N], ...}`, finite and positive. path: .png, .pdf or .svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    values = {level: np.asarray(of_level, dtype=float) for level, of_level in levels.items()}
    everything = np.concatenate(list(values.values()))
    low, high = everything.min(), everything.max()
    if high / low < 1.01:
        low, high = low / 1.1, high * 1.1
    edges = np.geomspace(low, high, 8 + min(52, int(1.5 * math.sqrt(len(everything) / len(values)))))

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(values), 1, sharex=True, sharey=True)
    figure.suptitle(title)
    for axis, (level, of_level) in zip(np.atleast_1d(axes), values.items(), strict=True):
        median = np.median(of_level)
        axis.hist(of_level, bins=edges, color=COLORS[level])
        axis.axvline(median, color="black", linestyle="--", linewidth=1)
        axis.annotate(f"{level}\nmedian {median:,.4g}", xy=(0.99, 0.92), xycoords="axes fraction", ha="right", va="top")
        axis.set_xscale("log")
        axis.set_ylabel("texts")
        axis.spines[["top", "right"]].set_visible(False)
    if high / low < 10:
        axis.xaxis.set_major_locator(MaxNLocator(8))
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("perplexity")
    write_atomically(Path(path), lambda file: figure.savefig(file, format=Path(path).suffix[1:], dpi=150))


# --- assemble --------------------------------------------------------------------------------------------------------

# Finished windows -> the baselines file, its meta file, the data set with baselines, the statistics.


def assemble(job: Job, count: int, identity: dict, read: int, seconds: float) -> None:
    """Put `count` windows together. The file appears last, by a rename: once it is there, everything else is."""
    args, folder = job.args, job.parts.folder
    counts: Counter = Counter()
    longest = 0
    levels = {level: array("d") for level in LEVELS}

    def items() -> Iterator[tuple[str | int, dict]]:
        nonlocal longest
        seen = Seen()
        for number in range(count):
            header, records = job.parts.read(number)
            counts.update({key: header[key] for key in ("rows", "blank", "unscored", "tokens")})
            longest = max(longest, header["longest"])
            # Without an id column, equal rows have one id and one baseline.
            for record, before in zip(records, seen.add([record[1] for record in records]), strict=True):
                counts["duplicates"] += before
                if not before:
                    row_id, kept = record[1], dict(zip((*LEVELS, "n_tokens", *TEXTS), record[2:], strict=True))
                    for level in LEVELS:
                        levels[level].append(kept[level])
                    yield row_id, kept

    made = folder / f"output{job.output.suffix}"
    with cannot_write(folder):
        write_atomically(made, lambda file: write_records(file, job.output.suffix, items()))
    if not levels["word"]:
        job.parts.remove()
        raise InputError("no row has a token that can be scored: expected texts of more than one token")
    meta = {
        **identity,
        "longest": longest,
        "dataset": {
            **{key: getattr(args, f"dataset_{key}") for key in ("name", "config", "split")},
            "columns": job.columns._asdict(),
            "num_samples": args.num_samples,
        },
        "counts": {
            "baselines": len(levels["word"]),
            "rows": counts["rows"] + counts["blank"],
            **{key: counts[key] for key in ("blank", "unscored", "duplicates", "tokens")},
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "run": job.parts.settings()["run"],
    }
    with cannot_write(folder):
        write_meta(made, meta)
    if args.output_dataset is not None:
        write_dataset(job, count, meta)
    if args.plot is not None:
        with cannot_write(Path(args.plot)):
            plot_levels(levels, args.plot, f"{args.dataset_name} {args.dataset_split}, scored by {args.model_name}")
    with cannot_write(job.output):
        # The meta file is never beside another run's output.
        job.output.unlink(missing_ok=True)
        os.replace(meta_path(made), meta_path(job.output))
        os.replace(made, job.output)
    job.parts.remove()
    print_statistics(levels, meta["counts"])
    speed = f"{read / seconds:,.0f} tokens/s, prompts included" if read else "all parts were there"
    print(f"{seconds:,.1f} s, {speed}")
    print(f"Baselines: {job.output} ({meta_path(job.output).name} says what they were made with)")
    if args.output_dataset is not None:
        print(f"Data set with baselines: {args.output_dataset}")
    if args.plot is not None:
        print(f"Plot: {args.plot}")


def print_statistics(levels: Mapping[str, array], counts: dict) -> None:
    table = Table("Perplexity", box=box.SIMPLE_HEAD)
    for name in ("mean", "median", "min", "max"):
        table.add_column(name, justify="right")
    for level, values in levels.items():
        of_level = np.frombuffer(values)
        table.add_row(level, *(f"{f(of_level):,.4f}" for f in (np.mean, np.median, np.min, np.max)))
    Console().print(table)
    skipped = {"blank": "blank", "unscored": "without a scorable token", "duplicates": "equal to an earlier one"}
    left_out = ", ".join(f"{counts[key]:,} {words}" for key, words in skipped.items() if counts[key])
    print(
        f"{counts['baselines']:,} baselines of {counts['rows']:,} rows, {counts['tokens']:,} tokens"
        + (f"; left out: {left_out}" if left_out else "")
    )


def write_dataset(job: Job, count: int, meta: dict) -> None:
    """The rows that have a baseline, with it in the columns `baseline_word`, `baseline_phrase`, `baseline_sentence`."""
    file = dataset_file(job.args)
    with cannot_write(file), reading():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda made: _write_rows(made, job, count))
        write_meta(dataset_baselines(job.args), meta)


def _write_rows(file, job: Job, count: int) -> None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features, Value

    records = ((record[0], record[2:5]) for number in range(count) for record in job.parts.read(number)[1])
    record = next(records, None)
    first, writer = 0, None
    with ExitStack() as closing:
        for table in job.dataset.with_format("arrow").iter(batch_size=1000):
            rows, values = [], []
            while record is not None and record[0] < first + len(table):
                rows.append(record[0] - first)
                values.append(record[1])
                record = next(records, None)
            first += len(table)
            kept = table.take(rows).drop_columns([name for name in _COLUMNS if name in table.column_names])
            for name, column in zip(_COLUMNS, np.reshape(values, (-1, 3)).T, strict=True):
                kept = kept.append_column(name, pyarrow.array(column))
            if writer is None:
                features = job.dataset.features or Features.from_arrow_schema(table.schema)
                others = {name: feature for name, feature in features.items() if name not in _COLUMNS}
                schema = Features({**others, **dict.fromkeys(_COLUMNS, Value("float64"))}).arrow_schema
                writer = closing.enter_context(pyarrow.parquet.ParquetWriter(file, schema))
            writer.write_table(kept.cast(schema))
            if record is None:
                break


# --- run -------------------------------------------------------------------------------------------------------------

WINDOW_ROWS = 4096
# A window is what a crash costs, and holds several batches, so that rows of like length meet in one.
WINDOW_CHARACTERS = {"cpu": 32_000, "cuda": 1_000_000}


def compute(args: argparse.Namespace, load: Callable[..., Scorer] = load_scorer) -> int:
    """Make the file that `args` asks for, or go on with it. What can be refused is refused before a model is loaded."""
    processes = Processes(args.device)
    try:
        return _compute(args, load, processes)
    except KeyboardInterrupt:
        if processes.is_main:
            kept = len(Parts(Path(args.output_path)).look())
            where = f": {kept} parts are kept, the same command goes on from them" if kept else ""
            print(f"stopped{where}", file=sys.stderr)
        return 130
    except Exception as error:
        processes.failed(error)
        if processes.is_main:
            raise
        if isinstance(error, InputError):
            raise InputError(f"{processes.name}: {error}") from error
        print(f"error: {processes.name}: {type(error).__name__}: {error}", file=sys.stderr)
        raise
    finally:
        processes.close()


def _compute(args: argparse.Namespace, load: Callable[..., Scorer], processes: Processes) -> int:
    # The main process looks first: what it refuses is said once.
    job = prepare(args) if processes.is_main else None
    processes.wait()
    job = job or prepare(args, survey=False)
    if is_complete(job.parts, job.output):
        processes.wait()
        if processes.is_main:
            job.parts.remove()
            print(f"{job.output} is complete")
        return 0

    # In a notebook rich would show what other libraries' progress bars write, and they what it writes.
    console = Console(stderr=True, quiet=not processes.is_main, force_jupyter=False)
    with console.status(f"Loading {args.model_name} ..."):
        scorer = load(args, job.columns, processes.device or args.device)
    through_template = scorer.identity.get("prompt", {}) if job.is_conversational() else {}
    scorer.identity["prompt"] = {**job.form.identity, **through_template}
    if args.output_dataset is not None:
        check_other_splits(args, scorer.identity)
    settings = {**job.settings, **{key: scorer.identity[key] for key in ("model", "tokenizer", "unsloth", "versions")}}
    # The surprisals of the fixed text are the same but for rounding.
    settings["model"] = {name: value for name, value in settings["model"].items() if name != "probe"}
    check_probe(job.parts, scorer.identity["model"])
    if processes.is_main:
        job.parts.make()
        processes.claim(job.parts)
    try:
        if processes.is_main:
            job.parts.start(
                settings,
                run=os.urandom(8).hex(),
                probe=scorer.identity["model"].get("probe"),
                plot=args.plot,
                output_dataset=args.output_dataset,
                window_rows=WINDOW_ROWS,
                window_characters=WINDOW_CHARACTERS.get(scorer.device, WINDOW_CHARACTERS["cuda"]),
            )
        processes.wait()
        if not processes.is_main:
            processes.claim(job.parts)
        processes.wait()
        started = time.monotonic()
        with Progress(job) if processes.is_main else nullcontext() as progress:
            count = score_windows(job, scorer, processes, progress)
            if progress is None:
                return 0
            wait_for_others(job, count, processes, progress)
        assemble(job, count, scorer.identity, progress.read, time.monotonic() - started)
    except BaseException:
        if processes.count == 1:
            job.parts.remove_if_empty()
        raise
    return 0


def check_probe(parts: Parts, model: dict) -> None:
    """Raises `InputError` if the parts were scored by a model, of the same name and weights, with other numbers."""
    from ..scoring.identity import differences

    kept = parts.settings().get("probe") if parts.look() else None
    if kept and (differing := differences({"model": {**model, "probe": kept}}, {"model": model})):
        before, now = differing["probe"]
        raise InputError(
            f"{parts.folder} was scored by another model: a fixed text had {before}, now it has {now}: load or serve "
            "that model again, or delete the folder to start anew"
        )


def score_windows(job: Job, scorer: Scorer, processes: Processes, progress: "Progress | None") -> int:
    """Score this process's share of the windows that are not there yet. Returns the number of all windows."""
    settings, done = job.parts.settings(), job.parts.look()
    count = 0
    for window in windows(job.rows(), settings["window_rows"], settings["window_characters"]):
        count += 1
        if window.number in done:
            if progress is not None and done[window.number]["digest"] != window.digest:
                raise InputError(
                    f"the data set is not the one that {job.parts.folder} was made from, it differs before row "
                    f"{window.rows[-1].number if window.rows else 0}: delete the folder to start anew"
                )
        elif window.number % processes.count == processes.index:
            job.parts.write(window.number, *score_window(window, scorer.score), processes.index)
            if progress is not None:
                progress.look()
    if done and max(done) >= count:
        raise InputError(f"{job.parts.folder} holds parts of more rows than the data set has: delete it to start anew")
    processes.finish()
    return count


def wait_for_others(job: Job, count: int, processes: Processes, progress: "Progress") -> None:
    while len(job.parts.look()) < count:
        # Asked before the folder is looked at again: who has finished by now has left its last window there.
        died = processes.died()
        if len(job.parts.look()) < count and died:
            raise InputError(f"{died}: the same command goes on from here")
        time.sleep(0.2)
        progress.look()


class Progress:
    """A bar over all processes' windows, with tokens a second; a line every ten seconds where there is no terminal."""

    def __init__(self, job: Job) -> None:
        from tqdm import tqdm

        self._parts = job.parts
        self.read, self._read_before = 0, self._total("read")
        kept = self._total("rows")
        if kept:
            print(f"Going on from {job.parts.folder}: {kept} rows are scored", file=sys.stderr)
        terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._bar = tqdm(
            total=job.texts or job.args.num_samples,
            initial=kept,
            unit=" rows",
            file=None if terminal else _Lines(),
            mininterval=0.1 if terminal else 10,
            delay=1,
            dynamic_ncols=terminal,
        )

    def look(self) -> None:
        """Count the windows that are new."""
        self.read = self._total("read") - self._read_before
        self._bar.set_postfix_str(f"{self.read / (time.monotonic() - self._started):,.0f} tokens/s", refresh=False)
        self._bar.update(self._total("rows") - self._bar.n)

    def _total(self, name: str) -> int:
        return sum(header[name] for header in self._parts.look().values())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()


class _Lines:
    """What tqdm writes over one line, as lines of their own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()
