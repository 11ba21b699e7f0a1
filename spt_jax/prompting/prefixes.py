"""Prefix tuning (arXiv 2101.00190): learned keys and values before the text in every layer, as PEFT defines them.

A bank of prefixes is float32 ``[K, L, 2, P, G, head_dim]``: for each of K prefixes and L layers, the keys and then the
values of P virtual tokens, with G key-value heads. Keys are taken as they would stand in the cache, normalised and
rotated. The prefix holds positions 0 to P - 1, so that the text starts at P and sliding windows count the prefix.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from spt_jax.errors import UserError
from spt_jax.models.attention import KVCache
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.prompting.retriever import Linear


def prefix_shape(config: DecoderConfig, num_prefixes: int, prefix_length: int) -> tuple[int, ...]:
    """``(K, L, 2, P, G, head_dim)``."""
    return (num_prefixes, config.num_layers, 2, prefix_length, config.num_key_value_heads, config.head_dim)


def init_prefixes(config: DecoderConfig, key: jax.Array, num_prefixes: int, prefix_length: int) -> jax.Array:
    """Fresh prefixes, independent normal values of standard deviation 1 (PEFT's ``nn.Embedding``).

    Args:
        config: The decoder.
        key: A random key.
        num_prefixes: K.
        prefix_length: P.

    Returns:
        float32 ``[K, L, 2, P, G, head_dim]``.
    """
    return jax.random.normal(key, prefix_shape(config, num_prefixes, prefix_length), jnp.float32)


def prefix_cache(config: DecoderConfig, prefixes: jax.Array, slots: int) -> KVCache:
    """A cache that holds a prefix for each row, cast to the decoder's type.

    ``decode(config, params, embeddings, positions + P, valid, cache)`` then attends to [prefix ; text]; gradients reach
    the prefixes through the cache.

    Args:
        config: The decoder.
        prefixes: ``[B, L, 2, P, G, head_dim]``, one a row. Rows that fold K innermost (``[D·K, ...]``) take
            ``jnp.tile(bank, (D, 1, 1, 1, 1, 1))``.
        slots: P, the text's tokens and those still to be generated.

    Raises:
        UserError: The prefixes do not have this decoder's layers, heads or width.
        ValueError: There are fewer slots than virtual tokens.
    """
    expected = (config.num_layers, 2, config.num_key_value_heads, config.head_dim)
    shape = prefixes.shape
    if prefixes.ndim != 6 or (*shape[1:3], *shape[4:]) != expected:
        wanted = f"(rows, {expected[0]}, 2, P, {expected[2]}, {expected[3]})"
        raise UserError(f"prefixes of shape {tuple(shape)} do not fit this LM, which needs {wanted}")
    batch, length = shape[0], shape[3]
    if slots < length:
        raise ValueError(f"a cache of {slots} slots has no room for a prefix of {length} tokens")
    pairs = rearrange(prefixes.astype(config.jax_dtype), "b l two p g d -> two l b p g d")
    pairs = jnp.pad(pairs, [(0, 0)] * 3 + [(0, slots - length)] + [(0, 0)] * 2)
    places = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    return KVCache(
        key=pairs[0],
        value=pairs[1],
        positions=places,
        valid=places < length,
        length=jnp.asarray(length, jnp.int32),
    )


class PrefixEncoder(nn.Module):
    """Prefixes through an MLP that is shared by all virtual tokens (PEFT's ``prefix_projection``).

    ``embedding -> Linear(G·head_dim, h) -> tanh -> Linear(h, L·2·G·head_dim)``. Parameters, float32:
    ``{"embedding": [K, P, G·head_dim], "lin_in": {"kernel", "bias"}, "lin_out": {"kernel", "bias"}}``; the embedding
    starts as N(0, 1), the layers as torch's ``nn.Linear``. An output is read as ``[L, 2, G, head_dim]``.

    Attributes:
        config: The decoder.
        prefix_length: P.
        width: h.
        num_prefixes: K.
    """

    config: DecoderConfig
    prefix_length: int
    width: int
    num_prefixes: int = 1

    @nn.compact
    def __call__(self) -> jax.Array:
        """float32 ``[K, L, 2, P, G, head_dim]``."""
        c = self.config
        features = c.num_key_value_heads * c.head_dim
        shape = (self.num_prefixes, self.prefix_length, features)
        x = self.param("embedding", nn.initializers.normal(1.0), shape)
        x = jnp.tanh(Linear(self.width, name="lin_in")(x))
        y = Linear(c.num_layers * 2 * features, name="lin_out")(x)
        return rearrange(
            y, "k p (l two g d) -> k l two p g d", l=c.num_layers, two=2, g=c.num_key_value_heads, d=c.head_dim
        )
