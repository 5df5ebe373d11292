"""The baselines file: written, and asked by the reward for a row's level perplexities, by id or by prompt."""

import functools
import importlib.metadata
import itertools
import json
import os
import pickle
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import INSTALLED
from ..cli import runnable
from ..config import LEVELS, RewardConfig
from ..data import PromptForm, Text, message_text, stable_id
from ..errors import BaselineError, retired
from ..files import write_text
from ..scoring.differences import BEHIND_AN_ADDRESS, differences
from . import safe_pickle

SUFFIXES = (".pkl", ".json")
# What the file keeps of a row. prompt_id and reference_id are hashes: a baseline is of these texts and no others.
TEXTS = ("prompt_id", "prompt_start", "reference_id")
_REMAKE = "recompute it with compute_baselines_trl.py"
_META_REMEDY = "delete it or recompute the baselines"

# --- written ---------------------------------------------------------------------------------------------------------


def write_records(file, suffix: str, items: Iterable[tuple[str | int, Mapping]]) -> None:
    """Write (id, record) pairs in the format of `suffix`, holding no more than a few thousand of them."""
    {".pkl": _write_pickle, ".json": _write_json}[suffix](file, iter(items))


def _write_pickle(file, items: Iterator[tuple]) -> None:
    # A dict's pickle is: protocol, empty dict, memo 0; then its items; then the end. So the items of many dicts, one
    # after the other, are the pickle of one dict. Each piece writes its memos over those of the one before, done with.
    file.write(b"\x80\x02}")
    while piece := dict(itertools.islice(items, 8192)):
        file.write(pickle.dumps(piece, protocol=2).removeprefix(b"\x80\x02}q\x00").removesuffix(b"."))
    file.write(b".")


def _write_json(file, items: Iterator[tuple]) -> None:
    before = "{\n"
    for key, record in items:
        entry = f"{before}{json.dumps(str(key), ensure_ascii=False)}: {json.dumps(record, ensure_ascii=False)}"
        file.write(entry.encode("utf-8", "surrogatepass"))
        before = ",\n"
    file.write(b"{}\n" if before == "{\n" else b"\n}\n")


def write_meta(path: str | Path, meta: Mapping) -> None:
    """Write what the file under `path` was made with beside it."""
    write_text(meta_path(path), json.dumps(meta, indent=2, ensure_ascii=False))


def meta_path(path: str | Path) -> Path:
    return Path(f"{path}.meta.json")


def versions() -> dict[str, str]:
    """Versions of the installed packages that can change a number."""
    names = ("torch", "transformers", "tokenizers", "unsloth", "bitsandbytes", "sentencex", "regex")
    found = {name: list(importlib.metadata.distributions(name=name)) for name in names}
    return {name: there[0].version for name, there in found.items() if there}


# --- read ------------------------------------------------------------------------------------------------------------


