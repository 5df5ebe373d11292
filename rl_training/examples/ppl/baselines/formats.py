"""The baselines file's two formats: written a few thousand rows at a time, read without running anything."""

import itertools
import json
import pickle
import reprlib
import sys
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


def columns_of(records, source: str) -> Columns:
    if not isinstance(records, Mapping):
        raise BaselineError(f"{source}: expected a dict of id -> levels, found {type(records).__name__}")
    levels = _all_levels(records, source)
    texts = {name: [record.get(name) for record in records.values()] for name in TEXTS}
    return Columns(list(records), levels, texts)


def write_records(file, suffix: str, items: Iterable[tuple[str | int, Mapping]]) -> None:
    """Write (id, record) pairs in the format of `suffix`, holding no more than a few thousand of them."""
    {".pkl": _write_pickle, ".json": _write_json}[suffix](file, _chunks(items))


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


def read_records(path: Path, content: bytes):
    """What the file holds, still to be checked by `columns_of`. content: its bytes."""
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
