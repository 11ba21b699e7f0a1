"""Rows side by side as arrays of static shape, padding masked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spt_jax.data.buckets import BucketShape
from spt_jax.data.packing import Row
from spt_jax.data.similarity import BleuSimilarity

Batch = dict[str, np.ndarray]


def collate(rows: Sequence[Row], indices: np.ndarray, shape: BucketShape, pad_id: int) -> Batch:
    """A batch of rows in one bucket's shape.

    Args:
      rows: all rows.
      indices: [D] which of them; -1 makes an empty row.
      shape: T, S and N of the bucket.
      pad_id: fills tokens and target ids.

    Returns:
      `tokens` [D, T] int32, right padded; `lengths` [D] int32, 0 for an empty row; `context_lengths` [D, N] int32, 0
      for no turn; `turn_mask` [D, N] float32; `target_positions`, `target_ids`, `target_turns` [D, S] int32;
      `target_mask` [D, S] float32; `dialogue_ids` [D] int32, -1 for an empty row; `turn_ids` [D, N] int32, -1 for no
      turn.
    """
    d = len(indices)
    per_token, per_turn, per_target = (d, shape.length), (d, shape.turns), (d, shape.targets)
    batch: Batch = {
        "tokens": np.full(per_token, pad_id, dtype=np.int32),
        "lengths": np.zeros(d, dtype=np.int32),
        "context_lengths": np.zeros(per_turn, dtype=np.int32),
        "turn_mask": np.zeros(per_turn, dtype=np.float32),
        "target_positions": np.zeros(per_target, dtype=np.int32),
        "target_ids": np.full(per_target, pad_id, dtype=np.int32),
        "target_turns": np.zeros(per_target, dtype=np.int32),
        "target_mask": np.zeros(per_target, dtype=np.float32),
        "dialogue_ids": np.full(d, -1, dtype=np.int32),
        "turn_ids": np.full(per_turn, -1, dtype=np.int32),
    }
    for place, index in enumerate(indices):
        if index < 0:
            continue
        row = rows[index]
        tokens, turns, targets = len(row.tokens), len(row.turns), len(row.target_ids)
        batch["tokens"][place, :tokens] = row.tokens
        batch["lengths"][place] = tokens
        batch["context_lengths"][place, :turns] = row.context_lengths
        batch["turn_mask"][place, :turns] = 1
        batch["target_positions"][place, :targets] = row.target_positions
        batch["target_ids"][place, :targets] = row.target_ids
        batch["target_turns"][place, :targets] = row.target_turns
        batch["target_mask"][place, :targets] = 1
        batch["dialogue_ids"][place] = row.dialogue
        batch["turn_ids"][place, :turns] = row.turns
    return batch


def similar_pairs(similarity: BleuSimilarity, texts: np.ndarray, threshold: float) -> np.ndarray:
    """[n, n] bool: BLEU(text_i, text_j) > threshold; `texts` [n] are positions in `similarity`, -1 similar to none."""
    result = np.zeros((len(texts), len(texts)), dtype=bool)
    present = np.flatnonzero(texts >= 0)
    if len(present):
        result[np.ix_(present, present)] = similarity.matrix(texts[present]) > threshold
    return result
