"""The baselines file: what it may hold, how it is read without running anything, what it was made with."""

import functools
import importlib.metadata
import itertools
import json
import pickle
import reprlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import Text, message_text, stable_id
from ..definitions import (
    DEFAULT_AGGREGATION,
    DEFAULT_LANGUAGE,
    DEFAULT_PHRASE_WORDS,
    DEFAULT_PROMPT_TEMPLATE,
    DEFAULT_REFERENCE_TOKENS,
    DEFAULT_TARGET,
    DEFAULT_TEMPLATE,
    LEVELS,
)
from ..errors import InputError
from ..files import write_text
from ..identity import BEHIND_AN_ADDRESS, differences
from . import safe_pickle

SUFFIXES = (".pkl", ".json", ".parquet")
_VERSIONED = ("torch", "transformers", "tokenizers", "unsloth", "bitsandbytes", "sentencex", "regex")
_META_TYPES = {
    "model": dict,
    "definitions": dict,
    "prompt": dict,
    "dataset": dict,
    "window": int | None,
    "longest": int,
    "generated": dict | None,
}
# What the file keeps of a row. prompt_id and reference_id are hashes: a baseline is of these texts and no others.
_TEXTS = ("prompt_id", "prompt_start", "reference_id")
RECORD = (*LEVELS, "n_tokens", *_TEXTS)
_SHOWN = 40  # characters of a prompt, for messages
_ROWS_AT_ONCE = 8192  # rows that a writer holds


class BaselineError(InputError):
    """A baselines file that cannot be used as it is; the message says what to do."""


