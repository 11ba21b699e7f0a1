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


def training_contexts(rows: Sequence[Row], indices: np.ndarray, width: int, pad_id: int) -> Batch:
    """What the authors' retriever reads in training: whole rows, response included, padded on the right to the limit.

    Args:
      rows: rows of `spt_jax.data.official`.
      indices: [D] which of them; -1 makes an empty row.
      width: R, the limit of a row in tokens.
      pad_id: fills the rows, and is averaged like any other token.

    Returns:
      `retriever_tokens` [D, R] and `retriever_widths` [D], R or 0 for an empty row; both int32.
    """
    tokens = np.full((len(indices), width), pad_id, dtype=np.int32)
    for place, index in enumerate(indices):
        if index >= 0:
            tokens[place, : len(rows[index])] = rows[index].tokens
    return {"retriever_tokens": tokens, "retriever_widths": np.where(indices >= 0, width, 0).astype(np.int32)}


def inference_contexts(prompts: Sequence[Sequence[int] | np.ndarray | None], pad_id: int, multiple: int = 64) -> Batch:
    """What the authors' retriever reads at test time: inference prompts padded on the left to the batch's longest.

    Args:
      prompts: D rows of token ids; None makes an empty row.
      pad_id: fills the rows, and is averaged like any other token.
      multiple: R is rounded up to it, so that few shapes are compiled; what is beyond the longest is not averaged.

    Returns:
      `retriever_tokens` [D, R] and `retriever_widths` [D], the longest prompt's length or 0 for an empty row; int32.
    """
    longest = max(len(prompt) for prompt in prompts if prompt is not None)
    tokens = np.full((len(prompts), -(-longest // multiple) * multiple), pad_id, dtype=np.int32)
    widths = np.zeros(len(prompts), dtype=np.int32)
    for place, prompt in enumerate(prompts):
        if prompt is not None:
            tokens[place, longest - len(prompt) : longest] = prompt
            widths[place] = longest
    return {"retriever_tokens": tokens, "retriever_widths": widths}


def similar_pairs(similarity: BleuSimilarity, texts: np.ndarray, threshold: float) -> np.ndarray:
    """[n, n] bool: BLEU(text_i, text_j) > threshold; `texts` [n] are positions in `similarity`, -1 similar to none."""
    result = np.zeros((len(texts), len(texts)), dtype=bool)
    present = np.flatnonzero(texts >= 0)
    if len(present):
        result[np.ix_(present, present)] = similarity.matrix(texts[present]) > threshold
    return result
