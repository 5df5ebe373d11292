"""A data set -> its baselines file, by however many processes, from wherever an earlier run stopped."""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import cli
from ..config import ALL_LEVELS, COLORS, OUTER
from ..data import (
    FIRST,
    Columns,
    PromptForm,
    Text,
    find_columns,
    has_reference,
    has_texts,
    load_split,
    make_row,
    message_text,
    refuse_unscored,
    stable_id,
    write_shown,
)
from ..errors import InputError, retired
from ..files import check_folder, writable_file, write_atomically
from ..models import load_model, model_path
from ..prompts import chat_identity
from ..scoring.differences import differences
from ..splits import column_names, reading
from .file import SUFFIXES, TEXTS, beginning, meta_path, read_meta, versions, write_meta, write_records
from .parts import Parts, Processes, cannot_write

if TYPE_CHECKING:  # scoring imports transformers, and Unsloth must come before that
    from ..scoring.levels import Scores

# A window is what a crash costs, and holds several batches, so that rows of like length meet in one.
WINDOW_ROWS = 4096
WINDOW_CHARACTERS = {"cpu": 32_000, "cuda": 1_000_000}

# --- a data set -> rows with text and an id of their own, in windows -------------------------------------------------


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


def read_rows(dataset, columns: Columns, form: PromptForm, limit: int | None, scored: str) -> Iterator[Row | None]:
    """The rows in the order of the data set, None for one without text, up to `limit` with text.

    scored: "prompt" or "reference", which of the two must have some.
    Raises `InputError` for what is no text or no id, and for an id that an `id` column has twice.
    """
    ids: set[str | int] = set()
    kept = 0
    for number, example in enumerate(_examples(dataset, columns)):
        row = make_row(example, number, columns, form)
        if scored == "reference":
            refuse_unscored(row["reference"], number)
        if not message_text(row[scored]).strip():
            yield None
            continue
        if row["id"] in ids:
            raise InputError(
                f"row {number} has the id {row['id']!r}, as an earlier row has: ids must be distinct; without such a "
                "column a hash of prompt and reference is the id"
            )
        if columns.id is not None:
            ids.add(row["id"])
        yield Row(number, **row)
        kept += 1
        if kept == limit:
            return


def _examples(dataset, columns: Columns) -> Iterator[dict]:
    names = list(dict.fromkeys(name for name in columns if name is not None))
    with reading():
        for batch in dataset.select_columns(names).iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


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


# --- what is asked for, checked as far as it can be without a model --------------------------------------------------


class Job(NamedTuple):
    output: Path
    dataset_file: Path | None  # of --output_dataset
    plot: str | None
    parts: Parts
    settings: dict  # which parts must have been made with
    dataset: Any  # datasets.Dataset, with --streaming datasets.IterableDataset
    columns: Columns
    form: PromptForm
    scored: str  # "prompt" or "reference": the column that must have text
    levels: Sequence[str]
    contexts: dict  # keywords of the calculator: examples and other rows
    names: dict[str, str]  # of nested levels
    # What a look at the data set has found, where there was one.
    texts: int | None = None  # rows to score, where that is known
    is_conversational: bool = False  # whether prompts are chat messages: those of the first row with text tell

    def rows(self) -> Iterator[Row | None]:
        """As `read_rows` gives them."""
        return read_rows(self.dataset, self.columns, self.form, self.settings["num_samples"], self.scored)


_SETTINGS = (
    *("model_name", "load_in_4bit", "dtype", "max_seq_length", "dataset_name", "dataset_config", "dataset_split"),
    *("num_samples", "target", "template", "max_phrase_words", "language", "aggregation", "levels", "contrast"),
    *("score_without_chat",),
    *("chat_template_path", "chat_template_kwargs", "tools"),
)