def _read_records(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BaselineError(f"{path}: {error.strerror}: make it with compute_baselines_trl.py") from error
    try:
        if path.suffix == ".pkl":
            return safe_pickle.loads(content)
        return json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        expected = "a baselines pickle" if path.suffix == ".pkl" else "JSON"
        raise BaselineError(f"{path}: not {expected} ({error}): {_REMAKE}") from error


def _without_duplicates(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.80} is there twice")
    return content


def _levels(record: Any, key: object, source: str, levels: Sequence[str]) -> list[float]:
    """Of one record. Raises `BaselineError` unless each is a finite positive number, of Python or NumPy."""
    if not isinstance(record, Mapping):
        raise BaselineError(f"{source}: id {_shown(key)}: expected a dict of levels, found {_shown(record)}")
    values = []
    for level in levels:
        value = record.get(level)
        number = value.item() if isinstance(value, np.generic) else value
        if type(number) not in (int, float) or not 0 < number <= sys.float_info.max:
            raise BaselineError(
                f"{source}: id {_shown(key)}: {level} is {_shown(value)}, expected a finite positive number: {_REMAKE}"
            )
        values.append(float(number))
    return values


def _shown(value: object) -> str:
    """A repr of bounded length and cost, whatever a file holds."""
    try:
        return f"{reprlib.repr(value):.80}"
    except ValueError:  # a number of too many digits
        return f"a number of type {type(value).__name__}"


# Of the meta file, and of what is in its parts.
_META_TYPES: dict[str, dict] = {
    "": {
        **dict.fromkeys(("model", "definitions", "prompt", "dataset"), dict),
        **{"window": int | None, "longest": int, "generated": dict | None},
    },
    "model": {"config": dict, "probe": list},
    "dataset": {"columns": dict},
}


def read_meta(path: str | Path) -> dict:
    """What the file beside `path` says it was made with; {} if there is none. Raises `BaselineError`."""
    file = meta_path(path)
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise BaselineError(f"{file}: {error.strerror}: move it away, or name another file") from error
    except ValueError as error:
        raise BaselineError(f"{file}: not JSON ({error}): {_META_REMEDY}") from error
    if not isinstance(meta, dict):
        raise BaselineError(f"{file}: expected a JSON object, found {type(meta).__name__}")
    for part, types in _META_TYPES.items():
        for key, value in (meta.get(part, {}) if part else meta).items():
            inner = value if key == "probe" and isinstance(value, list) else ()
            if not isinstance(value, types.get(key, object)) or not all(isinstance(one, int | float) for one in inner):
                raise BaselineError(f"{file}: {key} is {value!r:.80}: {_META_REMEDY}")
    return meta


# --- asked -----------------------------------------------------------------------------------------------------------


class Baselines(Mapping[str, np.ndarray]):
    """Level perplexities by row: `baselines[id]` is float64 [L], in the order of `levels`.

    `records`: `{id or prompt: {"word": float, "phrase": float, "sentence": float, ...}}`. `meta`: what they were made
    with, {} if unknown. Raises `BaselineError` for a value that is no finite positive number.
    """

    def __init__(
        self, records: Mapping, meta: Mapping | None = None, source: str = "baselines", levels: Sequence[str] = LEVELS
    ) -> None:
        if not isinstance(records, Mapping):
            raise BaselineError(f"{source}: expected a dict of id -> levels, found {type(records).__name__}")
        self.meta = dict(meta or {})
        self.source = source
        self._rows = {key: row for row, key in enumerate(records)}
        values = [_levels(record, key, source, levels) for key, record in records.items()]
        self._levels = np.array(values, dtype=float).reshape(-1, len(levels))
        self._levels.flags.writeable = False
        self._texts = {
            name: [text if isinstance(text := record.get(name), str) else None for record in records.values()]
            for name in TEXTS
        }

    @functools.cached_property
    def _by_prompt(self) -> dict[str | None, int]:
        """The row of a prompt's hash, where only one row is that prompt's."""
        times = Counter(self._texts["prompt_id"])
        return {prompt_id: row for row, prompt_id in enumerate(self._texts["prompt_id"]) if times[prompt_id] == 1}

    @classmethod
    def load(cls, path: str | Path, levels: Sequence[str] = LEVELS) -> "Baselines":
        """Read a .pkl or .json file and the .meta.json beside it. Nothing in them is executed."""
        path = Path(path)
        if gone := retired("baselines", path):
            raise BaselineError(f"{path}: {gone}")
        if path.suffix not in SUFFIXES:
            raise BaselineError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        meta = read_meta(path)
        made = meta.get("definitions", {}).get("levels", LEVELS)
        if absent := [level for level in levels if level not in made]:
            raise BaselineError(
                f"{path} has the levels {', '.join(made)}, and {absent[0]} is asked for: make it again with --levels "
                f"{' '.join(levels)}"
            )
        baselines = cls(_read_records(path), meta, str(path), levels)
        if not baselines:
            raise BaselineError(f"{path} holds no row: make it with compute_baselines_trl.py")
        return baselines

    def find(
        self, row_id, prompt: Text | None, reference: Text | None = None, index: int | None = None
    ) -> np.ndarray | None:
        """float64 [L] by id; without a reference also by the prompt itself or its hash, if that names one row; or None.

        reference: the row's, if it is what is measured: then no other row's baseline will do. index: the row's, for the
        message. Raises `BaselineError` if the id's baseline is known to be another prompt's or reference's.
        """
        row = self._rows.get(row_id)
        if row is None and isinstance(row_id, int | np.integer):
            row = self._rows.get(str(row_id))  # JSON has no other keys
        if row is not None:
            where = f"{'a row' if index is None else f'row {index}'} with the id {row_id!r:.40}"
            self._refuse_another("prompt", row, prompt, where)
            self._refuse_another("reference", row, reference or None, where)
        elif reference is None and prompt is not None:
            row = self._rows.get(prompt) if isinstance(prompt, str) else None  # of a mapping by prompts
            if row is None or self._is_of_another("prompt", row, prompt):  # it is an id that reads like this prompt
                row = self._by_prompt.get(stable_id(prompt))
        return None if row is None else self._levels[row]

    def _is_of_another(self, kind: str, row: int, text: Text | None) -> bool:
        known = self._texts[f"{kind}_id"][row]
        return None not in (known, text) and known != stable_id(text)

    def _refuse_another(self, kind: str, row: int, text: Text | None, where: str) -> None:
        if not self._is_of_another(kind, row, text):
            return
        start = self._texts["prompt_start"][row] if kind == "prompt" else None
        theirs = "" if start is None else f" that begins {start!r}"
        raise BaselineError(
            f"{where} has a {kind} that begins {beginning(text)!r}, and {self.source} has the baseline of another "
            f"{kind}{theirs} under this id: ids that start anew in each split, or texts that were edited, need "
            "baselines of their own: make them with compute_baselines_trl.py from these rows, or give every row an id "
            "that no other text has"
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


def beginning(text: Text) -> str:
    """The first 40 characters of a text, in one line, for messages. Of chat messages, those of the last one."""
    shown = message_text(text if isinstance(text, str) else text[-1:])
    return " ".join(shown.split())[:40]


# --- compared --------------------------------------------------------------------------------------------------------


def check_meta(baselines: Baselines, expected: Mapping) -> None:
    """Refuse baselines made for another target, with other definitions, or by another model than the scorer.

    expected: "target", "definitions", "prompt", "tokenizer", "model" as `describe_model` gives it, and
    "window", the most tokens the scorer takes at once. Compares what both name: a dict without a meta file is taken at
    its word, a model's name is told but not compared, and another window only matters if a text was longer. Raises
    `BaselineError`.
    """
    differing = differences(baselines.meta, expected)
    if differing:
        made, has = (", ".join(f"{key} {both[side]}" for key, both in differing.items()) for side in (0, 1))
        names = [one.get("model", {}).get("name") for one in (baselines.meta, expected)]
        maker, scorer = (repr(name) if name else "a model of unknown name" for name in names)
        raise BaselineError(
            f"{baselines.source} was made by {maker} with {made}; the scorer here, {scorer}, has {has}: make the right "
            f"one with `{_command(baselines, expected, differing)}`, or insist with --allow_baseline_mismatch (in "
            "Python allow_baseline_mismatch=True)"
        )


def _examples_flag(made: str, expected: str) -> str | None:
    """What --examples takes to show what is expected: a number, or a file where as many were drawn and are others."""
    (number, *_), (before, *_) = (one.partition(" ") for one in (expected, made))
    return "FILE" if number and number == before and made != expected else number or None


def _command(baselines: Baselines, expected: Mapping, differing: Mapping) -> str:
    """The call of compute_baselines_trl.py that makes the file as `expected` has it."""
    meta = baselines.meta
    model, made_from = {**meta.get("model", {}), **expected.get("model", {})}, meta.get("dataset", {})
    wanted = {**expected.get("definitions", {}), **meta.get("prompt", {}), **expected.get("prompt", {})}
    wanted = {key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()}
    wanted["target"] = expected.get("target")
    usual = {one.name: one.default for one in fields(RewardConfig)} | PromptForm().identity
    usual["chat_template_kwargs"] = {}
    flags = {
        "model_name": model.get("name") or "MODEL",
        "load_in_4bit": model.get("quantization") == "4bit",
        "scorer_url": "URL" if model.get("weights") == BEHIND_AN_ADDRESS else None,
        "dtype": model.get("dtype") if "dtype" in differing else None,
        "max_seq_length": expected.get("window") if "window" in differing else None,
        **{f"dataset_{key}": made_from.get(key) for key in ("name", "config", "split")},
        **{f"{key}_column": name for key, name in made_from.get("columns", {}).items()},
        "num_samples": made_from.get("num_samples"),
        # Of the model's own writing, again; a reference is not written.
        **(meta.get("generated") or {} if wanted["target"] != "reference" else {}),
        **{key: wanted.get(key) for key in usual if wanted.get(key) != usual[key]},
        "examples": _examples_flag(*(one.get("shown", {}).get("examples", "") for one in (meta, expected))),
        "output_dataset" if os.path.isdir(baselines.source) else "output_path": baselines.source,
        "overwrite": True,
    }
    script = os.path.relpath(Path(__file__).parents[2] / "compute_baselines_trl.py")
    words = ["mlppl-baselines"] if INSTALLED else ["python", script]
    for key, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, tuple) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{key}", *(map(str, values) if value is not True else ())]
    return runnable(words)
