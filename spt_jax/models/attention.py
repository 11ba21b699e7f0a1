"""Attention, its masks, and the cache of its keys and values."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.splash import can_share, splash_attention

QUERY_BLOCK = 72
"""About how many queries of an ordered row attend at once; measured in docs/performance.md."""


class LayerCache(Protocol):
    """What one layer has kept of earlier tokens; a part of a `Cache`, scanned with the layer's parameters."""

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Any,
        slot: jax.Array | None,
        *,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[jax.Array, Any]:
        """Attention over what was kept and the new keys and values, and what the layer keeps then.

        Args:
            query: ``[B, T, H, head_dim]``.
            key: ``[B, T, num_key_value_heads, head_dim]``, of the new tokens.
            value: Like `key`.
            mask: As the cache made it.
            slot: The cache's own `Cache.slot`.
            scale: See `attention`.
            softcap: See `attention`.

        Returns:
            ``[B, T, H, head_dim]``, and arrays that `Cache.after` gets stacked over layers.
        """
        ...


class Cache(Protocol):
    """Keys and values of earlier tokens, as the decoder uses them."""

    @property
    def layers(self) -> LayerCache | list[LayerCache]:
        """The layers' parts, stacked on the first axis of every array; a list where the LM's layers lie apart."""
        ...

    @property
    def slot(self) -> jax.Array | None:
        """What every layer needs to know of where it writes."""
        ...

    def mask(self, positions: jax.Array, valid: jax.Array, window: int | None) -> Any:
        """What tokens at `positions` may see in a layer with this window; `positions` and `valid` are ``[B, T]``."""
        ...

    def after(self, kept: Any, positions: jax.Array, valid: jax.Array) -> Any:
        """The cache with the new tokens in it, from what the layers kept."""
        ...


class SlotLayer(NamedTuple):
    """One layer of a `KVCache`: keys and values, each ``[B, C, num_key_value_heads, head_dim]``."""

    key: jax.Array
    value: jax.Array

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Any,
        slot: jax.Array | None,
        *,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[jax.Array, SlotLayer]:
        """See `LayerCache.attend`."""
        assert slot is not None
        kept = SlotLayer(write_slots(self.key, key, slot), write_slots(self.value, value, slot))
        return attention(query, kept.key, kept.value, mask, scale=scale, softcap=softcap), kept


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

    @property
    def layers(self) -> SlotLayer:
        """See `Cache.layers`."""
        return SlotLayer(self.key, self.value)

    @property
    def slot(self) -> jax.Array:
        """The first slot to write."""
        return self.length

    def mask(self, positions: jax.Array, valid: jax.Array, window: int | None) -> jax.Array:
        """bool ``[B, 1, T, C]``."""
        extended = self.extended(positions, valid)
        return causal_mask(positions, extended.positions, extended.valid, window)

    def after(self, kept: SlotLayer, positions: jax.Array, valid: jax.Array) -> KVCache:
        """See `Cache.after`."""
        extended = self.extended(positions, valid)
        return extended.replace(key=kept.key, value=kept.value)  # pyright: ignore[reportAttributeAccessIssue]


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


