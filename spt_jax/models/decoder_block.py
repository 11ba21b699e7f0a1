"""A block of the decoder: self-attention and MLP with their norms, as `DecoderConfig` orders them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.models.attention import LayerCache, attention
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.dropout import Dropout
from spt_jax.models.layers import MLP, Norm, Projection, project_together
from spt_jax.models.rotary import RotaryTable, rotate


class Layer(NamedTuple):
    """What differs from layer to layer, scanned with the parameters.

    Attributes:
        kind: int32, its index in `DecoderConfig.layer_kinds`; None where there is one kind.
        scale: float32, multiplies its queries; None where no layer has one.
        dropout: Its own dropout; None for none.
    """

    kind: jax.Array | None
    scale: jax.Array | None
    dropout: Dropout | None


class Places(NamedTuple):
    """Where the tokens stand, the same for every layer but for `wanted`, which is the last one's.

    Attributes:
        masks: For each kind of layer, bool ``[B, 1, T, C]``, or what the cache makes instead; None where every token
            sees all before it and itself.
        tables: For each kind of layer, its rotation; None where positions are learned.
        slot: int32, where the cache is written; None where it needs nothing.
        wanted: int ``[B, S]``, the places whose hidden states leave this layer; None for all T.
    """

    masks: tuple[Any, ...]
    tables: tuple[RotaryTable, ...] | None
    slot: jax.Array | None
    wanted: jax.Array | None = None

    def pick(self, x: jax.Array) -> jax.Array:
        """The wanted places of ``[B, T, ...]``."""
        if self.wanted is None:
            return x
        return jnp.take_along_axis(x, jnp.expand_dims(self.wanted, tuple(range(2, x.ndim))), axis=1)


def _chosen(kind: jax.Array | None, choices: tuple[Any, ...]) -> Any:
    """The element for a layer's kind; every element has the same shapes."""
    if kind is None:
        return choices[0]
    return jax.tree.map(lambda *leaves: jax.lax.select_n(kind, *leaves), *choices)


class SelfAttention(nn.Module):
    """Grouped-query self-attention."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, layer_cache: LayerCache | None, layer: Layer, places: Places
    ) -> tuple[jax.Array, LayerCache | None]:
        """``[B, T, M]`` to ``[B, S, M]``, and this layer's cache with the new keys and values written."""
        c = self.config
        dense = functools.partial(Projection, dtype=c.jax_dtype, quantization=c.quantization)

        def heads(name: str, count: int, axis: str) -> Projection:
            return dense((count, c.head_dim), ("embed", axis, "head_dim"), use_bias=c.qkv_bias, name=f"{name}_proj")

        def normed(y: jax.Array, name: str, axis: str) -> jax.Array:
            if c.query_key_norm is None:
                return y
            axes = ("norm",) if c.query_key_norm == "head" else (axis, "head_dim")
            over = 2 if c.query_key_norm == "width" else 1
            return Norm(c, axes, over, use_bias=False, name=f"{name}_norm")(y)

        query, key, value = project_together(
            x,
            [
                heads("q", c.num_attention_heads, "heads"),
                heads("k", c.num_key_value_heads, "kv_heads"),
                heads("v", c.num_key_value_heads, "kv_heads"),
            ],
            c.joint_projections,
        )
        query, key = normed(query, "q", "heads"), normed(key, "k", "kv_heads")
        if places.tables is not None:
            table = _chosen(layer.kind, places.tables)
            query, key = rotate(query, table), rotate(key, table)
        if layer.scale is not None:
            query = query * layer.scale.astype(query.dtype)
        mask = _chosen(layer.kind, places.masks)
        settings: dict[str, Any] = {"scale": c.attention_scale, "softcap": c.attention_softcap}
        if layer_cache is None:
            kernel: dict[str, Any] = {"kernel": c.attention_kernel, "sharding": c.attention_sharding}
            y = attention(query, key, value, mask, ordered=True, **kernel, **settings)
        else:
            y, layer_cache = layer_cache.attend(query, key, value, mask, places.slot, **settings)
        axes = ("heads", "head_dim", "embed")
        return dense((c.hidden_size,), axes, 2, use_bias=c.output_bias, name="o_proj")(places.pick(y)), layer_cache


def _both_halves(dropout: Dropout | None) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """What a block's attention and its MLP pass through before they join the residual stream."""
    if dropout is None:
        return lambda h: h, lambda h: h
    both = dropout.split(2)
    return both[0], both[1]


class DecoderBlock(nn.Module):
    """One block; the carry of the scan is the hidden state, the scanned input and output its cache."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, layer_cache: LayerCache | None, layer: Layer, places: Places
    ) -> tuple[jax.Array, LayerCache | None]:
        """One step of the loop over layers: ``[B, T, M]`` and the layer's cache, in and out (``[B, S, M]`` out)."""
        c = self.config
        before, after = c.norm_placement in ("input", "both"), c.norm_placement in ("output", "both")
        drop_attended, drop_fed = _both_halves(layer.dropout)

        def normed(h: jax.Array, name: str, wanted: bool) -> jax.Array:
            return Norm(c, name=name)(h) if wanted else h

        entering = normed(x, "attention_norm", before)
        attended, layer_cache = SelfAttention(c, name="attention")(entering, layer_cache, layer, places)
        attended = drop_attended(normed(attended, "attention_output_norm", after))
        x, entering = places.pick(x), places.pick(entering)
        if c.parallel_residual is not None:
            entering = normed(x, "mlp_norm", True) if c.parallel_residual == "two norms" else entering
            return x + attended + drop_fed(MLP(c, name="mlp")(entering)), layer_cache
        x = normed(x + attended, "attention_norm", c.norm_placement == "sum")
        fed = MLP(c, name="mlp")(normed(x, "mlp_norm", before))
        x = x + drop_fed(normed(fed, "mlp_output_norm", after))
        return normed(x, "mlp_norm", c.norm_placement == "sum"), layer_cache
