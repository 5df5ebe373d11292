"""The baselines file as the reward asks it: a row's level perplexities, by id or by prompt."""

import functools
import importlib.metadata
import itertools
import json
import pickle
import reprlib
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DEFAULT_PROMPT_TEMPLATE, LEVELS, RewardConfig
from ..data import Text, message_text, stable_id
from ..errors import BaselineError, retired
from ..files import write_text
from . import safe_pickle

# --- formats ---------------------------------------------------------------------------------------------------------

# The baselines file's two formats: written a few thousand rows at a time, read without running anything.

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


# --- meta ------------------------------------------------------------------------------------------------------------

# What a baselines file was made with: the meta file beside it.

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


def meta_path(path: str | Path) -> Path:
    return Path(f"{path}.meta.json")


def read_meta(path: str | Path) -> dict:
    """What the file beside `path` says it was made with; {} if there is none."""
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise BaselineError(f"{meta_path(path)}: {error.strerror}: move it away, or name another file") from error
    except ValueError as error:
        raise BaselineError(f"{meta_path(path)}: not JSON ({error}): delete it or recompute the baselines") from error
    if not isinstance(meta, dict):
        raise BaselineError(f"{meta_path(path)}: expected a JSON object, found {type(meta).__name__}")
    wrong = {key: meta[key] for key, types in _META_TYPES.items() if key in meta and not isinstance(meta[key], types)}
    if not wrong:
        model, columns = meta.get("model", {}), meta.get("dataset", {}).get("columns", {})
        config, probe = model.get("config", {}), model.get("probe", [])
        numbers = isinstance(probe, list) and all(isinstance(one, int | float) for one in probe)
        right = {"columns": isinstance(columns, dict), "config": isinstance(config, dict), "probe": numbers}
        inner = {"columns": columns, "config": config, "probe": probe}
        wrong = {key: value for key, value in inner.items() if not right[key]}
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


# --- file ------------------------------------------------------------------------------------------------------------

SUFFIXES = (".pkl", ".json")
_SHOWN = 40  # characters of a prompt, for messages


class Baselines(Mapping[str, np.ndarray]):
    """Level perplexities by row: `baselines[id]` is float64 [3], in the order of `LEVELS`.

    `records`: `{id or prompt: {"word": float, "phrase": float, "sentence": float, ...}}`. `meta`: what they were made
    with, {} if unknown. Raises `BaselineError` for a value that is no finite positive number.
    """

    def __init__(self, records: Mapping, meta: Mapping | None = None, source: str = "baselines") -> None:
        columns = columns_of(records, source)
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
        """Read a .pkl or .json file and the .meta.json beside it. Nothing in them is executed."""
        path = Path(path)
        if gone := retired("baselines", path):
            raise BaselineError(f"{path}: {gone}")
        if path.suffix not in SUFFIXES:
            raise BaselineError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BaselineError(f"{path}: {error.strerror}: make it with compute_baselines_trl.py") from error
        baselines = cls(read_records(path, content), read_meta(path), source=str(path))
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
            row = self._rows.get(prompt) if isinstance(prompt, str) else None
            # A mapping by prompts; or another row's id that reads like this prompt.
            if row is not None and _is_of_another(self._texts["prompt_id"][row], prompt):
                row = None
            if row is None and prompt is not None:
                row = self._by_prompt.get(stable_id(prompt))
        return None if row is None else self._levels[row]

    def _check_texts(self, texts: Mapping[str, object], row_id, prompt, reference, index) -> None:
        where = f"{'a row' if index is None else f'row {index}'} with the id {row_id!r:.40}"
        remedy = (
            "ids that start anew in each split, or texts that were edited, need baselines of their own: make them with "
            "compute_baselines_trl.py from these rows, or give every row an id that no other text has"
        )
        if prompt is not None and _is_of_another(texts["prompt_id"], prompt):
            theirs = f" that begins {texts['prompt_start']!r}" if isinstance(texts["prompt_start"], str) else ""
            raise BaselineError(
                f"{where} has a prompt that begins {beginning(prompt)!r}, and {self.source} has the baseline of "
                f"another prompt{theirs} under this id: {remedy}"
            )
        if reference and _is_of_another(texts["reference_id"], reference):
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


def _is_of_another(known: object, text: Text) -> bool:
    """Whether `known`, a hash where a file keeps one, is another text's."""
    return isinstance(known, str) and known != stable_id(text)


def beginning(text: Text) -> str:
    """The first characters of a text, in one line. Of chat messages, those of the last one."""
    shown = message_text(text if isinstance(text, str) else text[-1:])
    return " ".join(shown.split())[:_SHOWN]


# --- mismatch --------------------------------------------------------------------------------------------------------

# Whether a baselines file fits a scorer, and the command that makes the one that does.


def check_meta(baselines: Baselines, expected: Mapping) -> None:
    """Refuse baselines made for another target, with other definitions, or by another model than the scorer.

    expected: "target", "definitions", "prompt", "tokenizer", "model" as `describe_model` gives it, and
    "window", the most tokens the scorer takes at once. Compares what both name: a dict without a meta file is taken at
    its word, a model's name is told but not compared, and another window only matters if a text was longer. Raises
    `BaselineError`.
    """
    from ..scoring.identity import differences  # here, since a file is read without torch

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
    from ..scoring.identity import BEHIND_AN_ADDRESS

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
    flags |= {name: prompt[name] for name in ("prompt_sentences", "system_prompt", "user_prompt") if prompt.get(name)}
    if prompt.get("chat"):
        flags["chat"] = None
    if prompt.get("chat_template_kwargs"):
        flags["chat_template_kwargs"] = json.dumps(prompt["chat_template_kwargs"])
    flags |= {f"dataset_{key}": made_from.get(key) for key in ("name", "config", "split") if made_from.get(key)}
    flags |= {f"{key}_column": name for key, name in dict(made_from.get("columns") or {}).items() if name}
    if made_from.get("num_samples"):
        flags["num_samples"] = made_from["num_samples"]
    if expected.get("target") != "reference":  # of the model's own writing, again
        generated = dict(baselines.meta.get("generated") or {})
        if generated.get("generation_kwargs"):
            generated["generation_kwargs"] = json.dumps(generated["generation_kwargs"])
        flags |= {name: value for name, value in generated.items() if value is not None}
    usual = {one.name: one.default for one in fields(RewardConfig)} | {"prompt_template": DEFAULT_PROMPT_TEMPLATE}
    wanted = {"target": expected.get("target"), **expected.get("definitions", {}), **prompt}
    flags |= {key: wanted[key] for key in usual if wanted.get(key) not in (None, usual[key])}
    flags |= {"output_path": baselines.source, "overwrite": None}
    words = [word for key, value in flags.items() for word in (f"--{key}", value) if word is not None]
    return shlex.join(["python", "compute_baselines_trl.py", *map(str, words)])
