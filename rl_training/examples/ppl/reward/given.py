"""The baselines that a call's rows are given: by the data set's columns, else by the file."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..baselines.file import Baselines
from ..data import stable_id
from ..definitions import BASELINE_COLUMNS, LEVELS
from ..errors import BaselineError


def row_baselines(columns: Mapping[str, Sequence]) -> list[dict | None] | None:
    """Per row the baseline in the columns `baseline_word`, `baseline_phrase`, `baseline_sentence`; None without."""
    present = [name for name in BASELINE_COLUMNS if name in columns]
    if not present:
        return None
    if len(present) < len(BASELINE_COLUMNS):
        raise BaselineError(f"the data set has {', '.join(present)}, all of {', '.join(BASELINE_COLUMNS)} are needed")
    rows = zip(*(columns[name] for name in BASELINE_COLUMNS), strict=True)
    return [None if None in row else dict(zip(LEVELS, row, strict=True)) for row in rows]


def given_baselines(
    baselines: Baselines | None, of_reference: bool, prompts: Sequence, references: Sequence, ids, rows
) -> np.ndarray:
    """float64 [B, 3], nan where a row has none. rows: of `row_baselines`, which come first. of_reference: references
    are what is measured."""
    values = np.full((len(prompts), len(LEVELS)), np.nan)
    if rows is not None:
        given = {index: row for index, row in enumerate(rows) if row is not None}
        for index, of_row in Baselines(given, source="the data set").items():
            values[index] = of_row
    if baselines is not None:
        for index in np.flatnonzero(np.isnan(values[:, 0])).tolist():
            reference = (references[index] or "") if of_reference else None
            row = baselines.find(_key(ids, prompts, references, index), prompts[index], reference, index)
            if row is not None:
                values[index] = row
    return values


def refuse(baselines: Baselines, absent: np.ndarray, prompts: Sequence, references: Sequence, ids) -> None:
    """Raises `BaselineError` for rows without a baseline. absent: bool [B]."""
    first = [_key(ids, prompts, references, index) for index in np.flatnonzero(absent)[:3].tolist()]
    raise BaselineError(
        f"{baselines.source} has no baseline for {absent.sum()} of {len(absent)} rows, the first are {first}: "
        "compute them with compute_baselines_trl.py on this data set, or skip such rows with missing='skip'"
    )


def _key(ids, prompts, references, index: int):
    if ids is not None:
        return ids[index]
    return None if prompts[index] is None else stable_id(prompts[index], references[index] or "")
