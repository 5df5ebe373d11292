"""A baselines file and its meta file, as compute_baselines_trl.py writes the two."""

from collections.abc import Mapping
from pathlib import Path

from mlppl.baselines.file import write_meta, write_records
from mlppl.files import write_atomically


def write(path: Path, records: Mapping, meta: Mapping) -> None:
    write_meta(path, meta)
    write_atomically(path, lambda file: write_records(file, path.suffix, records.items()))
