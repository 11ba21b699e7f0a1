"""The rows that a run would have, without its data: how long they are, how many."""

from __future__ import annotations

import dataclasses
import math

from spt_jax.data.buckets import MULTIPLE, BucketShape
from spt_jax.planning.convai2 import CONVAI2, MEAN_LENGTHS


@dataclasses.dataclass(frozen=True)
class Workload:
    """One epoch of packed dialogues; the defaults are ConvAI2's training set.

    Attributes:
        dialogues: How many.
        turns: Turns to learn from in all of them.
        mean_length: Tokens of a row on average, padding left out.
        longest: Tokens of the longest row, which decides about memory.
        mean_targets: Target tokens of a turn on average.
        layout: ``data.layout``: ``"dialogue"``, a dialogue a row, or ``"turn"``, a turn a row.
        padding: Share of padding among the tokens of an epoch's batches.
    """

    dialogues: int = CONVAI2["dialogues"]
    turns: int = CONVAI2["turns"]
    mean_length: int = MEAN_LENGTHS["dialogue"]
    longest: int = CONVAI2["longest"]
    mean_targets: int = CONVAI2["mean_targets"]
    layout: str = "dialogue"
    padding: float = 0.04

    def shape_of(self, length: float) -> BucketShape:
        """The shape of a batch of rows of `length` tokens, which have their share of turns and targets."""
        share = self.turns / self.dialogues * length / self.mean_length
        turns = 1 if self.layout == "turn" else math.ceil(share)
        return BucketShape(_rounded(length), _rounded(turns * self.mean_targets), turns)

    @property
    def longest_shape(self) -> BucketShape:
        """Of the batch that takes the most memory."""
        return self.shape_of(self.longest)

    @property
    def mean_shape(self) -> BucketShape:
        """Of the batch that takes the mean time of a step, its padding included; no row is longer than the longest."""
        return self.shape_of(min(self.mean_length / (1 - self.padding), self.longest))

    def steps(self, rows: int) -> int:
        """Steps of an epoch in batches of `rows`."""
        return math.ceil((self.turns if self.layout == "turn" else self.dialogues) / rows)


def _rounded(tokens: float) -> int:
    return math.ceil(tokens / MULTIPLE) * MULTIPLE
