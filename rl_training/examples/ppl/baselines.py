"""The baselines file: what it may hold, how it is read without running anything, what it was made with."""

import importlib.metadata
import io
import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .data import Text, stable_id
from .errors import InputError
from .units import LEVELS

SUFFIXES = (".pkl", ".json", ".parquet")
_VERSIONED = ("torch", "transformers", "tokenizers", "unsloth", "bitsandbytes", "sentencex", "regex")


class BaselineError(InputError):
    """A baselines file that cannot be used as it is; the message says what to do."""


class Baselines(Mapping[str, np.ndarray]):
    """Level perplexities by row: `baselines[id]` is float64 [3], in the order of `LEVELS`.

    `records`: `{id or prompt: {"word": float, "phrase": float, "sentence": float, ...}}`. `meta`: what they were made
    with, {} if unknown. Raises `BaselineError` for a value that is no finite positive number.
    """

    def __init__(self, records: Mapping, meta: Mapping | None = None, source: str = "baselines") -> None:
        if not isinstance(records, Mapping):
            raise BaselineError(f"{source}: expected a dict of id -> levels, found {type(records).__name__}")
        self.meta = dict(meta or {})
        self.source = source
        self._levels = {key: _levels(record, key, source) for key, record in records.items()}
        by_prompt: dict[str, object] = {}
        for key, record in records.items():
            if prompt := record.get("prompt_id"):
                by_prompt[prompt] = None if prompt in by_prompt else key  # two rows: it does not tell them apart
        self._by_prompt = {prompt: key for prompt, key in by_prompt.items() if key is not None}

    @classmethod
    def load(cls, path: str | Path) -> "Baselines":
        """Read a .pkl, .json or .parquet file and the .meta.json beside it. Nothing in them is executed."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise BaselineError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BaselineError(f"{path}: {error.strerror}: make it with compute_baselines_trl.py") from error
        records = {".pkl": _unpickle, ".json": _parse_json, ".parquet": _parse_parquet}[path.suffix](content, path)
        return cls(records, read_meta(path), source=str(path))

    def find(self, row_id, prompt: Text | None) -> np.ndarray | None:
        """float64 [3] by id, else by the prompt itself, else by the prompt's hash if that names one row; or None."""
        found = self._levels.get(row_id) if row_id is not None else None
        if found is None and isinstance(prompt, str):
            found = self._levels.get(prompt)
        if found is None and prompt is not None:
            found = self._levels.get(self._by_prompt.get(stable_id(prompt)))
        return found

    def __getitem__(self, key) -> np.ndarray:
        return self._levels[key]

    def __iter__(self) -> Iterator:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)


def check_meta(baselines: Baselines, expected: Mapping) -> None:
    """Refuse baselines made for another target, with other definitions, or by another model than the scorer.

    Compares what both name; a dict without a meta file is taken at its word. Raises `BaselineError`.
    """
    for key, mine in expected.items():
        theirs = baselines.meta.get(key)
        if isinstance(mine, Mapping):
            check_meta(Baselines({}, theirs, f"{baselines.source} ({key})"), mine)
        elif theirs is not None and theirs != mine:
            raise BaselineError(
                f"{baselines.source} was made with {key}={theirs!r}, this run has {key}={mine!r}: recompute it with "
                "compute_baselines_trl.py and this run's settings, or insist with --allow_baseline_mismatch "
                "(allow_baseline_mismatch=True)"
            )


def meta_path(path: str | Path) -> Path:
    return Path(f"{path}.meta.json")


def read_meta(path: str | Path) -> dict:
    """What the file beside `path` says it was made with; {} if there is none."""
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BaselineError(f"{meta_path(path)}: not JSON ({error}): delete it or recompute the baselines") from error
    if not isinstance(meta, dict):
        raise BaselineError(f"{meta_path(path)}: expected a JSON object, found {type(meta).__name__}")
    return meta


