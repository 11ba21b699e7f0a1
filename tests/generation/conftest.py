"""A decoder so small that a slow, obviously right loop can be run beside the engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import random_params

WIDTH = 48


@functools.partial(jax.jit, static_argnames="config")
def _full_forward(config: DecoderConfig, params: FrozenTree, prompt: jax.Array, tokens: jax.Array, length: int):
    embeddings = jnp.concatenate([prompt, embed(config, params, tokens)])[None]
    positions = jnp.arange(embeddings.shape[1])[None]
    hidden, _ = decode(config, params, embeddings, positions, positions < len(prompt) + length)
    return vocabulary_logits(config, params, hidden[0, len(prompt) + length - 1])


@dataclasses.dataclass
class TinyLM:
    """A random decoder, a bank of K = 3 soft prompts of P = 4, and the reference loop."""

    config: DecoderConfig
    params: FrozenTree
    bank: jax.Array

    def logits_after(self, prompt: jax.Array, tokens: Sequence[int]) -> np.ndarray:
        """Logits ``[V]`` behind one row: no cache, no batch; the row is filled to one length so as to compile once."""
        filled = np.zeros(WIDTH, np.int32)
        filled[: len(tokens)] = tokens
        return np.asarray(_full_forward(self.config, self.params, prompt, filled, len(tokens)))

    def reference(self, prompt: jax.Array, context: Sequence[int], count: int) -> tuple[list[int], float]:
        """`count` greedy tokens by a full forward each, and the smallest margin between the best two logits."""
        tokens, margin = list(context), float("inf")
        for _ in range(count):
            logits = self.logits_after(prompt, tokens)
            best = np.sort(logits)[-2:]
            margin = min(margin, float(best[1] - best[0]))
            tokens.append(int(logits.argmax()))
        return tokens[len(context) :], margin


def sharpened(params: FrozenTree) -> FrozenTree:
    """Weights at ten times the usual spread at both ends, so that prompts matter and greedy choices are clear."""
    return {**params, "embed_tokens": params["embed_tokens"] * 10, "lm_head": params["lm_head"] * 50}


@pytest.fixture(scope="session")
def tiny() -> TinyLM:
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=96,
    )
    params = sharpened(random_params(config, jax.random.key(0)))
    return TinyLM(config, params, jax.random.normal(jax.random.key(1), (3, 4, 16)))


@pytest.fixture(scope="session")
def contexts() -> list[list[int]]:
    """Nine contexts of unequal lengths, the shortest one token."""
    generator = np.random.default_rng(5)
    return [generator.integers(0, 61, length).tolist() for length in (7, 1, 20, 13, 8, 33, 2, 16, 9)]


@pytest.fixture(scope="session")
def selected() -> list[int]:
    return [0, 1, 2, 2, 1, 0, 0, 2, 1]
