"""A batch of dialogues with ConvAI2's counts, for programs that read no data."""

from __future__ import annotations

import math

import numpy as np


def draw_batch(rows: int, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of dialogues with ConvAI2's counts and random tokens."""
    rng = np.random.default_rng(seed)
    turns = np.clip(rng.normal(7.8, 0.6, rows).round().astype(int), 6, 10)
    lengths = np.clip(rng.normal(270, 35, rows).round().astype(int), 180, 400)
    width, slots = math.ceil(lengths.max() / 32) * 32, int(turns.max())
    reply = 14
    targets = math.ceil(slots * reply / 16) * 16
    batch = {
        "tokens": rng.integers(3, vocab_size, (rows, width)).astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "context_lengths": np.zeros((rows, slots), np.int32),
        "turn_mask": np.zeros((rows, slots), np.float32),
        "target_positions": np.zeros((rows, targets), np.int32),
        "target_ids": rng.integers(3, vocab_size, (rows, targets)).astype(np.int32),
        "target_turns": np.zeros((rows, targets), np.int32),
        "target_mask": np.zeros((rows, targets), np.float32),
        "dialogue_ids": np.arange(rows, dtype=np.int32),
        "turn_ids": np.zeros((rows, slots), np.int32),
    }
    for row in range(rows):
        ends = np.linspace(60, lengths[row], turns[row]).astype(int)
        for turn, end in enumerate(ends):
            batch["context_lengths"][row, turn] = end - reply
            batch["turn_mask"][row, turn] = 1
            here = slice(turn * reply, (turn + 1) * reply)
            batch["target_positions"][row, here] = np.arange(end - reply - 1, end - 1)
            batch["target_turns"][row, here] = turn
            batch["target_mask"][row, here] = 1
    batch["similar"] = np.zeros((rows * slots, rows * slots), bool)
    return batch