def versions() -> dict[str, str]:
    """Versions of the installed packages that can change a number."""
    installed = {}
    for name in _VERSIONED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def write(path: str | Path, records: Mapping[str, Mapping], meta: Mapping) -> None:
    """Write the file and its meta file, each to a temporary name first: what is there under the name is complete."""
    path = Path(path)
    writer = {".pkl": _write_pickle, ".json": _write_json, ".parquet": _write_parquet}[path.suffix]
    write_atomically(meta_path(path), lambda file: file.write(json.dumps(meta, indent=2, ensure_ascii=False).encode()))
    write_atomically(path, lambda file: writer(file, records))


def write_atomically(path: Path, fill: Callable[[io.BufferedIOBase], object]) -> None:
    """Let `fill` write a file beside `path`, then rename it to `path`."""
    with _temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[str]:
    handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
    os.close(handle)
    os.chmod(temporary, 0o666 & ~_umask())
    try:
        yield temporary
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _levels(record, key, source: str) -> np.ndarray:
    if not isinstance(record, Mapping):
        raise BaselineError(f"{source}: id {key!r}: expected a dict of levels, found {record!r:.80}")
    values = []
    for level in LEVELS:
        value = record.get(level)
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise BaselineError(f"{source}: id {key!r}: {level} is {value!r:.80}, expected a finite positive number")
        values.append(float(value))
    return np.array(values)


# --- formats ---------------------------------------------------------------------------------------------------------


def _write_pickle(file, records) -> None:
    pickle.dump(dict(records), file, protocol=4)


def _write_json(file, records) -> None:
    file.write(json.dumps(records, ensure_ascii=False, indent=0).encode("utf-8", "surrogatepass"))


def _write_parquet(file, records) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": key, **record} for key, record in records.items()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def _parse_json(content: bytes, path: Path):
    try:
        return json.loads(content)
    except ValueError as error:
        raise BaselineError(f"{path}: not JSON ({error}): recompute it with compute_baselines_trl.py") from error


def _parse_parquet(content: bytes, path: Path) -> dict:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise BaselineError(f"{path}: not Parquet ({error}): recompute it with compute_baselines_trl.py") from error
    if rows and "id" not in rows[0]:
        raise BaselineError(f"{path}: no column id, only {', '.join(rows[0])}")
    return {row.pop("id"): row for row in rows}


class _Unpickler(pickle.Unpickler):
    """Reads plain containers and numbers; of everything else, only numpy scalars, rebuilt without numpy's help."""

    _ALLOWED = frozenset(
        (f"numpy.{core}multiarray", "scalar") for core in ("core.", "_core.")
    ) | {("numpy", "dtype")}

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}")
        return _scalar if name == "scalar" else _ScalarType

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file")


class _ScalarType:
    """Stands for numpy.dtype in a pickle: a letter, a size in bytes, and the byte order of its state."""

    def __init__(self, code: str, *_flags) -> None:
        if not isinstance(code, str) or code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise pickle.UnpicklingError(f"it holds a numpy value of type {code!r:.20}")
        self.code, self.order = code, "="

    def __setstate__(self, state) -> None:
        if state[1] in ("<", ">", "|", "="):
            self.order = state[1]


def _scalar(dtype: _ScalarType, data: bytes):
    if not isinstance(dtype, _ScalarType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("it holds a numpy value of an unknown form")
    values = np.frombuffer(data, dtype=np.dtype(dtype.order.replace("|", "=") + dtype.code))
    if len(values) != 1:
        raise pickle.UnpicklingError(f"it holds a numpy value of {len(data)} bytes for type {dtype.code}")
    return values[0].item()


def _unpickle(content: bytes, path: Path):
    stream = io.BytesIO(content)
    try:
        return _Unpickler(stream).load()
    # A damaged or hostile pickle can make the reader raise nearly anything; whatever it is, the file is refused.
    except Exception as error:
        raise BaselineError(
            f"{path}: not a baselines pickle ({type(error).__name__}: {error}): recompute it with "
            "compute_baselines_trl.py"
        ) from error
