"""The baselines file's three formats: written a few thousand rows at a time, read without running anything."""

import itertools
import json
import pickle
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..definitions import LEVELS
from ..errors import BaselineError
from . import safe_pickle

# What the file keeps of a row. prompt_id and reference_id are hashes: a baseline is of these texts and no others.
TEXTS = ("prompt_id", "prompt_start", "reference_id")
RECORD = (*LEVELS, "n_tokens", *TEXTS)
_ROWS_AT_ONCE = 8192  # rows that a writer holds


class Columns(NamedTuple):
    """Records, column by column."""

    ids: Sequence[str | int]
    levels: np.ndarray  # float64 [N, 3]
    texts: Mapping[str, Sequence]  # of `TEXTS`: strings, None where a record does not say


class _Strings(Sequence):
    """A column of a Parquet file, each value made when it is asked for."""

    def __init__(self, column) -> None:
        self._column = column

    def __getitem__(self, row):
        return self._column[row].as_py()

    def __len__(self) -> int:
        return len(self._column)


def columns_of(records, source: str) -> Columns:
    if not isinstance(records, Mapping):
        raise BaselineError(f"{source}: expected a dict of id -> levels, found {type(records).__name__}")
    levels = _all_levels(records, source)
    texts = {name: [record.get(name) for record in records.values()] for name in TEXTS}
    return Columns(list(records), levels, texts)


def write_records(file, suffix: str, items: Iterable[tuple[str | int, Mapping]]) -> None:
    """Write (id, record) pairs in the format of `suffix`, holding no more than a few thousand of them."""
    {".pkl": _write_pickle, ".json": _write_json, ".parquet": _write_parquet}[suffix](file, _chunks(items))


def _chunks(items: Iterable[tuple]) -> Iterator[dict]:
    items = iter(items)
    while chunk := dict(itertools.islice(items, _ROWS_AT_ONCE)):
        yield chunk


def _write_pickle(file, chunks: Iterable[dict]) -> None:
    # A dict's pickle is: protocol, empty dict, memo 0; then its items; then the end. So the items of many dicts, one
    # after the other, are the pickle of one dict. Each piece writes its memos over those of the one before, done with.
    file.write(b"\x80\x02}")
    for chunk in chunks:
        file.write(pickle.dumps(chunk, protocol=2).removeprefix(b"\x80\x02}q\x00").removesuffix(b"."))
    file.write(b".")


def _write_json(file, chunks: Iterable[dict]) -> None:
    separator = b"{\n"
    for chunk in chunks:
        for key, record in chunk.items():
            entry = f"{json.dumps(str(key), ensure_ascii=False)}: {json.dumps(record, ensure_ascii=False)}"
            file.write(separator + entry.encode("utf-8", "surrogatepass"))
            separator = b",\n"
    file.write(b"\n}\n" if separator == b",\n" else b"{}\n")


def _write_parquet(file, chunks: Iterable[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    levels = dict.fromkeys(LEVELS, pyarrow.float64())
    tables = ([{"id": key, **record} for key, record in chunk.items()] for chunk in chunks)
    first = next(tables, [])
    fields = {name: types[type(value)] for name, value in (first[0] if first else {"id": ""}).items()}
    schema = pyarrow.schema({**fields, **levels})
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for rows in itertools.chain([first], tables):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def read_records(path: Path, content: bytes) -> "Columns | Mapping":
    """What the file holds, still to be checked by `columns_of`. content: its bytes; of Parquet none, it is mapped."""
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return {".pkl": _parse_pickle, ".json": _parse_json}[path.suffix](content, path)


def _parse_pickle(content: bytes, path: Path):
    try:
        return safe_pickle.loads(content)
    except safe_pickle.PickleRefused as error:
        raise BaselineError(
            f"{path}: not a baselines pickle ({error}): recompute it with compute_baselines_trl.py"
        ) from error


def _parse_json(content: bytes, path: Path):
    try:
        return json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise BaselineError(f"{path}: not JSON ({error}): recompute it with compute_baselines_trl.py") from error


def _without_duplicates(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r:.80} is there twice")
    return content


def _read_parquet(path: Path) -> Columns:
    """Column by column: a million records take 0.55 GB instead of 1.3 GB, and 2 s instead of 9."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        names = file.schema_arrow.names
        if absent := [name for name in ("id", *LEVELS) if name not in names]:
            raise BaselineError(f"{path}: no column {', '.join(absent)}, only {', '.join(names)}")
        table = file.read(columns=[name for name in ("id", *LEVELS, *TEXTS) if name in names]).combine_chunks()
        table.validate(full=True)  # or a string that is no UTF-8 is found when it is asked for
        ids = table["id"].to_pylist()
        columns = [table[level] for level in LEVELS]
        if all(pyarrow.types.is_float64(column.type) and not column.null_count for column in columns):
            levels = np.stack([column.to_numpy() for column in columns], axis=1)
        else:
            levels = np.full((len(ids), len(LEVELS)), np.nan)
    # What pyarrow raises for a damaged file depends on where the damage is.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BaselineError):
            raise
        raise BaselineError(f"{path}: not Parquet ({error}): recompute it with compute_baselines_trl.py") from error
    if wrong := [i for i in ids if type(i) is not str and type(i) is not int]:
        raise BaselineError(f"{path}: an id is {shown(wrong[0])}, expected a string or a whole number")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise BaselineError(f"{path}: id {shown(twice)} is there twice: recompute it with compute_baselines_trl.py")
    if not (np.isfinite(levels) & (levels > 0)).all():
        # Something is wrong or of another type: as records, to say which.
        values = zip(*(column.to_pylist() for column in columns), strict=True)
        records = (dict(zip(LEVELS, row, strict=True)) for row in values)
        levels = _all_levels(dict(zip(ids, records, strict=True)), str(path))
    nothing = [None] * len(ids)
    texts = {name: _Strings(table[name].chunk(0)) if name in names and ids else nothing for name in TEXTS}
    return Columns(ids, levels, texts)


# --- levels ----------------------------------------------------------------------------------------------------------


def _all_levels(records: Mapping, source: str) -> np.ndarray:
    """float64 [N, 3]"""
    try:
        flat = [record[level] for record in records.values() for level in LEVELS]
        if {float, int}.issuperset(map(type, flat)):
            values = np.array(flat, dtype=float).reshape(-1, len(LEVELS))
            if (np.isfinite(values) & (values > 0)).all():
                return values
    except (TypeError, KeyError, IndexError, OverflowError):
        pass
    # Something is wrong or of another type: one by one, to say which.
    return np.array([_levels(record, key, source) for key, record in records.items()]).reshape(-1, len(LEVELS))


def _levels(record, key, source: str) -> list[float]:
    if not isinstance(record, Mapping):
        raise BaselineError(f"{source}: id {shown(key)}: expected a dict of levels, found {shown(record)}")
    values = []
    for level in LEVELS:
        value = record.get(level)
        number = value.item() if isinstance(value, np.generic) else value
        if type(number) not in (int, float) or not 0 < number <= sys.float_info.max:
            raise BaselineError(
                f"{source}: id {shown(key)}: {level} is {shown(value)}, expected a finite positive number: "
                "recompute it with compute_baselines_trl.py"
            )
        values.append(float(number))
    return values


def shown(value) -> str:
    """A repr of bounded length and cost, whatever a file holds."""
    try:
        return f"{reprlib.repr(value):.80}"
    except ValueError:  # a number of too many digits
        return f"a number of type {type(value).__name__}"
