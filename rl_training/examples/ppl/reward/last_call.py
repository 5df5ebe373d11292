"""What a call of the reward function found: for the log, and for who looks on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..definitions import LEVELS
from ..processes import from_all


class LastCall(NamedTuple):
    details: dict
    skipped: np.ndarray  # bool [B]: rows without a baseline or a reference
    scored: np.ndarray  # bool [B]: rows with a perplexity and a baseline
    first_visit: np.ndarray  # bool [B]: rows that make their prompt's baseline
    extracted: np.ndarray  # bool [B]: completions that `extract` matches
    clipped: np.ndarray | None  # bool [B]: with form="nats", those whose ratio is beyond NATS_CLIP
    vetoed: Sequence[bool] | None  # [B]: with a veto
    of: tuple[list, list[str]]  # its prompts and texts


def log(call: LastCall, extracts: bool, log_metric, log_extra=None) -> None:
    """Means over all processes, the same names at every call on every process; without a scored row 0.

    extracts: whether the reward takes a part of each completion. log_extra: takes a column of TRL's table of
    completions.
    """
    if extracts:
        every = from_all(call.extracted.tolist())
        log_metric("diagnostics/not_extracted", 1 - sum(every) / len(every) if every else 0.0)
    if call.clipped is not None:
        every = from_all(call.clipped[call.scored].tolist())
        log_metric("diagnostics/clipped", sum(every) / len(every) if every else 0.0)
    if call.vetoed is not None:
        every = from_all(np.asarray(call.vetoed)[~call.skipped].tolist())
        log_metric("diagnostics/vetoed", sum(every) / len(every) if every else 0.0)
    columns = {f"reward_{level}": call.details["improvements"][level] for level in LEVELS}
    columns |= {f"ppl/{level}": call.details["ppls"][level] for level in LEVELS}
    rows = np.stack([column.numpy()[call.scored] for column in columns.values()], axis=1)
    means = np.array(from_all(rows.tolist())).reshape(-1, len(columns))
    means = means.mean(axis=0) if len(means) else np.zeros(len(columns))
    for (name, column), mean in zip(columns.items(), means, strict=True):
        log_metric(name, float(mean))
        if log_extra is not None:
            log_extra(name, column.tolist())
