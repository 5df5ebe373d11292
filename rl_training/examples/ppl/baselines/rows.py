"""A data set as it comes -> rows with text and an id of their own, in windows."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..data import Columns, PromptForm, Text, make_row, message_text, refuse_unscored
from ..errors import InputError
from ..splits import reading


class Row(NamedTuple):
    number: int  # in the data set, from 0
    id: str | int
    prompt: Text
    reference: Text  # "" where the data set has none


class Window(NamedTuple):
    number: int
    rows: list[Row]
    blank: int  # rows without text before or between these
    digest: str  # of the rows' content


class Seen:
    """Ids that came by, 8 bytes each."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, dtype=np.uint64)

    def add(self, ids: Sequence[str | int]) -> list[bool]:
        """Of each id, whether it was there before."""
        hashes = [hashlib.blake2b(str(i).encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids]
        new = np.frombuffer(b"".join(hashes), dtype=np.uint64)
        distinct, first = np.unique(new, return_index=True)
        indices = np.searchsorted(self._hashes, distinct)
        known = np.append(self._hashes, 0)[indices] == distinct
        known &= indices < len(self._hashes)
        self._hashes = np.insert(self._hashes, indices[~known], distinct[~known])
        before = np.ones(len(new), dtype=bool)
        before[first[~known]] = False
        return before.tolist()


def read_rows(dataset, columns: Columns, form: PromptForm, limit: int | None, scored: str) -> Iterator[Row | None]:
    """The rows in the order of the data set, None for one without text, up to `limit` with text.

    scored: "prompt" or "reference", which of the two must have some.
    Raises `InputError` for what is no text or no id, and for an id that an `id` column has twice.
    """
    seen = Seen()
    number = kept = 0
    for batch in _batches(dataset, columns):
        rows = []
        for example in batch:
            row = make_row(example, number, columns, form)
            if scored == "reference":
                refuse_unscored(row["reference"], number)
            rows.append(Row(number, **row) if message_text(row[scored]).strip() else None)
            number += 1
        with_text = [row for row in rows if row is not None]
        if columns.id is not None:
            for row, twice in zip(with_text, seen.add([row.id for row in with_text]), strict=True):
                if twice:
                    raise InputError(
                        f"row {row.number} has the id {row.id!r}, as an earlier row has: ids must be distinct; without "
                        "such a column a hash of prompt and reference is the id"
                    )
        for row in rows:
            yield row
            kept += row is not None
            if kept == limit:
                return


def _batches(dataset, columns: Columns) -> Iterator[list[dict]]:
    names = list(dict.fromkeys(name for name in columns if name is not None))
    with reading():
        for batch in dataset.select_columns(names).iter(batch_size=1000):
            yield [dict(zip(names, values, strict=True)) for values in zip(*(batch[n] for n in names), strict=True)]


def windows(rows: Iterable[Row | None], most_rows: int, most_characters: int) -> Iterator[Window]:
    number = blank = characters = 0
    held: list[Row] = []
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row and row[1:]).encode())
        if row is None:
            blank += 1
            continue
        held.append(row)
        characters += len(message_text(row.prompt)) + len(message_text(row.reference))
        if len(held) == most_rows or characters >= most_characters:
            yield Window(number, held, blank, digest.hexdigest())
            number, held, blank, characters = number + 1, [], 0, 0
            digest = hashlib.blake2b(digest_size=8)
    if held or blank:
        yield Window(number, held, blank, digest.hexdigest())
