"""Length buckets: few row lengths T that waste little padding, since every one of them is a compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.data.packing import Row
from spt_jax.errors import UserError

MULTIPLE = 8
MOST_PADDING = 0.1
"""The share of padding above which a further bucket is always taken."""
WORTH = 8
"""Batches an epoch that a further bucket must save where padding is below that: what its compilation may cost.

On two CPU cores a compilation takes about as long as two steps, on an H100 as a hundred, once for all epochs and all
later runs that share a compilation cache.
"""


@dataclass(frozen=True)
class BucketShape:
    """Static sizes of one bucket's batches: T tokens and S targets (multiples of 8) and N turns a row."""

    length: int
    targets: int
    turns: int


@dataclass(frozen=True)
class Buckets:
    """The chosen buckets, shortest first, and where every row goes.

    Attributes:
      shapes: one a bucket.
      members: [bucket] row indices whose shortest fitting bucket it is, shortest rows first.
      padding_share: padding tokens / tokens of all batches of an epoch, rows that only fill a batch included.
    """

    shapes: tuple[BucketShape, ...]
    members: tuple[np.ndarray, ...]
    padding_share: float

    def deal(self, batch_size: int, generator: np.random.Generator | None) -> list[tuple[int, np.ndarray]]:
        """Deals every row to exactly one batch.

        Rows that do not fill a batch of their bucket move up to the next longer one; the longest bucket's last batch is
        filled with -1. The number of batches does not depend on the generator.

        Args:
          batch_size: D, rows of a batch.
          generator: shuffles rows within buckets and the order of batches; None keeps rows by length.

        Returns:
          (bucket, [D] row indices) for every batch.
        """
        batches = []
        carried = np.empty(0, dtype=np.int64)
        for bucket, members in enumerate(self.members):
            rows = np.concatenate([carried, members])
            if generator is not None:
                rows = generator.permutation(rows)
            full = len(rows) - len(rows) % batch_size
            batches += [(bucket, rows[i : i + batch_size]) for i in range(0, full, batch_size)]
            carried = rows[full:]
        if len(carried):
            filler = np.full(batch_size - len(carried), -1, dtype=np.int64)
            batches.append((len(self.members) - 1, np.concatenate([carried, filler])))
        if generator is not None:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        return batches


def choose_buckets(rows: Sequence[Row], batch_size: int, max_buckets: int) -> Buckets:
    """Chooses as many buckets as pay: padding below 10 % where that can be, and further ones that save batches.

    For each number of buckets, a dynamic programme over multiples of 8 finds the lengths with the fewest padded
    tokens; they are then counted on the batches themselves, rows moved up and filling rows included. Among the numbers
    of buckets with a padding share below `MOST_PADDING` that with the fewest batches an epoch (of mean length, in
    tokens) is taken, each bucket counted as `WORTH` batches; where there is none, that with the least padding.

    Args:
      rows: all rows of an epoch.
      batch_size: D, rows of a batch.
      max_buckets: at most so many.

    Raises:
      UserError: no rows, or a number below 1.
    """
    _check_rows(rows)
    if batch_size < 1 or max_buckets < 1:
        raise UserError(f"data.batch is {batch_size} and data.max_buckets {max_buckets}; both must be at least 1.")
    lengths = np.asarray([len(row) for row in rows])
    candidates = [
        buckets_of_lengths(rows, bounds, batch_size) for bounds in best_bounds(_round_up(lengths), max_buckets)
    ]
    below = [buckets for buckets in candidates if buckets.padding_share < MOST_PADDING]
    if not below:
        return min(candidates, key=lambda buckets: (buckets.padding_share, len(buckets.shapes)))
    batches = len(rows) / batch_size
    # A batch without padding is the unit, so an epoch costs batches / (1 - padding share).
    return min(below, key=lambda buckets: batches / (1 - buckets.padding_share) + WORTH * len(buckets.shapes))


def buckets_of_lengths(rows: Sequence[Row], bounds: Sequence[int], batch_size: int) -> Buckets:
    """Buckets of given lengths.

    Args:
      rows: all rows of an epoch.
      bounds: T of the buckets, ascending; those that only padding would need are left out.
      batch_size: D, rows of a batch.

    Raises:
      UserError: No rows, or a row is longer than the last bucket.
    """
    _check_rows(rows)
    lengths = np.asarray([len(row) for row in rows])
    shortest, longest = int(lengths.min()), int(lengths.max())
    if longest > max(bounds, default=0):
        raise UserError(f"A row of {longest} tokens is longer than the longest bucket, {max(bounds, default=0)}.")
    bounds = [int(bounds[i]) for i in range(np.searchsorted(bounds, shortest), np.searchsorted(bounds, longest) + 1)]
    targets = np.asarray([len(row.target_ids) for row in rows])
    turns = np.asarray([len(row.turns) for row in rows])
    order = np.argsort(lengths, kind="stable")
    ends = np.searchsorted(lengths[order], bounds, side="right")
    # Shorter rows may move up, so a shape must hold every row up to its length.
    shapes = tuple(
        BucketShape(bound, int(_round_up(targets[order[:end]].max())), int(turns[order[:end]].max()))
        for bound, end in zip(bounds, ends, strict=True)
    )
    buckets = Buckets(shapes, tuple(np.split(order, ends[:-1])), 0.0)
    slots = sum(batch_size * bounds[bucket] for bucket, _ in buckets.deal(batch_size, None))
    return Buckets(shapes, buckets.members, 1 - float(lengths.sum()) / slots)


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise UserError("There are no rows to batch: the dialogues have no turn to learn from or to score.")


def _round_up(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // MULTIPLE) * MULTIPLE


def best_bounds(rounded: np.ndarray, max_buckets: int) -> list[list[int]]:
    """For 1, 2, … `max_buckets`: the bucket lengths, ascending, with the least sum of row lengths after padding.

    Args:
      rounded: the rows' lengths, each of which may be a bucket's.
      max_buckets: at most so many.

    Lengths that no row has need no bucket, so the programme runs over the distinct rounded lengths alone.
    """
    values, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    size = len(values)
    # cost[j]: least padded tokens of the rows in values[:j] with the buckets so far, the last of length values[j-1].
    cost = np.concatenate([[0.0], np.full(size, np.inf)])
    choices: list[np.ndarray] = []
    result = []
    for _ in range(min(max_buckets, size)):
        options = cost[:, None] + values[None, :] * (before[None, 1:] - before[:, None])
        options[np.arange(size + 1)[:, None] > np.arange(size)[None, :]] = np.inf
        choices.append(np.argmin(options, axis=0))
        cost = np.concatenate([[np.inf], options.min(axis=0)])
        bounds, end = [], size
        for choice in reversed(choices):
            bounds.append(int(values[end - 1]))
            end = int(choice[end - 1])
        result.append(bounds[::-1])
    return result
