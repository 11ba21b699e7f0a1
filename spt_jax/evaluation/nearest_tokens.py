"""What a soft prompt's virtual tokens lie near in the vocabulary."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.models.decoder import FrozenTree, embed
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.parallel.distributed import on_host

_CHUNK = 4096  # tokens embedded at once: the table of a large LM, M wide and in float32, is gigabytes


class NearestTokens(NamedTuple):
    """The nearest of V tokens.

    Attributes:
        ids: int32 ``[K, P, n]``, the nearest first.
        cosines: float32 ``[K, P, n]``.
    """

    ids: np.ndarray
    cosines: np.ndarray


def nearest_tokens(
    config: DecoderConfig, params: FrozenTree, prompts: jax.Array, count: int = 5, vocab_size: int | None = None
) -> NearestTokens:
    """The tokens whose embeddings have the highest cosine with each virtual token.

    A virtual token need not mean what its neighbours mean (arXiv 2112.08348): read them as a hint.

    Args:
        config: The decoder.
        params: The frozen tree.
        prompts: The bank ``[K, P, M]``.
        count: n, at most the vocabulary.
        vocab_size: How many leading tokens take part; None for all. Tables are padded beyond what a tokenizer spells.
    """
    last = config.vocab_size if vocab_size is None else min(vocab_size, config.vocab_size)
    virtual = _unit(jnp.asarray(prompts, jnp.float32).reshape(-1, prompts.shape[-1]))
    cosines = jnp.full((len(virtual), count), -jnp.inf)
    ids = jnp.zeros((len(virtual), count), jnp.int32)
    for start in range(0, last, _CHUNK):
        cosines, ids = _merged(config, params, virtual, cosines, ids, np.int32(start), np.int32(last))
    shape = (*prompts.shape[:2], count)
    ids, cosines = on_host((ids, cosines))
    return NearestTokens(ids.reshape(shape), cosines.reshape(shape))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=0)
def _merged(
    config: DecoderConfig,
    params: FrozenTree,
    virtual: jax.Array,
    cosines: jax.Array,
    ids: jax.Array,
    start: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    tokens = start + jnp.arange(_CHUNK, dtype=jnp.int32)
    table = _unit(embed(config, params, jnp.minimum(tokens, last - 1)).astype(jnp.float32))
    found = jnp.dot(virtual, table.T, precision=jax.lax.Precision.HIGHEST)
    found = jnp.where(tokens < last, found, -jnp.inf)
    # Those found before stand first: among equals the lowest id stays.
    best, place = jax.lax.top_k(jnp.concatenate([cosines, found], axis=1), cosines.shape[1])
    every = jnp.concatenate([ids, jnp.broadcast_to(tokens, found.shape)], axis=1)
    return best, jnp.take_along_axis(every, place, axis=1)
