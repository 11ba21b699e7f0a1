from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.data import Row, choose_buckets, pack
from spt_jax.data.buckets import best_bounds, buckets_of_lengths
from spt_jax.errors import UserError


def row_of(length: int, targets: int = 3, turns: int = 1) -> Row:
    zeros = np.zeros(targets, dtype=np.int32)
    return Row(
        tokens=np.arange(length, dtype=np.int32),
        context_lengths=np.ones(turns, dtype=np.int32),
        target_positions=zeros,
        target_ids=zeros,
        target_turns=zeros,
        dialogue=0,
        turns=np.arange(turns, dtype=np.int32),
    )


ROWS = st.lists(st.builds(row_of, st.integers(1, 200), st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=40)


@given(st.lists(st.integers(1, 9).map(lambda n: 8 * n), min_size=1, max_size=12), st.integers(1, 4))
def test_bounds_waste_least_among_all_choices(lengths, most):
    values = np.unique(lengths)

    def waste(bounds) -> int:
        return sum(min(bound for bound in bounds if bound >= length) - length for length in lengths)

    found = best_bounds(np.asarray(lengths), most)
    assert [len(bounds) for bounds in found] == list(range(1, min(most, len(values)) + 1))
    for bounds in found:
        choices = itertools.combinations(values[:-1], len(bounds) - 1)
        assert waste(bounds) == min(waste([*choice, values[-1]]) for choice in choices)


@given(ROWS, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_every_row_is_dealt_once_to_a_batch_that_holds_it(rows, batch_size, max_buckets, seed):
    buckets = choose_buckets(rows, batch_size, max_buckets)
    assert len(buckets.shapes) <= max_buckets
    plain = buckets.deal(batch_size, None)
    shuffled = buckets.deal(batch_size, np.random.default_rng(seed))
    for batches in (plain, shuffled):
        dealt = np.concatenate([indices for _, indices in batches])
        assert sorted(dealt[dealt >= 0]) == list(range(len(rows)))
        assert (dealt < 0).sum() < batch_size
        for bucket, indices in batches:
            shape = buckets.shapes[bucket]
            assert len(indices) == batch_size and shape.length % 8 == shape.targets % 8 == 0
            for row in (rows[i] for i in indices if i >= 0):
                assert len(row) <= shape.length
                assert len(row.target_ids) <= shape.targets and len(row.turns) <= shape.turns
    assert sorted(b for b, _ in plain) == sorted(b for b, _ in shuffled)
    slots = sum(batch_size * buckets.shapes[bucket].length for bucket, _ in plain)
    assert buckets.padding_share == pytest.approx(1 - sum(map(len, rows)) / slots)


def test_no_further_bucket_where_padding_is_small_enough():
    even = [row_of(length) for length in [30, 31, 32] * 8]
    assert len(choose_buckets(even, 8, 4).shapes) == 1
    two = [row_of(length) for length in [31] * 8 + [159] * 8]
    assert [shape.length for shape in choose_buckets(two, 8, 4).shapes] == [32, 160]


@pytest.mark.parametrize(("repetitions", "buckets"), [(1, 1), (59, 1), (61, 2)])
def test_a_further_bucket_must_save_eight_batches_an_epoch(repetitions, buckets):
    # Of two batches, one of rows of 56 tokens and one of 64, the one bucket pads a sixteenth, so the second saves a
    # fifteenth of the epoch's batches without padding: eight of 120.
    rows = [row_of(length) for length in ([56] * 8 + [64] * 8) * repetitions]
    found = choose_buckets(rows, 8, 4)
    assert len(found.shapes) == buckets
    assert found.padding_share == pytest.approx(0 if buckets == 2 else 1 / 16)


def test_rows_go_into_the_shortest_of_given_buckets_and_none_is_made_for_no_row():
    rows = [row_of(length) for length in (30, 17, 60, 56)]
    found = buckets_of_lengths(rows, [16, 32, 56, 64, 128], 2)
    assert [shape.length for shape in found.shapes] == [32, 56, 64]
    assert [members.tolist() for members in found.members] == [[1, 0], [3], [2]]
    with pytest.raises(UserError, match="60 tokens is longer than the longest bucket, 56"):
        buckets_of_lengths(rows, [16, 56], 2)
    with pytest.raises(UserError, match="longer than the longest bucket, 0"):
        buckets_of_lengths(rows, [], 2)
    with pytest.raises(UserError, match="no rows"):
        buckets_of_lengths([], [16], 2)


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="no rows"):
        choose_buckets([], 1, 1)
    with pytest.raises(UserError, match=r"data\.batch is 0"):
        choose_buckets([row_of(3)], 0, 1)
    with pytest.raises(UserError, match="max_buckets 0"):
        choose_buckets([row_of(3)], 1, 0)


@pytest.mark.first_python
def test_padding_of_the_real_training_file_is_below_a_tenth_in_both_layouts(train_rows, train_set, opt_encoder):
    turns = pack(train_set.dialogues, opt_encoder, layout="turn", max_length=512).rows
    for layout, rows in (("dialogue", train_rows), ("turn", turns)):
        for batch_size in (2, 8, 16):
            buckets = choose_buckets(rows, batch_size, 12)
            print(f"{layout}, batch {batch_size}: {buckets.padding_share:.1%} in {len(buckets.shapes)} buckets")
            assert buckets.padding_share < 0.1
