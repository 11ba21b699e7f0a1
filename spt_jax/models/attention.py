"""Attention, its masks, and the cache of its keys and values."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from spt_jax.models.decoder_config import DecoderConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    All rows of a batch write to the same slots: a batch of unequal prompts is right-padded to a common length, its
    padding marked invalid, and positions (not slots) decide what is visible, so padding leaves no trace.

    Attributes:
        key: ``[L, B, C, num_key_value_heads, head_dim]``, L layers, C slots; rotated where the family rotates.
        value: Like `key`.
        positions: int32 ``[B, C]``, the position held by each slot.
        valid: bool ``[B, C]``, whether a slot holds a real token.
        length: int32 scalar, slots written so far.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    valid: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int) -> KVCache:
        """A cache with room for `slots` tokens in each of `batch` rows."""
        shape = (config.num_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        return cls(
            key=jnp.zeros(shape, config.jax_dtype),
            value=jnp.zeros(shape, config.jax_dtype),
            positions=jnp.zeros((batch, slots), jnp.int32),
            valid=jnp.zeros((batch, slots), bool),
            length=jnp.zeros((), jnp.int32),
        )

    def extended(self, positions: jax.Array, valid: jax.Array) -> KVCache:
        """The bookkeeping after T more tokens, `positions` and `valid` ``[B, T]``; the blocks write the keys."""
        start = (0, self.length)
        return self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            positions=jax.lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), start),
            valid=jax.lax.dynamic_update_slice(self.valid, valid, start),
            length=self.length + positions.shape[1],
        )


def write_slots(cached: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes ``[B, T, h, d]`` into one layer's slots ``[B, C, h, d]`` from slot `start` on."""
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (0, start, 0, 0))


def causal_mask(
    query_positions: jax.Array, key_positions: jax.Array, key_valid: jax.Array, window: int | None = None
) -> jax.Array:
    """Which keys a query may see: the valid ones at its own position or before, within its window.

    Args:
        query_positions: int ``[B, T]``.
        key_positions: int ``[B, C]``.
        key_valid: bool ``[B, C]``.
        window: How many positions are seen, the query's own included; None for all.

    Returns:
        bool ``[B, 1, T, C]``.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (visible & key_valid[:, None, :])[:, None]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Dot-product attention with grouped queries; the softmax is float32.

    A query that may see nothing (padding) gets finite values that nobody reads.

    Args:
        query: ``[B, T, H, head_dim]``.
        key: ``[B, C, num_key_value_heads, head_dim]``.
        value: Like `key`.
        mask: bool ``[B, 1, T, C]``.
        scale: Multiplies the products; None for ``head_dim ** -0.5``.
        softcap: c in ``c · tanh(x / c)`` over the scaled products; None for none.

    Returns:
        ``[B, T, H, head_dim]``.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="xla")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = rearrange(query, "b t (g r) d -> b t g r d", g=key.shape[2])
    products = jnp.einsum("btgrd,bcgd->bgrtc", grouped, key, preferred_element_type=jnp.float32) * factor
    products = jnp.where(mask[:, :, None], softcap * jnp.tanh(products / softcap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(products, axis=-1).astype(value.dtype)
    return rearrange(jnp.einsum("bgrtc,bcgd->btgrd", weights, value), "b t g r d -> b t (g r) d")
