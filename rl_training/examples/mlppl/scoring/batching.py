"""Which tokens go through the model together: windows, shared prefixes, packs and batches. Integers only, no model."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .tokens import Encoded

ID = np.dtype(">u4")
ID_BYTES = ID.itemsize


@dataclass(frozen=True)
class Row:
    """One sequence for the model, and the scored tokens that are read off it.

    inputs: int64 [L], the ids the model is given; without the last scored token, which predicts nothing here, unless
            the model must be given the whole text
    read:   int64 [m], ascending indices in `inputs`, whose hidden states predict the scored tokens
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
    """Rows that begin with the same `prefix` tokens; 0: nothing is shared."""

    prefix: int
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """Of the prefix, once, and of all that the rows have behind it."""
        return self.prefix + sum(len(row.inputs) - self.prefix for row in self.rows)


@dataclass(frozen=True)
class Pass:
    """Groups that go through the model in one forward pass: here the rows of one, side by side behind their prefix.

    ids:  int64 [B, longest], what each row has behind the prefix, padded on the right with zeros
    read: int64 [m]: indices in `ids`, row after row, whose hidden states predict the labels of the rows, in order
    """

    groups: list[Group]
    ids: np.ndarray
    read: np.ndarray

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group.rows]

    @property
    def labels(self) -> np.ndarray:
        """int64 [m], of the rows, in order."""
        return np.concatenate([row.labels for row in self.rows])


@dataclass(frozen=True)
class Pack(Pass):
    """Groups end to end in one sequence, for a model that lets each row see nothing but its prefix and itself.

    ids:       int64 [T], per group its prefix once, then what each row has behind it
    read:      as in a `Pass`; of a shared prefix one index may be read for several rows
    positions: int64 [T], the index of each token in its own row
    spans:     (start, end, prefix_start, prefix): tokens start .. end follow on tokens prefix_start .. + prefix
    past:      tokens with which all rows begin, that went through the model before and are no part of this one
    """

    positions: np.ndarray
    spans: list[tuple[int, int, int, int]]
    past: int


