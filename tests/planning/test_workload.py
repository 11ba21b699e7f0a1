"""The shapes of a workload are those that its numbers describe."""

from __future__ import annotations

import pytest

from spt_jax.data.buckets import MULTIPLE
from spt_jax.planning.convai2 import CONVAI2, MEAN_LENGTHS
from spt_jax.planning.workload import Workload


def test_convai2_is_the_default():
    assert Workload() == Workload(**CONVAI2, mean_length=MEAN_LENGTHS["dialogue"], layout="dialogue")


def test_a_longer_row_has_its_share_of_turns_and_targets_in_multiples():
    work = Workload(dialogues=100, turns=800, mean_length=200, longest=395, mean_targets=14, padding=0.0)
    assert work.mean_shape == work.shape_of(200)
    assert (work.mean_shape.turns, work.longest_shape.turns) == (8, 16)
    for shape in (work.mean_shape, work.longest_shape):
        assert shape.length % MULTIPLE == 0 and shape.targets % MULTIPLE == 0
        assert 0 <= shape.targets - 14 * shape.turns < MULTIPLE
    assert 0 <= work.longest_shape.length - 395 < MULTIPLE


@pytest.mark.parametrize(("rows", "steps"), [(8, 13), (100, 1), (101, 1), (1, 100)])
def test_an_epoch_takes_every_row_once(rows, steps):
    assert Workload(dialogues=100).steps(rows) == steps


def test_padding_makes_rows_longer():
    assert Workload(padding=0.5).mean_shape.length == Workload(padding=0.0, mean_length=540).mean_shape.length


def test_a_turn_a_row_makes_more_rows_of_one_turn():
    work = Workload(dialogues=100, turns=800, mean_length=150, longest=400, mean_targets=14, layout="turn")
    assert work.mean_shape.turns == work.longest_shape.turns == 1
    assert work.longest_shape.targets == work.shape_of(10).targets == 16
    assert work.steps(8) == 100


def test_with_its_padding_the_mean_row_is_no_longer_than_the_longest():
    work = Workload(mean_length=120, longest=120, padding=0.2)
    assert work.mean_shape == work.longest_shape