def prepare(args: argparse.Namespace, survey: bool = True) -> Job:
    """Raises `InputError` for what cannot be done. `survey`: read the whole data set once, unless it is streamed."""
    if gone := retired("baselines", args.output_path):
        raise InputError(f"--output_path {args.output_path}: {gone}")
    output = writable_file(args.output_path, "--output_path", SUFFIXES)
    parts = Parts(output)

    def refuse_existing(path: Path, flag: str, is_of_this_run: bool) -> None:
        if path.exists() and not args.overwrite and not is_of_this_run:
            raise InputError(f"{path} exists: replace it with --overwrite, or choose another --{flag}")

    if not args.scorer_url or args.generate:
        model_path(args.model_name)
    elif args.load_in_4bit is not None or args.dtype != "auto":
        raise InputError("--scorer_url scores with the model as the server loaded it: drop --load_in_4bit and --dtype")
    form = cli.prompt_form(args)
    cli.chat_options(args)
    if args.plot is not None:
        plot = writable_file(args.plot, "--plot", (".png", ".pdf", ".svg"))
        refuse_existing(plot, "plot", parts.settings().get("plot") == args.plot)
    refuse_existing(output, "output_path", is_complete(parts, output))
    file = None
    if args.output_dataset is not None:
        file = dataset_file(args.output_dataset, args.dataset_split)
        refuse_existing(file, "output_dataset", parts.settings().get("output_dataset") == args.output_dataset)

    asked = cli.column_options(args)
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split, args.streaming, asked[:3])
    names = column_names(dataset)
    if not names:
        raise InputError(f"split {args.dataset_split!r} of data set {args.dataset_name!r} holds no row")
    columns = find_columns(names, *asked)
    if args.target == "reference" and not has_reference(columns, form):
        raise InputError(
            f"--target reference needs a text to measure, and the data set has the columns {', '.join(names)}: name it "
            "with --reference_column NAME"
        )
    if args.generate and args.target == "reference":
        raise InputError("--generate samples completions, --target reference measures the data set's texts: drop one")
    settings = {**{name: getattr(args, name) for name in _SETTINGS}, "generated": generation(args), **form.identity}
    settings |= {"columns": columns._asdict(), "levels": list(args.levels)}
    # What the model writes itself needs no reference.
    scored = "reference" if has_reference(columns, form) and not args.generate else "prompt"
    if scored == "prompt" and not args.generate and (outer := [one for one in args.levels if one in OUTER]):
        raise InputError(f"level {outer[0]} is of a text behind its prompt: name its column with --reference_column")
    # As in training, of the first rows, whether or not they have a text to score.
    first = filter(None, itertools.islice(read_rows(dataset, columns, form, None, "prompt"), FIRST))
    pairs = ((row.prompt, row.reference) for row in first)
    contexts = cli.shown_rows(args, (pair for pair in pairs if has_texts(*pair, form)))
    settings["shown"] = stable_id(json.dumps(contexts))
    parts.check(settings)
    if args.output_dataset and args.num_samples and (contexts["examples"] or "prompt" in args.levels):
        raise InputError(
            "--output_dataset with --num_samples lacks rows that the examples and other rows are drawn from: leave "
            "--num_samples out, or --output_dataset"
        )
    contexts["prompt_template"] = args.prompt_template
    config = cli.reward_config(args)
    before = [one for one in config.before if one != "completion"]  # a baseline's is empty
    names = config.nested_names(before if args.generate or scored == "reference" else [], bool(contexts["examples"]))
    job = Job(output, file, args.plot, parts, settings, dataset, columns, form, scored, args.levels, contexts, names)
    if not survey:
        return job
    seen = texts = 0
    for row in job.rows():
        seen += 1
        if row is not None and not texts:
            job = job._replace(is_conversational=not isinstance(row.prompt, str))
        texts += row is not None
        if args.streaming and texts:
            return job
    if not texts:
        raise InputError(
            f"none of the {seen} rows of split {args.dataset_split!r} of data set {args.dataset_name!r} has text in "
            f"column {columns.reference or columns.prompt}: name another with --reference_column or --prompt_column"
        )
    return job._replace(texts=texts)


def generation(args: argparse.Namespace) -> dict | None:
    """How completions are sampled for baselines of the model's own writing; None for those of the data set's texts."""
    return {"generate": args.generate, "seed": args.seed, **asdict(cli.sampling(args))} if args.generate else None


def is_complete(parts: Parts, output: Path) -> bool:
    """Whether the run that made `parts` came to its end, all but their removal: its meta file names the run."""
    run = parts.settings().get("run")
    return run is not None and output.exists() and read_meta(output).get("run") == run


def dataset_file(name: str, split: str) -> Path:
    """The file of a split in a data set with baselines, under a name by which `datasets` finds a split of any name.

    Raises `InputError` for a split that is not a whole one, and for a folder with something else in it.
    """
    folder = Path(name)
    if not split.replace("_", "").replace(".", "").isalnum():
        raise InputError(f"--output_dataset needs one whole split, --dataset_split is {split!r}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dataset {folder} is a file: expected a folder")
    check_folder(folder if folder.exists() else folder.parent, "--output_dataset", name)
    there = os.listdir(folder) if folder.exists() else []
    if foreign := [one for one in there if one != "data" and not one.startswith(".")]:
        raise InputError(f"--output_dataset {folder} holds {foreign[0]}, which is no part of it: choose a new folder")
    return folder / "data" / f"{split}-00000-of-00001.parquet"


