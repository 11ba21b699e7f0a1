"""Reading texts behind prefixes, and continuing each of them in several ways at once.

A context is read in one pass and never written again; what is generated lies in slots of its own. So a step of
decoding copies neither, the N ways to continue a context (beams, samples) attend to one copy of it, and beams are never
moved: a table of ancestors says which of the new slots each of them sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from spt_jax.models.attention import LayerCache, attention, causal_mask, masked_products, weighted_sum
from spt_jax.models.decoder import FrozenTree, decode
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.layers_apart import layers_apart


@flax.struct.dataclass
class Context:
    """Keys and values of B texts and of the prefixes before them.

    Attributes:
        key: ``[L, B, num_key_value_heads, C, head_dim]``: L layers, C = P + T slots, slot c holding position c. Heads
            stand before slots, as products of matrices are fastest at. Or L arrays, of layers that lie apart.
        value: Like `key`.
        lengths: int32 ``[B]``, real tokens, those of the prefix counted; the slots behind are padding.
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def apart(self) -> bool:
        """Whether it goes with layers that lie apart."""
        return isinstance(self.key, tuple)

    def taken_apart(self) -> Context:
        """The same for layers that lie apart; nothing is copied. For arrays on one CPU."""
        keys, values = zip(*layers_apart((self.key, self.value)), strict=True)
        return Context(key=keys, value=values, lengths=self.lengths)


