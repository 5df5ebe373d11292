"""Windows, shared prefixes and batches: integers only, no model."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlppl.scoring.batching import Group, Row, batches, cut, packs, pasts, share_prefixes, windows
from mlppl.scoring.tokens import Encoded


def encoded(total, context=1):
    """`total` tokens 100, 101, ..., all behind the first `context` scored."""
    positions = np.arange(context, total)
    return Encoded(ids=np.arange(total) + 100, positions=positions, chars=positions)


def spans(total, window, context=1):
    """[(first input, last input + 1, first label, last label + 1)] of the windows, as places in the text."""
    return [
        (row.inputs[0] - 100, row.inputs[-1] - 99, row.labels[0] - 100, row.labels[-1] - 99)
        for row in windows(encoded(total, context), window, 0)
    ]


def row(*inputs, read=None):
    """A row that reads `read` (its last place, if None)."""
    read = [len(inputs) - 1] if read is None else read
    return Row(np.array(inputs), np.array(read), np.zeros(len(read), dtype=np.int64), text=0, first=0)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_a_text_that_fits_is_one_row_without_its_last_token():
    assert spans(8, None) == spans(8, 8) == [(0, 7, 1, 8)]


def test_windows_start_every_half_window_and_score_what_none_before_reached():
    # 0..8, 4..12, 8..14: the second scores 8..12, the third 12 and 13
    assert spans(14, 8) == [(0, 7, 1, 8), (4, 11, 8, 12), (8, 13, 12, 14)]


def test_an_odd_window_starts_every_half_rounded_down():
    # 0..5, 2..7, 4..9
    assert spans(9, 5) == [(0, 4, 1, 5), (2, 6, 5, 7), (4, 8, 7, 9)]


def test_windows_within_the_context_are_not_run():
    # 0..8 and 4..12 hold no scored token, 8..16 holds 13, 14 and 15
    assert spans(16, 8, context=13) == [(8, 15, 13, 16)]


def test_a_row_ends_before_its_last_scored_token():
    one = Encoded(ids=np.arange(6), positions=np.array([2, 3]), chars=np.array([0, 1]))
    [only] = windows(one, None, text=7)
    assert (only.inputs.tolist(), only.read.tolist(), only.labels.tolist()) == ([0, 1, 2], [1, 2], [2, 3])
    assert (only.text, only.first) == (7, 0)


def test_a_text_without_a_scored_token_has_no_row():
    assert spans(1, 8) == spans(0, 8) == spans(0, None) == []


@given(st.integers(1, 60), st.none() | st.integers(2, 20), st.data())
def test_every_token_is_scored_once_from_all_its_window_holds(total, window, data):
    positions = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    positions = positions[positions > 0]
    text = Encoded(ids=np.arange(total) + 100, positions=positions, chars=positions)
    rows = list(windows(text, window, 0))
    assert [label - 100 for one in rows for label in one.labels] == positions.tolist()
    assert [one.first for one in rows] == np.cumsum([0, *(len(one.labels) for one in rows)])[:-1].tolist()
    for one in rows:
        assert (one.inputs[one.read] + 1 == one.labels).all()
        assert len(one.inputs) < (window or total + 1)  # the last label is in the window too
        start = one.inputs[0] - 100
        assert start == 0 or all(one.read >= window - window // 2 - 1)


# --- shared prefixes -------------------------------------------------------------------------------------------------


def test_rows_with_a_common_prefix_share_it_where_that_saves_more_than_its_cost():
    rows = [row(1, 2, 3, 4, 5), row(1, 2, 3, 4, 6), row(1, 2, 3, 4, 7)]
    # the prefix of 4 is run once instead of three times: 8 tokens saved
    assert [group.prefix for group in share_prefixes(rows, overhead=7)] == [4]
    assert [group.prefix for group in share_prefixes(rows, overhead=8)] == [0]


def test_a_prefix_ends_where_a_hidden_state_is_read():
    rows = [row(1, 2, 3, 4, 5, read=[2, 4]), row(1, 2, 3, 4, 6, read=[3, 4])]
    assert [group.prefix for group in share_prefixes(rows, overhead=1)] == [2]


def test_short_rows_share_also_what_is_read():
    """As units alone do, which all begin with BOS and are scored from their first token on."""
    rows = [row(1, 2, 3, 4, read=[0, 1, 2, 3]), row(1, 2, 3, 5, read=[0, 1, 2, 3]), row(1, 2, 3, read=[0, 2])]
    assert [group.prefix for group in share_prefixes(rows, overhead=1, short=3)] == [0]
    [group] = share_prefixes(rows, overhead=1, short=4)
    assert group.prefix == 2  # the last of the third row is its own
    [pack] = packs([group], 100, 100)
    assert [id(one) for one in pack.rows] == [id(one) for one in rows]
    assert pack.ids.tolist() == [1, 2, 3, 4, 3, 5, 3]
    assert pack.read.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 0, 6]


def test_equal_rows_share_all_but_what_is_read():
    assert [group.prefix for group in share_prefixes([row(1, 2, 3), row(1, 2, 3)], overhead=1)] == [2]


def test_the_larger_saving_decides_between_a_long_prefix_of_few_and_a_short_one_of_many():
    a, b = [row(1, 2, 3, 4, 5, 6, n) for n in (10, 11)], [row(1, 2, 7, 8, 9, 9, n) for n in (20, 21)]
    # two pairs with a prefix of 6: 2 x (6 - 3) = 6 saved; all four with a prefix of 2: 3 x 2 - 3 = 3
    assert sorted(group.prefix for group in share_prefixes([*a, *b], overhead=3)) == [6, 6]
    # with overhead 5: two pairs 2 x (6 - 5) = 2; all four 3 x 2 - 5 = 1
    assert sorted(group.prefix for group in share_prefixes([*a, *b], overhead=5)) == [6, 6]
    # five rows of prefix 2 and no longer one: 4 x 2 - 3 = 5
    many = [row(1, 2, n) for n in range(5)]
    assert [group.prefix for group in share_prefixes(many, overhead=3)] == [2]


def _best_saving(rows, overhead):
    """Most tokens that prefixes of runs of neighbours in lexicographic order can save."""
    order = sorted(rows, key=lambda one: one.inputs.tolist())
    best = [0]
    for end in range(1, len(order) + 1):
        choices = [best[-1]]
        for start in range(end - 1):
            run = order[start:end]
            prefix = min(one.read[0] for one in run)
            while any((one.inputs[:prefix] != run[0].inputs[:prefix]).any() for one in run):
                prefix -= 1
            choices.append(best[start] + prefix * (len(run) - 1) - overhead)
        best.append(max(choices))
    return best[-1]


rows_strategy = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8).map(lambda ids: row(*ids)), max_size=8)


@st.composite
def reading_rows(draw):
    """Rows that read some of their hidden states, the last one among them."""
    rows = draw(rows_strategy)
    masks = [draw(st.lists(st.booleans(), min_size=len(one.inputs), max_size=len(one.inputs))) for one in rows]
    return [row(*one.inputs, read=np.flatnonzero([*mask[:-1], True])) for one, mask in zip(rows, masks, strict=True)]


@settings(max_examples=200)
@given(rows_strategy, st.integers(0, 6))
def test_sharing_is_a_partition_with_true_prefixes_that_saves_the_most(rows, overhead):
    groups = share_prefixes(rows, overhead)
    assert sorted(map(id, rows)) == sorted(id(one) for group in groups for one in group.rows)
    for group in groups:
        for one in group.rows:
            assert (one.inputs[: group.prefix] == group.rows[0].inputs[: group.prefix]).all()
            assert group.prefix <= one.read[0]
    saved = sum(group.prefix * (len(group.rows) - 1) - overhead for group in groups if group.prefix)
    assert saved == _best_saving(rows, overhead)


# --- batches ---------------------------------------------------------------------------------------------------------


def lengths(group, *args):
    return [[len(one.inputs) for one in batch.rows] for batch in batches(group, *args)]


def of_lengths(*sizes):
    return Group(0, [row(*range(size)) for size in sizes])


def test_longest_first():
    assert lengths(of_lengths(2, 4, 3), 100, 100) == [[4, 3, 2]]


def test_a_batch_is_padded_to_at_most_max_tokens():
    assert lengths(of_lengths(4, 4, 4, 4, 4), 8, 100) == [[4, 4], [4, 4], [4]]


def test_a_row_longer_than_max_tokens_stands_alone():
    assert lengths(of_lengths(9, 2, 2), 4, 100) == [[9], [2, 2]]


def test_a_batch_has_at_most_max_rows():
    assert lengths(of_lengths(1, 1, 1), 100, 100, 2) == [[1, 1], [1]]


def test_a_batch_is_closed_before_its_padding_costs_more_than_a_forward_pass():
    assert lengths(of_lengths(10, 9, 8, 2), 100, 3) == [[10, 9, 8], [2]]  # padding 0 + 1 + 2 = 3, the fourth adds 8
    assert lengths(of_lengths(10, 9, 8, 2), 100, 2) == [[10, 9], [8], [2]]


def test_a_shared_prefix_does_not_count():
    group = Group(4, [row(1, 1, 1, 1, 1, 1), row(1, 1, 1, 1, 2, 2)])
    assert lengths(group, 4, 100) == [[6, 6]]
    assert lengths(group, 3, 100) == [[6], [6]]


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 80), st.integers(0, 40), st.none() | st.integers(1, 5))
def test_every_row_is_in_one_batch_within_all_limits(sizes, max_tokens, overhead, max_rows):
    found = lengths(of_lengths(*sizes), max_tokens, overhead, max_rows)
    assert [size for batch in found for size in batch] == sorted(sizes, reverse=True)
    for batch in found:
        assert len(batch) == 1 or len(batch) * batch[0] <= max_tokens
        assert len(batch) <= (max_rows or len(sizes))
        assert sum(batch[0] - size for size in batch) <= overhead


def test_a_padded_batch_and_the_places_that_are_read():
    [batch] = batches(Group(1, [row(1, 2, 3, 4, read=[2, 3]), row(1, 2, 9)]), 100, 100)
    assert batch.ids.tolist() == [[2, 3, 4], [2, 9, 0]]
    assert batch.ids.ravel()[batch.read].tolist() == [3, 4, 9]
    assert [one.tolist() for one in np.unravel_index(batch.read, batch.ids.shape)] == [[0, 0, 1], [1, 2, 1]]


# --- packs -----------------------------------------------------------------------------------------------------------


def test_rows_lie_end_to_end_behind_the_prefix_they_share():
    a, b, c = row(1, 2, 3, 4, read=[2, 3]), row(1, 2, 5), row(7, 8, read=[0, 1])
    [pack] = packs([Group(2, [a, b]), Group(0, [c])], 100, 100)
    assert pack.ids.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert pack.spans == [(0, 2, 0, 0), (2, 4, 0, 2), (4, 5, 0, 2), (5, 7, 5, 0)]
    assert pack.read.tolist() == [2, 3, 4, 5, 6]
    assert pack.rows == [a, b, c]


def test_what_all_begin_with_is_no_part_of_a_pack():
    a, b, c = row(1, 2, 3, 4, read=[3]), row(1, 2, 3, 5), row(1, 2, 8, 9, read=[2, 3])
    [pack] = packs([Group(3, [a, b]), Group(0, [c])], 100, 100, past=2)
    assert pack.ids.tolist() == [3, 4, 5, 8, 9]
    assert pack.positions.tolist() == [2, 3, 3, 2, 3]
    assert pack.spans == [(0, 1, 0, 0), (1, 2, 0, 1), (2, 3, 0, 1), (3, 5, 3, 0)]
    assert pack.read.tolist() == [1, 2, 3, 4]
    assert (pack.past, pack.rows) == (2, [a, b, c])


def test_what_groups_begin_with_runs_before_them():
    one, two = (
        Group(4, [row(1, 2, 3, 4, 5), row(1, 2, 3, 4, 6)]),
        Group(5, [row(1, 2, 3, 7, 8, 9), row(1, 2, 3, 7, 8, 2)]),
    )
    alone, nothing = Group(0, [row(1, 2, 3, 6, read=[2, 3])]), np.array([], dtype=np.int64)

    def found(*parts, kept=nothing, least=2):
        return [(ids.tolist(), parts) for ids, parts in pasts(parts, kept, least)]

    assert found(one, two) == [([1, 2, 3], [one, two])]
    assert found(one, two, least=3) == [([], [one, two])]
    assert found(one) == [([], [one])]
    assert found(one, kept=np.array([1, 2, 3, 9])) == [([1, 2, 3], [one])]
    assert found(one, alone) == [([], [one, alone])]  # two tokens, of which each saves no more than one that it costs
    assert found(one, alone, least=1) == [([1, 2], [one, alone])]
    assert found(one, kept=np.array([5, 6, 7])) == [([], [one])]


@settings(max_examples=200)
@given(reading_rows(), st.integers(1, 6), st.integers(1, 8), st.lists(st.integers(0, 1), max_size=8))
def test_every_part_begins_with_what_runs_before_it_and_reads_nothing_of_that(rows, least, max_tokens, kept):
    parts = cut(share_prefixes(rows, 1), max_tokens)
    found = pasts(parts, np.array(kept, dtype=np.int64), least)
    assert sorted(map(id, parts)) == sorted(id(part) for _, some in found for part in some)
    for ids, some in found:
        assert len(ids) >= least or not len(ids)
        assert all(
            (one.inputs[: len(ids)] == ids).all() and one.read[0] >= len(ids) for part in some for one in part.rows
        )


def pack_sizes(sizes, *limits):
    group = Group(0, [row(*range(size)) for size in sizes])
    return [len(pack.ids) for pack in packs([group], limits[0], *limits)]


def test_a_pack_holds_at_most_max_tokens_and_the_largest_comes_first():
    assert pack_sizes([4, 4, 4, 4, 4], 8) == [8, 8, 4]
    assert pack_sizes([2, 9, 2], 4) == [9, 4]
    assert pack_sizes([1, 1, 1], 100, 2) == [2, 1]


def test_a_group_that_is_too_large_is_cut_and_has_its_prefix_again():
    rows = [row(1, 2, 3, n) for n in range(5)]
    found = packs([Group(3, rows)], 5, 5)
    assert [pack.ids.tolist() for pack in found] == [[1, 2, 3, 0, 1], [1, 2, 3, 2, 3], [1, 2, 3, 4]]


def test_only_a_group_fills_more_than_enough():
    rows, others = [row(1, 2, 3, n) for n in range(5)], [row(9, n) for n in range(4)]
    found = packs([Group(3, rows), Group(0, others)], 8, 4)
    assert [len(pack.ids) for pack in found] == [8, 4, 4]


@settings(max_examples=200)
@given(
    reading_rows(), st.integers(0, 6), st.integers(0, 8), st.integers(1, 20), st.integers(1, 20),
    st.none() | st.integers(1, 3),
)  # fmt: skip
def test_every_row_is_in_one_pack_as_it_is(rows, overhead, short, max_tokens, enough, max_rows):
    found = packs(share_prefixes(rows, overhead, short), max_tokens, enough, max_rows)
    assert sorted(map(id, rows)) == sorted(id(one) for pack in found for one in pack.rows)
    for pack in found:
        assert len(pack.rows) == 1 or len(pack.ids) <= max_tokens
        assert len(pack.rows) <= (max_rows or len(rows))
        ends = iter(pack.spans)
        read = iter(pack.read.tolist())
        for one in pack.rows:
            start, end, prefix_start, prefix = next(
                span for span in ends if span[3] or not any(other[3] and other[2] == span[0] for other in pack.spans)
            )
            seen = [*range(prefix_start, prefix_start + prefix), *range(start, end)]
            assert pack.ids[seen].tolist() == one.inputs.tolist()
            assert pack.positions[seen].tolist() == list(range(len(one.inputs)))
            assert [seen.index(next(read)) for _ in one.read] == one.read.tolist()