# --- rows -> their perplexities: what a baseline is ------------------------------------------------------------------


class Scorer(NamedTuple):
    score: Callable[[Sequence[Row]], "Scores"]
    identity: dict  # what the meta file says of model, tokenizer, prompts and definitions
    device: str


def load_scorer(args: argparse.Namespace, job: Job, device: str | None) -> Scorer:
    """A model that gives a row the perplexity of its reference given its prompt, or of its prompt alone.

    With --scorer_url it is a server's, and a model is only loaded here for --generate, to write the texts.
    """
    server, model, unsloth = None, None, False
    if args.scorer_url:
        from ..scoring.server import connect

        server, tokenizer = connect(args.scorer_url, args.model_name, args.chat_template_path)
    if server is None or args.generate:
        model, tokenizer, unsloth = _load_model(args, device)

    from ..scoring.calculator import MultiLevelPPLCalculator
    from ..scoring.identity import identity
    from ..scoring.sampling import sample
    from ..scoring.surprisal import as_scorer
    from ..scoring.tokens import Sampled

    chat, config, sampling = cli.chat_options(args), cli.reward_config(args), asdict(cli.sampling(args))
    definitions = {**config.definitions, "contrast": config.contrast}
    definitions.pop("template", None)
    calculator = MultiLevelPPLCalculator(tokenizer, **definitions, batch_size=args.batch_size, **chat, **job.contexts)
    scoring = model if server is None else server

    def score_own_writing(rows: Sequence[Row]) -> "Scores":
        """Per row the mean over completions that the model samples now: what a policy that starts from it can do."""
        prompts, seed = [row.prompt for row in rows], args.seed + rows[0].number  # the same wherever a run begins
        groups = sample(model, tokenizer, prompts, num_generations=args.generate, **sampling, seed=seed, **chat)
        pairs = [
            calculator.text(prompt, one.text, Sampled(tuple(one.prompt_ids), tuple(one.written)))
            for prompt, group in zip(prompts, groups, strict=True)
            for one in group
        ]
        scores = calculator.score(scoring, pairs)
        perplexities, tokens, read = (np.reshape(of, (len(rows), args.generate, -1)) for of in scores[:3])
        scored = ~np.isnan(perplexities[..., :1])
        with np.errstate(invalid="ignore"):  # nan where the model wrote nothing that can be scored
            means = perplexities.sum(axis=1, where=scored) / scored.sum(axis=1)
        return scores._replace(perplexities=means, tokens=tokens.sum(axis=(1, 2)), read=read.sum(axis=(1, 2)))

    def score(rows: Sequence[Row]) -> "Scores":
        if job.scored == "prompt":
            pairs = [calculator.text("", message_text(row.prompt)) for row in rows]
        elif config.target == "reference":
            put = partial(calculator.contexts.before_reference, config.reference_context)
            pairs = [(put(row.prompt), message_text(row.reference)) for row in rows]
        else:
            pairs = [calculator.text(row.prompt, row.reference) for row in rows]
        return calculator.score(scoring, pairs)

    prompt = {**job.form.identity, **(chat_identity(tokenizer, **chat) if job.is_conversational else {})}
    made_with = identity(
        as_scorer(scoring, tokenizer),
        tokenizer,
        config,
        name=args.model_name,
        prompt=prompt,
        shown=calculator.contexts.identity,
    )
    made_with |= {"generated": generation(args), "unsloth": unsloth, "versions": versions()}
    device = "cpu" if model is None else model.device.type
    return Scorer(score_own_writing if args.generate else score, made_with, device)


def _load_model(args: argparse.Namespace, device: str | None) -> tuple[Any, Any, bool]:
    """(model, tokenizer, whether they are Unsloth's)"""
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
    return model, tokenizer, unsloth and reason is None


def is_4bit(name: str) -> bool:
    """Whether a checkpoint was saved with 4-bit weights, as those of Unsloth named ...-bnb-4bit are."""
    config = Path(model_path(name), "config.json")
    if not config.exists():
        return name.endswith("bnb-4bit")
    made = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    return isinstance(made, dict) and bool(made.get("load_in_4bit"))