def windows(encoded: Encoded, window: int | None, text: int, whole: bool = False) -> Iterator[Row]:
    """The rows that score one text: windows start every window // 2 tokens, each scores what none before it reached.

    whole: give the model also the tokens that predict nothing, for one to which a text's length matters.
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
            # hidden   t1 t2 t3 .     token i predicts ids[i + 1]; the last one predicts nothing
            positions = encoded.positions[first:last]
            yield Row(
                inputs=encoded.ids[start : end if whole else positions[-1]],
                read=positions - 1 - start,
                labels=encoded.ids[positions],
                text=text,
                first=int(first),
            )
        reached = end
        if end == total:
            return


def share_prefixes(rows: Sequence[Row], overhead: int, short: int = 0) -> list[Group]:
    """Partition the rows into groups of equal prefix where running it once saves more than `overhead` tokens.

    short: rows of at most so many tokens also share those whose hidden states are read. Of longer ones there is little
    to save (BOS, as a rule), and what stands behind a prefix cannot use the fastest attention everywhere.

    The rows are sorted by their ids, so that rows with a common prefix stand side by side. A run of neighbours shares
    the shortest of the prefixes that two of them have in common. Runs lie within longer runs with shorter prefixes.
    They are visited from the innermost out; a run becomes one group if that saves more tokens than the groups found
    within it.
    """
    order = sorted(rows, key=lambda row: sort_key(row.inputs))
    common = [_common_prefix(a, b, short) for a, b in pairwise(order)]
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
    alone = [row for index, row in enumerate(order) if index not in together]
    if not groups:
        return [Group(0, alone)] if alone else []
    # What is left may share less: the BOS token, where there are many short rows.
    return groups + share_prefixes(alone, overhead, short)


def sort_key(ids: np.ndarray) -> bytes:
    """`ID_BYTES` an id: sorts as the ids do, and begins with the key of what they begin with."""
    return ids.astype(ID).tobytes()


def _common_prefix(a: Row, b: Row, short: int) -> int:
    """Tokens both rows begin with, short of the last one, and in long rows of the first hidden state that is read."""
    least, most = sorted((len(a.inputs), len(b.inputs)))
    limit = least - 1 if most <= short else min(a.read[0], b.read[0])
    return in_common(a.inputs[:limit], b.inputs[:limit])


def in_common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(a[:least] != b[:least])
    return int(differ[0]) if len(differ) else least


def batches(group: Group, max_tokens: int, overhead: int, max_rows: int | None = None) -> Iterator[Pass]:
    """Rows of a group in batches of similar length, padded to at most `max_tokens`.

    A batch is closed before its padding costs more than `overhead` tokens: another forward pass would be cheaper.
    """
    for part in _cut(group, max_rows, max_tokens, overhead):
        ids = np.zeros((len(part.rows), len(part.rows[0].inputs) - group.prefix), dtype=np.int64)
        for row, own in zip(part.rows, ids, strict=True):
            own[: len(row.inputs) - group.prefix] = row.inputs[group.prefix :]
        read = [row.read - group.prefix + index * ids.shape[1] for index, row in enumerate(part.rows)]
        yield Pass([part], ids, np.concatenate(read))


def pasts(parts: Sequence[Group], kept: np.ndarray, least: int) -> list[tuple[np.ndarray, list[Group]]]:
    """(int64 [P], parts of groups that begin with these ids): what runs before them, once for all; nothing for those to
    which it would save fewer than `least` tokens, which come first.

    parts: groups that are run apart. kept: ids with which rows of the last call began.
    """
    # What a part has in common with others ends where it branches, or is read.
    ends = [min(part.prefix or len(part.rows[0].inputs), *(row.read[0] for row in part.rows)) for part in parts]
    ends.append(len(kept))
    texts = [*(part.rows[0].inputs for part in parts), np.append(kept, 0)]
    none = np.array([], dtype=np.int64)
    rows = [
        Row(text, np.array([end]), none, number, 0) for number, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    found: list[tuple[np.ndarray, list[Group]]] = [(none, [])]
    for group in share_prefixes(rows, least):
        some = [parts[row.text] for row in group.rows if row.text < len(parts)]
        if group.prefix < least:
            found[0][1].extend(some)
        elif some:
            found.append((some[0].rows[0].inputs[: group.prefix], some))
    return found if found[0][1] else found[1:]


def packs(
    groups: Sequence[Group], max_tokens: int, enough: int, max_rows: int | None = None, past: int = 0
) -> list[Pack]:
    """Groups laid out in packs of at most `max_tokens` tokens and `max_rows` rows; a longer row stands alone.

    A group that is too large is cut, and each part has the prefix of its own. What is not one group is put together
    up to `enough` tokens only. past: tokens with which all begin, and that are left out.
    """
    parts = cut(groups, max_tokens, max_rows, past)
    bins: list[tuple[int, int, list[Group]]] = []  # (tokens, number, parts), the emptiest first
    for tokens, part in sorted(((part.tokens - past, part) for part in parts), key=lambda one: -one[0]):
        if bins and bins[0][0] + tokens <= min(enough, max_tokens):
            held, number, together = bins[0]
            if max_rows is None or sum(len(one.rows) for one in [*together, part]) <= max_rows:
                together.append(part)
                heapq.heapreplace(bins, (held + tokens, number, together))
                continue
        heapq.heappush(bins, (tokens, len(bins), [part]))
    # Largest first: if memory runs out, it does so on the first one.
    return [lay_out(together, past) for _, _, together in sorted(bins, key=lambda one: (-one[0], one[1]))]


def cut(groups: Sequence[Group], max_tokens: int, max_rows: int | None = None, past: int = 0) -> list[Group]:
    """The groups of a pack in parts of at most `max_tokens` tokens behind the past and `max_rows` rows."""
    return [part for group in groups for part in _cut(group, max_rows if group.prefix > past else 1, max_tokens + past)]


def lay_out(groups: list[Group], past: int = 0) -> Pack:
    """past: tokens with which all begin, and that are left out."""
    ids, positions, spans, read = [], [], [], []
    end = 0
    for group in groups:
        shared, prefix = end, max(group.prefix, past)
        pieces = [(past, group.rows[0].inputs[past:prefix])] if prefix > past else []
        pieces += [(prefix, row.inputs[prefix:]) for row in group.rows]
        for before, own in pieces:
            ids.append(own)
            positions.append(np.arange(before, before + len(own)))
            spans.append((end, end + len(own), shared, before - past))
            end += len(own)
        for row, (start, *_) in zip(group.rows, spans[-len(group.rows) :], strict=True):
            read.append(np.where(row.read >= prefix, start - prefix, shared - past) + row.read)
    return Pack(groups, np.concatenate(ids), np.concatenate(read), np.concatenate(positions), spans, past)


def _cut(group: Group, max_rows: int | None, max_tokens: int, overhead: int | None = None) -> Iterator[Group]:
    """The group in parts, longest rows first: if memory runs out, it does so on the first part.

    overhead: most tokens of padding of rows side by side; None: they lie end to end behind their prefix.
    """
    part: list[Row] = []
    longest = tokens = 0
    for row in sorted(group.rows, key=lambda row: -len(row.inputs)):
        own = len(row.inputs) - group.prefix
        if overhead is None:
            full = group.prefix + tokens + own > max_tokens
        else:
            size = (len(part) + 1) * longest
            full = size > max_tokens or size - tokens - own > overhead
        if part and (full or len(part) == max_rows):
            yield Group(group.prefix, part)
            part, tokens = [], 0
        longest = longest if part else own
        part.append(row)
        tokens += own
    if part:
        yield Group(group.prefix, part)
