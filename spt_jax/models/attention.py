"""Attention, its masks, and the cache of its keys and values."""

from __future__ import annotations

import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from spt_jax.models.decoder_config import DecoderConfig

QUERY_BLOCK = 72
"""About how many queries of an ordered row attend at once; measured in docs/performance.md."""


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
    ordered: bool = False,
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
        ordered: Whether query i never sees a key behind slot i, as in a whole row at once. Queries then go in blocks,
            each with the keys up to its end alone, which leaves out most of what the mask would hide.

    Returns:
        ``[B, T, H, head_dim]``.
    """
    # Heads before positions: products of matrices with one batch axis beside the rows are what XLA is fastest at.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    attend = functools.partial(_attend, scale=query.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)
    if ordered:
        blocks = [
            attend(query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask[:, :, start:end, :end])
            for start, end in _query_blocks(query.shape[2])
        ]
        attended = jnp.concatenate(blocks, axis=2)
    else:
        attended = attend(query, key, value, mask)
    return jnp.swapaxes(attended, 1, 2)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """First slot and end of each block of queries: as equal as can be, about `QUERY_BLOCK` long."""
    count = max(1, round(length / QUERY_BLOCK))
    ends = [length * block // count for block in range(count + 1)]
    return list(itertools.pairwise(ends))


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float, softcap: float | None
) -> jax.Array:
    """`attention` with heads before positions: ``[B, H, T, head_dim]`` behind ``[B, num_key_value_heads, C, ...]``."""
    repeats = query.shape[1] // key.shape[1]
    # The heads of a group stand below one another as if they were further queries.
    query = rearrange(query, "b (g r) t d -> b g (r t) d", r=repeats)
    products = jnp.einsum("bgqd,bgcd->bgqc", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        products = softcap * jnp.tanh(products / softcap)
    hidden = jnp.finfo(jnp.float32).min
    weights = jax.nn.softmax(jnp.where(jnp.tile(mask, (1, 1, repeats, 1)), products, hidden), axis=-1)
    attended = jnp.einsum("bgqc,bgcd->bgqd", weights.astype(value.dtype), value)
    return rearrange(attended, "b g (r t) d -> b (g r) t d", r=repeats)