def score_window(window: Window, score: Callable[[Sequence[Row]], "Scores"]) -> tuple[dict, list[list]]:
    """What is counted, and per row [number, id, its levels, scored tokens, and of its texts the
    prompt's hash, the prompt's beginning, the reference's hash]."""
    header = {"digest": window.digest, "rows": len(window.rows), "blank": window.blank}
    if not window.rows:
        return {**header, "tokens": 0, "read": 0, "longest": 0, "unscored": 0}, []
    try:
        perplexities, tokens, read, longest = score(window.rows)
    except FloatingPointError as error:
        raise InputError(
            f"in rows {window.rows[0].number} to {window.rows[-1].number}: {error}: try --dtype float32 or bfloat16"
        ) from error
    records = []
    for row, values, count in zip(window.rows, perplexities.tolist(), tokens.tolist(), strict=True):
        if count and not np.isfinite(values).all():
            raise InputError(f"row {row.number}, id {row.id!r}: perplexities {values}: leave the row out")
        if count:
            of_texts = (stable_id(row.prompt), beginning(row.prompt), stable_id(row.reference))
            records.append([row.number, row.id, *values, count, *of_texts])
    header |= {"tokens": int(tokens.sum()), "read": int(read.sum()), "longest": longest}
    return {**header, "unscored": len(window.rows) - len(records)}, records


# --- the loop: by any number of processes, from wherever an earlier run stopped --------------------------------------


def compute(args: argparse.Namespace, load: Callable[..., Scorer] = load_scorer) -> int:
    """Make the file that `args` asks for, or go on with it. What can be refused is refused before a model is loaded.

    load: takes `args`, the `Job` and the device.
    """
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
        scorer = load(args, job, processes.device)
    check_other_runs(job, scorer.identity)
    if processes.is_main:
        job.parts.make()
        processes.claim(job.parts)
    try:
        if processes.is_main:
            # The surprisals of the fixed text are the same but for rounding.
            model = dict(scorer.identity["model"])
            probe = model.pop("probe", None)
            job.parts.start(
                {
                    **job.settings,
                    "model": model,
                    **{name: scorer.identity[name] for name in ("tokenizer", "unsloth", "versions")},
                },
                run=os.urandom(8).hex(),
                probe=probe,
                plot=args.plot,
                output_dataset=args.output_dataset,
                window_rows=WINDOW_ROWS,
                window_characters=WINDOW_CHARACTERS.get(scorer.device, WINDOW_CHARACTERS["cuda"]),
            )
        processes.wait()
        if not processes.is_main:
            processes.claim(job.parts)
        processes.wait()
        read, seconds = score_windows(job, scorer.score, processes)
        if processes.is_main:
            assemble(job, scorer.identity, read, seconds)
    except BaseException:
        if processes.count == 1 and not job.parts.look():
            job.parts.remove()
        raise
    return 0


def check_other_runs(job: Job, identity: dict) -> None:
    """Raises `InputError` if other splits of the data set with baselines were scored with other settings, with which
    they would look like one data set, or the parts by a model of the same name and weights that has other numbers."""
    if job.dataset_file is not None and (differing := differences(read_meta(dataset_baselines(job)), identity)):
        values = ", ".join(f"{name} {theirs}, now {mine}" for name, (theirs, mine) in differing.items())
        raise InputError(
            f"--output_dataset {job.dataset_file.parent.parent} was made with other settings ({values}): choose a new "
            "folder"
        )
    kept, model = job.parts.settings().get("probe") if job.parts.look() else None, identity["model"]
    if kept and (differing := differences({"model": {**model, "probe": kept}}, {"model": model})):
        before, now = differing["probe"]
        raise InputError(
            f"{job.parts.folder} was scored by another model: a fixed text had {before}, now it has {now}: load or "
            "serve that model again, or delete the folder to start anew"
        )


