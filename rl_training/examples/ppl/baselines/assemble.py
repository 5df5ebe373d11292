"""Finished windows -> the baselines file, its meta file, the data set with baselines, the statistics."""

import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..definitions import BASELINE_COLUMNS, LEVELS
from ..errors import InputError
from ..files import write_atomically
from .formats import RECORD, write_records
from .meta import meta_path, write_meta
from .parts import cannot_write
from .plan import Job, dataset_baselines, dataset_file
from .rows import Seen, reading


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
                    row_id, kept = record[1], dict(zip(RECORD, record[2:], strict=True))
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
        from .plot import plot_levels

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
            kept = table.take(rows).drop_columns([name for name in BASELINE_COLUMNS if name in table.column_names])
            for name, column in zip(BASELINE_COLUMNS, np.reshape(values, (-1, 3)).T, strict=True):
                kept = kept.append_column(name, pyarrow.array(column))
            if writer is None:
                features = job.dataset.features or Features.from_arrow_schema(table.schema)
                others = {name: feature for name, feature in features.items() if name not in BASELINE_COLUMNS}
                schema = Features({**others, **dict.fromkeys(BASELINE_COLUMNS, Value("float64"))}).arrow_schema
                writer = closing.enter_context(pyarrow.parquet.ParquetWriter(file, schema))
            writer.write_table(kept.cast(schema))
            if record is None:
                break
