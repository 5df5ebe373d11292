"""Which tokens go through the model together: windows, shared prefixes, batches. Integers only, no model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .tokens import Encoded


@dataclass(frozen=True)
class Row:
    """One sequence for the model, and the scored tokens that are read off it.

    inputs: int64 [L], the ids the model is given; without the last scored token, which predicts nothing here
    read:   int64 [m], ascending places in `inputs` whose hidden states predict the scored tokens
    labels: int64 [m], those tokens
    text, first: the labels are scored tokens first .. first + m of text number `text`
    """

    inputs: np.ndarray
    read: np.ndarray
    labels: np.ndarray
    text: int
    first: int


@dataclass(frozen=True)
class Group:
    """Rows that begin with the same `prefix` tokens, none of whose hidden states is read; 0: nothing is shared."""

    prefix: int
    rows: list[Row]


def windows(encoded: Encoded, window: int | None, text: int) -> Iterator[Row]:
    """The rows that score one text: windows start every window // 2 tokens, each scores what none before it reached.

    Source: the strided evaluation of the transformers guide "Perplexity of fixed-length models".
    """
    total = len(encoded.ids)
    if not len(encoded.positions):
        return
    reached = 0  # tokens of `ids` that have been in a window
    for start in range(0, total, window // 2 if window else total):
        end = min(start + window, total) if window else total
        first, last = np.searchsorted(encoded.positions, [reached, end])
        if last > first:
            # ids      b  t1 t2 t3
            # hidden   t1 t2 t3 .     place i predicts ids[i + 1]; the last one predicts nothing
            positions = encoded.positions[first:last]
            yield Row(
                inputs=encoded.ids[start : positions[-1]],
                read=positions - 1 - start,
                labels=encoded.ids[positions],
                text=text,
                first=int(first),
            )
        reached = end
        if end == total:
            return


def share_prefixes(rows: Sequence[Row], overhead: int) -> list[Group]:
    """Partition the rows into groups of equal prefix where running it once saves more than `overhead` tokens.

    In lexicographic order, rows with a common prefix are neighbours, and the prefix of a run of them is the least of
    the neighbours' common lengths. One pass over those lengths closes every such run from the inside out and keeps it
    whole where that saves more than the runs within it.
    """
    order = sorted(rows, key=lambda row: row.inputs.astype(">u4").tobytes())
    common = [_common_prefix(a, b) for a, b in pairwise(order)]
    shared: list[tuple[int, int, int]] = []  # (start, end, prefix) of the runs chosen within the last closed one
    saved = 0
    open_runs: list[tuple[int, int, int, list]] = []  # (prefix, start, saved within, runs within), prefix ascending
    for last, below in enumerate([*common, 0]):
        start, saved, shared = last, 0, []
        while open_runs and open_runs[-1][0] >= below:
            prefix, start, inner_saved, inner = open_runs.pop()
            saved, shared = saved + inner_saved, inner + shared
            if prefix == below:
                break
            whole = prefix * (last - start) - overhead
            if whole > saved:
                saved, shared = whole, [(start, last + 1, prefix)]
        open_runs.append((below, start, saved, shared))

    groups = [Group(prefix, order[start:end]) for start, end, prefix in shared]
    together = {row for start, end, _ in shared for row in range(start, end)}
    alone = [row for place, row in enumerate(order) if place not in together]
    return [*groups, Group(0, alone)] if alone else groups


def _common_prefix(a: Row, b: Row) -> int:
    """Tokens both rows begin with, short of the first hidden state that either needs."""
    limit = min(a.read[0], b.read[0])
    differ = np.flatnonzero(a.inputs[:limit] != b.inputs[:limit])
    return int(differ[0]) if len(differ) else int(limit)


def batches(group: Group, max_tokens: int, overhead: int, max_rows: int | None = None) -> Iterator[list[Row]]:
    """Rows of a group in batches of similar length, padded to at most `max_tokens`.

    A batch is closed before its padding costs more than `overhead` tokens: another forward pass would be cheaper.
    """
    batch: list[Row] = []
    longest = padding = 0
    # Longest first: if memory runs out, it does so on the first batch.
    for row in sorted(group.rows, key=lambda row: -len(row.inputs)):
        length = len(row.inputs) - group.prefix
        padding += longest - length
        full = (len(batch) + 1) * longest > max_tokens or len(batch) == max_rows
        if batch and (full or padding > overhead):
            yield batch
            batch = []
        if not batch:
            longest, padding = length, 0
        batch.append(row)
    if batch:
        yield batch