@flax.struct.dataclass
class Continuation:
    """Keys and values of what was generated after B contexts, N ways each, R tokens at most.

    Attributes:
        key: ``[L, B, num_key_value_heads, R · N, head_dim]``; slot j · N + n holds the j-th token of strand n. Or L
            arrays, as those of the context.
        value: Like `key`.
        ancestors: int32 ``[B, N, R]``, which strand's slot holds the j-th token of each strand's past.
        length: int32 scalar, tokens written in every strand.
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]
    ancestors: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls, config: DecoderConfig, contexts: int, strands: int, room: int, *, apart: bool = False
    ) -> Continuation:
        """Nothing generated yet, with room for `room` tokens in each of `strands` strands of every context."""
        layer = (contexts, config.num_key_value_heads, room * strands, config.head_dim)
        own = jnp.broadcast_to(jnp.arange(strands, dtype=jnp.int32)[:, None], (contexts, strands, room))

        def nothing() -> jax.Array | tuple[jax.Array, ...]:
            if apart:
                return tuple(jnp.zeros(layer, config.jax_dtype) for _ in range(config.num_layers))
            return jnp.zeros((config.num_layers, *layer), config.jax_dtype)

        return cls(key=nothing(), value=nothing(), ancestors=own, length=jnp.int32(0))

    def descended(self, parents: jax.Array) -> Continuation:
        """Strand n goes on from the past of strand ``parents[:, n]``; int32 ``[B, N]``."""
        ancestors = jnp.take_along_axis(self.ancestors, parents[..., None], axis=1)
        return self.replace(ancestors=ancestors)  # pyright: ignore[reportAttributeAccessIssue]


def read(
    config: DecoderConfig,
    params: FrozenTree,
    embeddings: jax.Array,
    lengths: jax.Array,
    prefixes: jax.Array,
    wanted: jax.Array | None = None,
) -> tuple[jax.Array, Context]:
    """Hidden states of texts behind prefixes, and their keys and values.

    Args:
        config: The decoder.
        params: The frozen tree.
        embeddings: ``[B, T, M]``, padded on the right.
        lengths: int32 ``[B]``, real tokens of each text.
        prefixes: ``[B, L, 2, P, num_key_value_heads, head_dim]``, see `spt_jax.prompting.prefixes`; they hold positions
            0 to P - 1. P may be 0.
        wanted: int ``[B, S]``, the places among the T whose hidden states are returned; None for all.

    Returns:
        ``[B, T, M]`` or ``[B, S, M]``, and the context of C = P + T slots.
    """
    rows, width = embeddings.shape[:2]
    front = prefixes.shape[3]
    positions = jnp.broadcast_to(front + jnp.arange(width, dtype=jnp.int32), (rows, width))
    pairs = rearrange(prefixes.astype(config.jax_dtype), "b l two p g d -> two l b g p d")
    valid = positions < front + lengths[:, None]
    prefix_cache = _Prefixes(key=pairs[0], value=pairs[1])
    return decode(config, params, embeddings, positions, valid, prefix_cache, wanted=wanted)


def extend(
    config: DecoderConfig,
    params: FrozenTree,
    embeddings: jax.Array,
    context: Context,
    continuation: Continuation,
) -> tuple[jax.Array, Continuation]:
    """One more token in every strand.

    Args:
        config: The decoder.
        params: The frozen tree.
        embeddings: ``[B, N, M]``.
        context: Of the B rows.
        continuation: With room for a token.

    Returns:
        Hidden states ``[B, N, M]``, and the continuation with these tokens in it.
    """
    positions = jnp.broadcast_to((context.lengths + continuation.length)[:, None], embeddings.shape[:2])
    valid = jnp.ones_like(positions, bool)
    strands = _Strands(context=context, continuation=continuation)
    return decode(config, params, embeddings, positions, valid, strands)


class _PrefixLayer(NamedTuple):
    """Keys and values of one layer, each ``[B, num_key_value_heads, P, head_dim]``."""

    key: jax.Array
    value: jax.Array

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array,
        slot: jax.Array | None,
        *,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """See `spt_jax.models.attention.LayerCache.attend`; keeps prefix and text, heads before slots."""
        del slot
        key, value = (
            jnp.concatenate([kept, jnp.swapaxes(new, 1, 2).astype(kept.dtype)], axis=2)
            for kept, new in ((self.key, key), (self.value, value))
        )
        keys, values = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        return attention(query, keys, values, mask, scale=scale, softcap=softcap, ordered=True), (key, value)


@flax.struct.dataclass
class _Prefixes:
    """`_PrefixLayer` of all layers, a `spt_jax.models.attention.Cache`."""

    key: jax.Array
    value: jax.Array

    @property
    def slot(self) -> None:
        """Every layer writes by itself."""

    @property
    def layers(self) -> _PrefixLayer:
        return _PrefixLayer(self.key, self.value)

    def mask(self, positions: jax.Array, valid: jax.Array, window: int | None) -> jax.Array:
        front = jnp.broadcast_to(jnp.arange(self.key.shape[3], dtype=jnp.int32), (len(positions), self.key.shape[3]))
        seen, real = jnp.concatenate([front, positions], axis=1), jnp.pad(valid, ((0, 0), (front.shape[1], 0)))
        return causal_mask(positions, seen, real | (seen < front.shape[1]), window)

    def after(self, kept: tuple[jax.Array, jax.Array], positions: jax.Array, valid: jax.Array) -> Context:
        del positions
        lengths = valid.sum(axis=1, dtype=jnp.int32) + self.key.shape[3]
        return Context(key=kept[0], value=kept[1], lengths=lengths)


class _StrandLayer(NamedTuple):
    """Keys and values of one layer: of the context ``[B, G, C, head_dim]`` and of all strands ``[B, G, R·N, ...]``."""

    context_key: jax.Array
    context_value: jax.Array
    key: jax.Array
    value: jax.Array

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Sequence[jax.Array],
        slot: jax.Array | None,
        *,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """See `spt_jax.models.attention.LayerCache.attend`; keeps the new tokens', with a slot the past's as well.

        Layers that are scanned leave what is new to `_Strands.after`, so that no stack is copied for it. Layers that
        lie apart write it first: XLA would not know that what is written behind a look can be done in the same buffer,
        and would copy the past twice for each token.
        """
        key, value = (jnp.swapaxes(new, 1, 2).astype(self.key.dtype) for new in (key, value))
        keys, values = (self.context_key, self.key, key), (self.context_value, self.value, value)
        if slot is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(past, new, slot, axis=2)
                for past, new in ((self.key, key), (self.value, value))
            )
            keys, values = (self.context_key, key), (self.context_value, value)
        return _attended(query, keys, values, mask, scale, softcap), (key, value)


def _attended(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """Attention with one softmax over all the places where keys and values lie, none of them moved.

    Args:
        query: ``[B, N, H, head_dim]``.
        keys: ``[B, G, places, head_dim]`` each.
        values: Like `keys`.
        masks: bool ``[B, 1, N, places]``, for each of them.
        scale: See `spt_jax.models.attention.attention`.
        softcap: See there.

    Returns:
        ``[B, N, H, head_dim]``.
    """
    query = jnp.swapaxes(query, 1, 2)
    products = [
        masked_products(query, key, seen, scale=scale, softcap=softcap) for key, seen in zip(keys, masks, strict=True)
    ]
    top = jnp.stack([part.max(axis=-1) for part in products]).max(axis=0)[..., None]
    total, attended = jnp.zeros_like(top), jnp.zeros((*top.shape[:-1], values[0].shape[-1]), jnp.float32)
    for part, value in zip(products, values, strict=True):
        weights = jnp.exp(part - top)
        total += weights.sum(axis=-1, keepdims=True)
        attended += weighted_sum(weights, value)
    attended = attended / total
    return rearrange(attended, "b g (r n) d -> b n (g r) d", n=query.shape[2]).astype(query.dtype)


@flax.struct.dataclass
class _Strands:
    """A context and its continuation, a `spt_jax.models.attention.Cache`."""

    context: Context
    continuation: Continuation

    @property
    def slot(self) -> jax.Array | None:
        """Where layers that lie apart write; those that are scanned leave that to `after`."""
        return self._first_slot if self.context.apart else None

    @property
    def _first_slot(self) -> jax.Array:
        """The first of the N slots for the new tokens."""
        return self.continuation.length * self.continuation.ancestors.shape[1]

    @property
    def layers(self) -> _StrandLayer | list[LayerCache]:
        parts: Any = self.context.key, self.context.value, self.continuation.key, self.continuation.value
        if not self.context.apart:
            return _StrandLayer(*parts)
        return [_StrandLayer(*layer) for layer in zip(*parts, strict=True)]

    def mask(self, positions: jax.Array, valid: jax.Array, window: int | None) -> tuple[jax.Array, ...]:
        """bool ``[B, 1, N, C]`` of the context and ``[B, 1, N, R·N]`` of what was generated.

        Where the new tokens are not written yet, as layers are scanned, they have a third, ``[B, 1, N, N]``.
        """
        past = self.continuation
        rows, strands, room = past.ancestors.shape
        places = jnp.arange(jax.tree.leaves(self.context.key)[0].shape[-2])
        seen = places < self.context.lengths[:, None]
        steps = jnp.arange(room)
        apart = self.context.apart
        written = steps <= past.length if apart else steps < past.length
        if window is not None:
            seen &= positions[:, :1] - places < window
            written &= past.length - steps < window
        own = jnp.arange(strands)
        ancestral = ((self._ancestors if apart else past.ancestors)[..., None] == own) & written[:, None]
        masks = (
            jnp.broadcast_to(seen[:, None, None], (rows, 1, strands, len(places))),
            ancestral.reshape(rows, 1, strands, room * strands),
        )
        return masks if apart else (*masks, jnp.broadcast_to(own[:, None] == own, (rows, 1, strands, strands)))

    @property
    def _ancestors(self) -> jax.Array:
        """Those of the strands with the new tokens in them."""
        past = self.continuation
        _, strands, room = past.ancestors.shape
        own = jnp.arange(strands, dtype=jnp.int32)[:, None]
        return jnp.where(jnp.arange(room) == past.length, own, past.ancestors)

    def after(self, kept: Any, positions: jax.Array, valid: jax.Array) -> Continuation:
        del positions, valid
        past = self.continuation
        if self.context.apart:
            key, value = zip(*kept, strict=True)
        else:
            stacks: Any = past.key, past.value
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(stack, new, self._first_slot, axis=3)
                for stack, new in zip(stacks, kept, strict=True)
            )
        return Continuation(key=key, value=value, ancestors=self._ancestors, length=past.length + 1)
