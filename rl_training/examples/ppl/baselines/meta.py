"""What a baselines file was made with: the meta file beside it."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import BaselineError
from ..files import write_text

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