class Baselines(Mapping[str, np.ndarray]):
    """Level perplexities by row: `baselines[id]` is float64 [3], in the order of `LEVELS`.

    `records`: `{id or prompt: {"word": float, "phrase": float, "sentence": float, ...}}`. `meta`: what they were made
    with, {} if unknown. Raises `BaselineError` for a value that is no finite positive number.
    """

    def __init__(self, records: "Mapping | _Columns", meta: Mapping | None = None, source: str = "baselines") -> None:
        columns = records if isinstance(records, _Columns) else _columns(records, source)
        self.meta = dict(meta or {})
        self.source = source
        self._rows = dict(zip(columns.ids, range(len(columns.ids)), strict=True))
        self._levels = columns.levels
        self._levels.flags.writeable = False
        self._texts = columns.texts

    @functools.cached_property
    def _by_prompt(self) -> dict[str, int]:
        """The row of a prompt's hash, where only one row is that prompt's."""
        by_prompt: dict[str, int | None] = {}
        for row, prompt_id in enumerate(self._texts["prompt_id"]):
            if isinstance(prompt_id, str):
                by_prompt[prompt_id] = None if prompt_id in by_prompt else row
        return {prompt_id: row for prompt_id, row in by_prompt.items() if row is not None}

    @classmethod
    def load(cls, path: str | Path) -> "Baselines":
        """Read a .pkl, .json or .parquet file and the .meta.json beside it. Nothing in them is executed."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise BaselineError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        try:
            with open(path, "rb") as file:
                content = file.read() if path.suffix != ".parquet" else b""
        except OSError as error:
            raise BaselineError(f"{path}: {error.strerror}: make it with compute_baselines_trl.py") from error
        if path.suffix == ".parquet":
            records = _read_parquet(path)
        else:
            records = {".pkl": _parse_pickle, ".json": _parse_json}[path.suffix](content, path)
        baselines = cls(records, read_meta(path), source=str(path))
        if not baselines:
            raise BaselineError(f"{path} holds no row: make it with compute_baselines_trl.py")
        return baselines

    def find(
        self, row_id, prompt: Text | None, reference: Text | None = None, index: int | None = None
    ) -> np.ndarray | None:
        """float64 [3] by id; without a reference also by the prompt itself or its hash, if that names one row; or None.

        reference: the row's, if it is what is measured: then no other row's baseline will do. index: the row's, for the
        message. Raises `BaselineError` if the id's baseline is known to be another prompt's or reference's.
        """
        row = self._rows.get(row_id) if row_id is not None else None
        if row is None and isinstance(row_id, int | np.integer):
            row = self._rows.get(str(row_id))  # JSON has no other keys
        if row is not None:
            self._check_texts(
                {name: column[row] for name, column in self._texts.items()}, row_id, prompt, reference, index
            )
        elif reference is None:
            if isinstance(prompt, str):
                row = self._rows.get(prompt)
            if row is None and prompt is not None:
                row = self._by_prompt.get(stable_id(prompt))
        return None if row is None else self._levels[row]

    def _check_texts(self, texts: Mapping[str, object], row_id, prompt, reference, index) -> None:
        where = f"{'a row' if index is None else f'row {index}'} with the id {row_id!r:.40}"
        remedy = (
            "ids that start anew in each split, or texts that were edited, need baselines of their own: make them with "
            "compute_baselines_trl.py from these rows, or give every row an id that no other text has"
        )
        if prompt is not None and isinstance(texts["prompt_id"], str) and texts["prompt_id"] != stable_id(prompt):
            theirs = f" that begins {texts['prompt_start']!r}" if isinstance(texts["prompt_start"], str) else ""
            raise BaselineError(
                f"{where} has a prompt that begins {beginning(prompt)!r}, and {self.source} has the baseline of "
                f"another prompt{theirs} under this id: {remedy}"
            )
        if reference and isinstance(texts["reference_id"], str) and texts["reference_id"] != stable_id(reference):
            raise BaselineError(
                f"{where} has a reference that begins {beginning(reference)!r}, and {self.source} has the baseline of "
                f"another reference under this id: {remedy}"
            )

    def check_coverage(
        self, ids: Sequence, prompts: Sequence[Text], references: Sequence[Text] | None = None, needed: bool = True
    ) -> None:
        """Raises `BaselineError` if a row's baseline is another text's, or, where every row needs one, if some have
        none, with their number, the first few ids, and the remedy. references: as in `find`, None: not measured."""
        references = [None] * len(ids) if references is None else references
        rows = zip(ids, prompts, references, range(len(ids)), strict=True)
        absent = [row[0] for row in rows if self.find(*row) is None]
        if absent and needed:
            made_from = self.meta.get("dataset", {})
            origin = f"; it is of {made_from.get('name')!r}, split {made_from.get('split')!r}" if made_from else ""
            raise BaselineError(
                f"{self.source} has no baseline for {len(absent)} of {len(ids)} rows, first {absent[:3]}{origin}: "
                "compute them with compute_baselines_trl.py on this data set and split, or leave such rows out "
                "(missing='skip')"
            )

    def __getitem__(self, key) -> np.ndarray:
        return self._levels[self._rows[key]]

    def __iter__(self) -> Iterator:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class _Columns(NamedTuple):
    """Records, column by column."""

    ids: Sequence[str | int]
    levels: np.ndarray  # float64 [N, 3]
    texts: Mapping[str, Sequence]  # of `_TEXTS`: strings, None where a record does not say


class _Strings(Sequence):
    """A column of a Parquet file, each value made when it is asked for."""

    def __init__(self, column) -> None:
        self._column = column

    def __getitem__(self, row):
        return self._column[row].as_py()

    def __len__(self) -> int:
        return len(self._column)


def _columns(records, source: str) -> _Columns:
    if not isinstance(records, Mapping):
        raise BaselineError(f"{source}: expected a dict of id -> levels, found {type(records).__name__}")
    levels = _all_levels(records, source)
    texts = {name: [record.get(name) for record in records.values()] for name in _TEXTS}
    return _Columns(list(records), levels, texts)


def beginning(text: Text) -> str:
    """The first characters of a text, in one line. Of chat messages, those of the last one."""
    shown = message_text(text if isinstance(text, str) else text[-1:])
    return " ".join(shown.split())[:_SHOWN]


# --- what a file was made with ---------------------------------------------------------------------------------------


def check_meta(baselines: Baselines, expected: Mapping) -> None:
    """Refuse baselines made for another target, with other definitions, or by another model than the scorer.

    expected: "target", "definitions", "prompt", "tokenizer", "model" as `ppl.models.describe_model` gives it, and
    "window", the most tokens the scorer takes at once. Compares what both name: a dict without a meta file is taken at
    its word, a model's name is told but not compared, and another window only matters if a text was longer. Raises
    `BaselineError`.
    """
    differing = differences(baselines.meta, expected)
    if differing:
        made, scorer = (", ".join(f"{key} {both[side]}" for key, both in differing.items()) for side in (0, 1))
        raise BaselineError(
            f"{baselines.source} was made by {_named(baselines.meta)} with {made}; the scorer here, {_named(expected)}"
            f", has {scorer}: make the right one with `{_command(baselines, expected, differing)}`, or insist with "
            "--allow_baseline_mismatch (in Python allow_baseline_mismatch=True)"
        )


def _named(identity: Mapping) -> str:
    name = identity.get("model", {}).get("name")
    return repr(name) if name else "a model of unknown name"


def _command(baselines: Baselines, expected: Mapping, differing: Iterable[str]) -> str:
    """The call of compute_baselines_trl.py that makes the file as `expected` has it."""
    model = {**baselines.meta.get("model", {}), **expected.get("model", {})}
    made_from = baselines.meta.get("dataset", {})
    flags = {"model_name": model.get("name") or "MODEL"}
    if model.get("quantization") == "4bit":
        flags["load_in_4bit"] = None
    if model.get("weights") == BEHIND_AN_ADDRESS:
        flags["scorer_url"] = "URL"
    if "dtype" in differing:
        flags["dtype"] = model["dtype"]
    if "window" in differing and expected["window"]:
        flags["max_seq_length"] = expected["window"]
    prompt = {**baselines.meta.get("prompt", {}), **expected.get("prompt", {})}
    flags |= {name: prompt[name] for name in ("prompt_sentences", "system_prompt") if prompt.get(name)}
    if prompt.get("chat"):
        flags["chat"] = None
    if prompt.get("chat_template_kwargs"):
        flags["chat_template_kwargs"] = json.dumps(prompt["chat_template_kwargs"])
    flags |= {f"dataset_{key}": made_from.get(key) for key in ("name", "config", "split") if made_from.get(key)}
    flags |= {f"{key}_column": name for key, name in dict(made_from.get("columns") or {}).items() if name}
    if made_from.get("num_samples"):
        flags["num_samples"] = made_from["num_samples"]
    usual = {
        "target": DEFAULT_TARGET,
        "max_phrase_words": DEFAULT_PHRASE_WORDS,
        "language": DEFAULT_LANGUAGE,
        "aggregation": DEFAULT_AGGREGATION,
        "template": DEFAULT_TEMPLATE,
        "reference_tokens": DEFAULT_REFERENCE_TOKENS,
        "prompt_template": DEFAULT_PROMPT_TEMPLATE,
    }
    wanted = {"target": expected.get("target"), **expected.get("definitions", {}), **prompt}
    flags |= {key: wanted[key] for key in usual if wanted.get(key) not in (None, usual[key])}
    flags |= {"output_path": baselines.source, "overwrite": None}
    words = [word for key, value in flags.items() for word in (f"--{key}", value) if word is not None]
    return shlex.join(["python", "compute_baselines_trl.py", *map(str, words)])


def meta_path(path: str | Path) -> Path:
    return Path(f"{path}.meta.json")


def read_meta(path: str | Path) -> dict:
    """What the file beside `path` says it was made with; {} if there is none."""
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise BaselineError(f"{meta_path(path)}: not JSON ({error}): delete it or recompute the baselines") from error
    if not isinstance(meta, dict):
        raise BaselineError(f"{meta_path(path)}: expected a JSON object, found {type(meta).__name__}")
    wrong = {key: meta[key] for key, types in _META_TYPES.items() if key in meta and not isinstance(meta[key], types)}
    if not wrong and not isinstance(columns := meta.get("dataset", {}).get("columns", {}), dict):
        wrong = {"columns": columns}
    for key, value in wrong.items():
        raise BaselineError(f"{meta_path(path)}: {key} is {value!r:.80}: delete it or recompute the baselines")
    return meta


def write_meta(path: str | Path, meta: Mapping) -> None:
    """Write what the file under `path` was made with beside it."""
    write_text(meta_path(path), json.dumps(meta, indent=2, ensure_ascii=False))


def versions() -> dict[str, str]:
    """Versions of the installed packages that can change a number."""
    installed = {}
    for name in _VERSIONED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


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
        raise BaselineError(f"{source}: id {_shown(key)}: expected a dict of levels, found {_shown(record)}")
    values = []
    for level in LEVELS:
        value = record.get(level)
        number = value.item() if isinstance(value, np.generic) else value
        if type(number) not in (int, float) or not 0 < number <= sys.float_info.max:
            raise BaselineError(
                f"{source}: id {_shown(key)}: {level} is {_shown(value)}, expected a finite positive number: "
                "recompute it with compute_baselines_trl.py"
            )
        values.append(float(number))
    return values


def _shown(value) -> str:
    """A repr of bounded length and cost, whatever a file holds."""
    try:
        return f"{reprlib.repr(value):.80}"
    except ValueError:  # a number of too many digits
        return f"a number of type {type(value).__name__}"


# --- formats ---------------------------------------------------------------------------------------------------------


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


def _read_parquet(path: Path) -> _Columns:
    """Column by column: a million records take 0.55 GB instead of 1.3 GB, and 2 s instead of 9."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        names = file.schema_arrow.names
        if absent := [name for name in ("id", *LEVELS) if name not in names]:
            raise BaselineError(f"{path}: no column {', '.join(absent)}, only {', '.join(names)}")
        table = file.read(columns=[name for name in ("id", *LEVELS, *_TEXTS) if name in names]).combine_chunks()
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
        raise BaselineError(f"{path}: an id is {_shown(wrong[0])}, expected a string or a whole number")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise BaselineError(f"{path}: id {_shown(twice)} is there twice: recompute it with compute_baselines_trl.py")
    if not (np.isfinite(levels) & (levels > 0)).all():
        # Something is wrong or of another type: as records, to say which.
        values = zip(*(column.to_pylist() for column in columns), strict=True)
        records = (dict(zip(LEVELS, row, strict=True)) for row in values)
        levels = _all_levels(dict(zip(ids, records, strict=True)), str(path))
    nothing = [None] * len(ids)
    texts = {name: _Strings(table[name].chunk(0)) if name in names and ids else nothing for name in _TEXTS}
    return _Columns(ids, levels, texts)
