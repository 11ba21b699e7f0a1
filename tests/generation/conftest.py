"""A decoder so small that a slow, obviously right loop can be run beside the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.decoder import FrozenTree, decode, embed, random_params, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass
class TinyLM:
    """A random decoder, a bank of K = 3 soft prompts of P = 4, and the reference loop."""

    config: DecoderConfig
    params: FrozenTree
    bank: jax.Array

    def logits_after(self, prompt: jax.Array, tokens: Sequence[int]) -> np.ndarray:
        """Logits ``[V]`` behind one row: no cache, no padding, no batch."""
        text = embed(self.config, self.params, jnp.asarray(tokens, jnp.int32)[None])
        embeddings = jnp.concatenate([prompt[None], text], axis=1)
        positions = jnp.arange(embeddings.shape[1])[None]
        hidden, _ = decode(self.config, self.params, embeddings, positions, jnp.ones_like(positions, bool))
        return np.asarray(vocabulary_logits(self.config, self.params, hidden[0, -1]))

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