def cudnn_lacks(config: DecoderConfig, device: Any) -> str:
    """Why cuDNN's fused attention cannot serve a decoder on a device; empty where it can.

    Rows whose layers look through windows shorter than the row, and cached decoding, take XLA's attention either way.
    """
    try:
        capability = float(device.compute_capability) if device.platform in ("gpu", "cuda") else 0.0
    except (AttributeError, ValueError):
        capability = 0.0  # AMD's are no numbers
    if capability < 8.0:
        return f"the device is {device.device_kind}; cuDNN's needs an NVIDIA GPU of compute capability 8.0 or more"
    if config.dtype != "bfloat16":
        return f"the LM's type is {config.dtype}; cuDNN's attention has bfloat16 alone"
    if config.attention_softcap is not None:
        return "this LM caps its attention logits; cuDNN's attention has no cap"
    longest = 256 if capability >= 9.0 else 128
    if config.head_dim % 8 or config.head_dim > longest:
        return f"a head is {config.head_dim} wide; cuDNN's attention allows multiples of 8 up to {longest} here"
    return ""


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    ordered: bool = False,
    kernel: str = "xla",
    sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """Dot-product attention with grouped queries; the softmax is float32.

    A query that may see nothing (padding) gets finite values that nobody reads.

    Args:
        query: ``[B, T, H, head_dim]``.
        key: ``[B, C, num_key_value_heads, head_dim]``.
        value: Like `key`.
        mask: bool ``[B, 1, T, C]``. None where query i sees the keys of slots 0 … i and no others (then T = C).
        scale: Multiplies the products; None for ``head_dim ** -0.5``.
        softcap: c in ``c · tanh(x / c)`` over the scaled products; None for none.
        ordered: Whether query i never sees a key behind slot C - T + i, as in a whole row at once. Queries then go in
            blocks, each with the keys up to its end alone, which leaves out most of what the mask would hide.
        kernel: ``"cudnn"`` takes cuDNN's fused attention where there is no mask (`cudnn_lacks`), ``"splash"`` the
            TPU's where there is none and devices share rows and heads evenly (`splash_lacks`); ``"xla"``, and
            everything else, is written here.
        sharding: Of the queries, for ``"splash"``; None for one device.

    Returns:
        ``[B, T, H, head_dim]``.
    """
    if kernel == "cudnn" and mask is None:
        assert softcap is None
        return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True, implementation="cudnn")
    if kernel == "splash" and mask is None and can_share(query.shape[0], query.shape[2], key.shape[2], sharding):
        return splash_attention(query, key, value, scale=scale, softcap=softcap, sharding=sharding)
    # Heads before positions: products of matrices with one batch axis beside the rows are what XLA is fastest at.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    settings = _Settings(query.shape[-1] ** -0.5 if scale is None else scale, softcap, ordered or mask is None)
    return jnp.swapaxes(_attention(settings, query, key, value, mask), 1, 2)