def score_windows(job: Job, score: Callable[[Sequence[Row]], "Scores"], processes: Processes) -> tuple[int, float]:
    """Score this process's share of the windows that are not there yet; the main process then waits for the others.

    Returns the tokens that all have read, and the seconds.
    """
    parts, settings, count = job.parts, job.parts.settings(), 0
    done, kept, read_before, began = dict(parts.look()), parts.total("rows"), parts.total("read"), time.monotonic()
    if kept and processes.is_main:
        print(f"Going on from {parts.folder}: {kept} rows are scored", file=sys.stderr)
    # With tokens a second; where there is no terminal, a line every ten seconds.
    way = {"dynamic_ncols": True} if sys.stderr.isatty() else {"file": _Lines(), "mininterval": 10}
    rows = job.texts or job.settings["num_samples"]

    def read() -> int:
        return parts.total("read") - read_before

    def look() -> None:
        bar.set_postfix_str(f"{read() / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
        bar.update(parts.total("rows") - bar.n)

    with tqdm(total=rows, initial=kept, unit=" rows", delay=1, disable=not processes.is_main, **way) as bar:
        for window in windows(job.rows(), settings["window_rows"], settings["window_characters"]):
            count += 1
            if window.number in done:
                if processes.is_main and done[window.number]["digest"] != window.digest:
                    raise InputError(
                        f"the data set is not the one that {parts.folder} was made from, it differs before row "
                        f"{window.rows[-1].number if window.rows else 0}: delete the folder to start anew"
                    )
            elif window.number % processes.count == processes.index:
                parts.write(window.number, *score_window(window, score), processes.index)
                look()
        if done and max(done) >= count:
            raise InputError(f"{parts.folder} holds parts of more rows than the data set has: delete it to start anew")
        processes.finish()
        while processes.is_main and len(parts.look()) < count:
            # Asked before the folder is looked at again: who has finished by now has left its last window there.
            died = processes.died()
            if len(parts.look()) < count and died:
                raise InputError(f"{died}: the same command goes on from here")
            time.sleep(0.2)
            look()
    return read(), time.monotonic() - began


class _Lines:
    """What tqdm writes over one line, as lines of their own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


# --- finished windows -> the baselines file, its meta file, the data set with baselines, the statistics --------------


def assemble(job: Job, identity: dict, read: int, seconds: float) -> None:
    """Put the windows together. The file appears last, by a rename: once it is there, everything else is."""
    parts, settings, suffix = job.parts, job.settings, job.output.suffix
    values = array("d")

    def items() -> Iterator[tuple[str | int, dict]]:
        seen = set()
        for _, row_id, *kept in parts.records():
            if row_id not in seen:  # without an id column, equal rows have one id and one baseline
                seen.add(row_id)
                values.extend(kept[: len(job.levels)])
                yield row_id, dict(zip((*job.levels, "n_tokens", *TEXTS), kept, strict=True))

    made = parts.folder / f"output{suffix}"
    with cannot_write(parts.folder):
        write_atomically(made, lambda file: write_records(file, suffix, items()))
    levels = np.reshape(values, (-1, len(job.levels)))
    counts = {name: parts.total(name) for name in ("rows", "blank", "unscored", "tokens")}
    counts["duplicates"] = counts["rows"] - counts["unscored"] - len(levels)
    counts["rows"] += counts["blank"]
    counts["baselines"] = len(levels)
    if not len(levels):
        parts.remove()
        raise InputError("no row has a token that can be scored: expected texts of more than one token")
    meta = {
        **identity,
        "longest": max(header["longest"] for header in parts.look().values()),
        "dataset": {
            **{key: settings[f"dataset_{key}"] for key in ("name", "config", "split")},
            **{key: settings[key] for key in ("columns", "num_samples")},
        },
        "counts": counts,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "run": parts.settings()["run"],
    }
    with cannot_write(parts.folder):
        write_meta(made, meta)
    if job.dataset_file is not None:
        with cannot_write(job.dataset_file), reading():
            job.dataset_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(job.dataset_file, lambda file: _write_rows(file, job))
            write_meta(dataset_baselines(job), meta)
    if job.plot is not None:
        title = f"{settings['dataset_name']} {settings['dataset_split']}, scored by {settings['model_name']}"
        with cannot_write(Path(job.plot)):
            plot_levels(dict(zip(job.levels, levels.T, strict=True)), job.plot, title, job.names)
    with cannot_write(job.output):
        for name in ("examples", "others"):
            if rows := job.contexts[name]:
                write_shown(f"{job.output}.{name}.jsonl", rows)
        # The meta file is never beside another run's output.
        job.output.unlink(missing_ok=True)
        os.replace(meta_path(made), meta_path(job.output))
        os.replace(made, job.output)
    parts.remove()

    table = Table("Nats a token" if job.names else "Perplexity", box=box.SIMPLE_HEAD)
    for name in ("mean", "median", "min", "max"):
        table.add_column(name, justify="right")
    for level, of_level in zip(job.levels, levels.T, strict=True):
        shown = np.log(of_level) if job.names else of_level
        cells = (f"{f(shown):,.4f}" for f in (np.mean, np.median, np.min, np.max))
        table.add_row(job.names.get(level, level), *cells)
    Console().print(table)
    skipped = {"blank": "blank", "unscored": "without a scorable token", "duplicates": "equal to an earlier one"}
    left_out = ", ".join(f"{counts[key]:,} {words}" for key, words in skipped.items() if counts[key])
    print(
        f"{counts['baselines']:,} baselines of {counts['rows']:,} rows, {counts['tokens']:,} tokens"
        + (f"; left out: {left_out}" if left_out else "")
    )
    speed = f"{read / seconds:,.0f} tokens/s, prompts included" if read else "all parts were there"
    print(f"{seconds:,.1f} s, {speed}")
    print(f"Baselines: {job.output} ({meta_path(job.output).name} says what they were made with)")
    if job.dataset_file is not None:
        print(f"Data set with baselines: {job.dataset_file.parent.parent}")
    if job.plot is not None:
        print(f"Plot: {job.plot}")


def dataset_baselines(job: Job) -> Path:
    # Hidden, so that `datasets` takes the meta file of this name for no part of the data.
    return job.dataset_file.parent.parent / ".baselines"


def _write_rows(file, job: Job) -> None:
    """The rows that have a baseline, with it in the columns `baseline_word`, `baseline_phrase`, ..."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Features, Value

    # float64 [N, 1 + L]: the row's number, its levels
    size, columns = 1 + len(job.levels), [f"baseline_{level}" for level in job.levels]
    rows = ((record[0], *record[2 : 1 + size]) for record in job.parts.records())
    scored = np.fromiter(rows, np.dtype((float, size)))
    foreign = [f"baseline_{level}" for level in ALL_LEVELS]
    first = 0
    with ExitStack() as closing:
        for table in job.dataset.with_format("arrow").iter(batch_size=1000):
            here = scored[slice(*np.searchsorted(scored[:, 0], (first, first + len(table))))]
            kept = table.take(here[:, 0].astype(int) - first)
            kept = kept.drop_columns([name for name in foreign if name in kept.column_names])
            for name, column in zip(columns, here[:, 1:].T, strict=True):
                kept = kept.append_column(name, pyarrow.array(column))
            if not first:
                features = job.dataset.features or Features.from_arrow_schema(table.schema)
                others = {name: feature for name, feature in features.items() if name not in foreign}
                schema = Features({**others, **dict.fromkeys(columns, Value("float64"))}).arrow_schema
                writer = closing.enter_context(pyarrow.parquet.ParquetWriter(file, schema))
            writer.write_table(kept.cast(schema))
            first += len(table)
            if first > scored[-1, 0]:
                break


def plot_levels(
    levels: Mapping[str, Sequence[float]], path: str | Path, title: str, names: Mapping[str, str] | None = None
) -> None:
    """Draw the distribution of each level's perplexities, on one logarithmic axis, with its median; of nested levels in
    nats a token, on an axis each.

    levels: `{"word": float64 [N], ...}`, finite and positive. path: .png, .pdf or .svg. names: of nested levels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    count = 8 + min(52, int(1.5 * math.sqrt(len(next(iter(levels.values()))))))
    everything = np.concatenate(list(levels.values()))
    low, high = everything.min(), everything.max()
    if high / low < 1.01:
        low, high = low / 1.1, high * 1.1
    locator = MaxNLocator(8) if high / low < 10 else LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,))

    figure = Figure(figsize=(8, 6 if not names else 2 * len(levels)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(levels), sharex=not names, sharey=True, squeeze=False)[:, 0]
    for axis, (level, values) in zip(axes, levels.items(), strict=True):
        if names:
            values = np.log(values)
        median, name = np.median(values), names[level] if names else level
        axis.hist(values, bins=count if names else np.geomspace(low, high, count), color=COLORS[level])
        axis.axvline(median, color="black", linestyle="--", linewidth=1)
        axis.annotate(f"{name}\nmedian {median:,.4g}", xy=(0.99, 0.92), xycoords="axes fraction", ha="right", va="top")
        axis.set_ylabel("texts")
        axis.spines[["top", "right"]].set_visible(False)
        if not names:
            axis.set_xscale("log")
    if not names:
        axes[-1].xaxis.set_major_locator(locator)
        axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes[-1].xaxis.set_minor_formatter("")
    axes[-1].set_xlabel("nats a token" if names else "perplexity")
    write_atomically(Path(path), lambda file: figure.savefig(file, format=Path(path).suffix[1:], dpi=150))