class _Settings(NamedTuple):
    scale: float
    softcap: float | None
    ordered: bool

    def blocks(self, queries: int, keys: int) -> list[tuple[slice, slice]]:
        """Which queries attend at once, and to which keys: as equal as can be, about `QUERY_BLOCK` queries."""
        if not self.ordered:
            return [(slice(0, queries), slice(0, keys))]
        count = max(1, round(queries / QUERY_BLOCK))
        ends = [queries * block // count for block in range(count + 1)]
        return [(slice(start, end), slice(0, keys - queries + end)) for start, end in itertools.pairwise(ends)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    settings: _Settings, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """`attention` with heads before positions: ``[B, H, T, head_dim]`` behind ``[B, num_key_value_heads, C, ...]``."""
    return _forward(settings, query, key, value, mask)[0]


def masked_products(
    query: jax.Array, key: jax.Array, mask: jax.Array, *, scale: float | None, softcap: float | None
) -> jax.Array:
    """What the softmax of `attention` is over, heads before positions and the queries of a group below one another.

    Args:
        query: ``[B, H, T, head_dim]``.
        key: ``[B, num_key_value_heads, C, head_dim]``.
        mask: bool ``[B, 1, T, C]``.
        scale: See `attention`.
        softcap: See `attention`.

    Returns:
        float32 ``[B, num_key_value_heads, H / num_key_value_heads · T, C]``, the least float where the mask hides.
    """
    settings = _Settings(query.shape[-1] ** -0.5 if scale is None else scale, softcap, False)
    return _products(settings, query, key, mask)


def weighted_sum(weights: jax.Array, value: jax.Array) -> jax.Array:
    """float32 ``[B, G, Q, head_dim]`` from weights ``[B, G, Q, C]`` and values ``[B, G, C, head_dim]``."""
    return _times("bgqc,bgcd->bgqd", weights, value)


def _forward(
    settings: _Settings, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, Any]:
    outputs, normalisers = [], []
    for rows, columns in settings.blocks(query.shape[2], key.shape[2]):
        products = _products(settings, query[:, :, rows], key[:, :, columns], _visible(mask, rows, columns))
        top = products.max(axis=-1, keepdims=True)
        weights = jnp.exp(products - top)
        total = weights.sum(axis=-1, keepdims=True)
        attended = _times("bgqc,bgcd->bgqd", weights, value[:, :, columns]) / total
        outputs.append(_per_head(attended.astype(query.dtype), query.shape[1]))
        normalisers.append(_per_head(top + jnp.log(total), query.shape[1]))
    output, normaliser = jnp.concatenate(outputs, axis=2), jnp.concatenate(normalisers, axis=2)
    return output, (query, key, value, mask, output, normaliser)


def _backward(settings: _Settings, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    """The weights of each block are computed again from the normalisers (arXiv 2205.14135): none of them is kept."""
    query, key, value, mask, output, normaliser = residuals
    repeats = query.shape[1] // key.shape[1]
    through_total = jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1, keepdims=True)
    queries, keys, values = [], jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for rows, columns in settings.blocks(query.shape[2], key.shape[2]):
        k, v, seen = key[:, :, columns], value[:, :, columns], _visible(mask, rows, columns)
        products = _products(settings, query[:, :, rows], k, seen)
        arriving, total, through = (_grouped(x[:, :, rows], repeats) for x in (cotangent, normaliser, through_total))
        weights = jnp.exp(products - total)
        values = values.at[:, :, columns].add(_times("bgqc,bgqd->bgcd", weights, arriving))
        into = weights * (_times("bgqd,bgcd->bgqc", arriving, v) - through)
        if settings.softcap is not None:
            # What the mask hides has the least float here, whose square is infinite; its weight is 0 already.
            into = into * (1.0 - jnp.square(jnp.maximum(products / settings.softcap, -1.0)))
        into = into * settings.scale
        queries.append(_per_head(_times("bgqc,bgcd->bgqd", into, k).astype(query.dtype), query.shape[1]))
        keys = keys.at[:, :, columns].add(_times("bgqc,bgqd->bgcd", into, _grouped(query[:, :, rows], repeats)))
    return jnp.concatenate(queries, axis=2), keys.astype(key.dtype), values.astype(value.dtype), None


_attention.defvjp(_forward, _backward)


def _visible(mask: jax.Array | None, rows: slice, columns: slice) -> jax.Array:
    """The part of a mask for a block of queries and its keys, ``[B or 1, 1, T, C]``."""
    if mask is not None:
        return mask[:, :, rows, columns]
    queries, keys = (jnp.arange(part.start, part.stop) for part in (rows, columns))
    return (queries[:, None] >= keys)[None, None]


def _products(settings: _Settings, query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
    """What the softmax is over: float32 ``[B, G, r · T, C]``, the least float where the mask hides."""
    repeats = query.shape[1] // key.shape[1]
    products = _times("bgqd,bgcd->bgqc", _grouped(query, repeats), key) * settings.scale
    if settings.softcap is not None:
        products = settings.softcap * jnp.tanh(products / settings.softcap)
    return jnp.where(jnp.tile(mask, (1, 1, repeats, 1)), products, jnp.finfo(jnp.float32).min)


def _times(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of matrices in the right one's type, summed in float32."""
    return jnp.einsum(subscripts, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _grouped(x: jax.Array, repeats: int) -> jax.Array:
    """The heads of a group below one another, as if they were further queries."""
    return rearrange(x, "b (g r) t d -> b g (r t) d", r=repeats)


def _per_head(x: jax.Array, heads: int) -> jax.Array:
    return rearrange(x, "b g (r t) d -> b (g r) t d", r=heads // x.shape[1])
