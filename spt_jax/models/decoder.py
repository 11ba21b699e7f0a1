"""One causal decoder in Flax Linen; families are data (`DecoderConfig`), not classes.

The decoder has never heard of prompts: it takes embeddings, positions and perhaps a cache, and gives hidden states.
The embedding table and the vocabulary projection are functions of their own, so that callers decide where they apply
(SPT needs logits at target positions only).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.models.attention import Cache, LayerCache, attention, causal_mask
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.dropout import Dropout
from spt_jax.models.layers import MLP, Norm, Projection, partitioned, project_together
from spt_jax.models.rotary import RotaryTable, rotary_table, rotate

FrozenTree = dict[str, Any]
"""The frozen LM's parameters: nested dicts of arrays, an argument of every function here, never closed over."""


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


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy: what is kept is everything but a layer's weights, taken out of their stack."""
    return primitive not in (jax.lax.dynamic_slice_p, jax.lax.squeeze_p)


_POLICIES: dict[str, Any] = {
    "none": _all_but_weights,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}
"""What is kept for the backward pass, for each ``remat``."""


def _rematerialised(config: DecoderConfig) -> Any:
    if config.remat == "none":
        return DecoderBlock
    return nn.remat(DecoderBlock, policy=_POLICIES[config.remat], prevent_cse=False)


class Decoder(nn.Module):
    """The whole LM. Use the functions below, which take the frozen tree as an argument."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the tables, the scanned blocks, the last norm and the head."""
        c = self.config
        width = c.embedding_size or c.hidden_size
        spread = nn.initializers.normal(0.02)

        def matrix(name: str, axes: tuple[str, str], rows: int, columns: int) -> jax.Array:
            return self.param(name, partitioned(spread, axes), (rows, columns), c.jax_dtype)

        self.embed_tokens = matrix("embed_tokens", ("vocab", "embed"), c.vocab_size, width)
        if width != c.hidden_size:
            self.project_in = matrix("project_in", ("norm", "embed"), width, c.hidden_size)
            self.project_out = matrix("project_out", ("embed", "norm"), c.hidden_size, width)
        if c.position_embedding == "learned":
            rows = c.max_position_embeddings + c.position_offset
            self.embed_positions = matrix("embed_positions", ("positions", "embed"), rows, c.hidden_size)
        self.layers = nn.scan(
            _rematerialised(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            unroll=c.num_layers if c.unrolled else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        if c.final_norm:
            self.final_norm = Norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = matrix("lm_head", ("embed", "vocab"), width, c.vocab_size)

    def __call__(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        valid: jax.Array | None,
        cache: Cache | None,
        dropout: Dropout | None = None,
        visible: jax.Array | None = None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """See `decode`."""
        c = self.config
        x = embeddings.astype(c.jax_dtype)
        tables = None
        if c.position_embedding == "learned":
            # Padding may carry any position; a row beyond the table would be NaN and spread through masked values.
            x = x + jnp.take(self.embed_positions, positions + c.position_offset, axis=0, mode="clip")
        else:
            tables = tuple(rotary_table(c, kind.rope, positions) for kind in c.layer_kinds)
        if dropout is not None:
            dropout = dropout.split(c.num_layers + 1)
            x = dropout[-1](x) if c.embedding_dropout else x
        if cache is None:
            masks = self._row_masks(positions, valid)
        else:
            assert valid is not None, "a cache needs to know which tokens are real"
            masks = tuple(cache.mask(positions, valid, kind.window) for kind in c.layer_kinds)
        if visible is not None:
            assert valid is not None, "what is seen is said of rows whose padding is told"
            masks = tuple(mask & visible[:, None] for mask in masks if mask is not None)
        layers, slot = (None, None) if cache is None else (cache.layers, cache.slot)
        each, places = self._layers(dropout), Places(masks, tables, slot)
        if isinstance(layers, list):
            x, kept = self._one_by_one(x, layers, each, places)
        else:
            through = self.layers if wanted is None else functools.partial(self._to_places, wanted)
            x, kept = through(x, layers, each, places)
        x = self.final_norm(x) if c.final_norm else x
        return x, None if cache is None or valid is None else cache.after(kept, positions, valid)

    def _one_by_one(
        self, x: jax.Array, layers: Sequence[LayerCache], each: Layer, places: Places
    ) -> tuple[jax.Array, Sequence[Any]]:
        """As ``self.layers``, of layers that lie apart."""
        kept = []
        for number, (weights, cache) in enumerate(zip(self.variables["params"]["layers"], layers, strict=True)):
            own = jax.tree.map(operator.itemgetter(number), each)
            block = DecoderBlock(self.config, parent=None)
            x, new = block.apply({"params": weights}, x, cache, own, places)  # pyright: ignore[reportGeneralTypeIssues]
            kept.append(new)
        return x, kept

    def _to_places(
        self, wanted: jax.Array, x: jax.Array, layers: LayerCache | None, each: Layer, places: Places
    ) -> tuple[jax.Array, Any]:
        """As ``self.layers``, but the last of them gives the hidden states of the wanted places alone.

        It is another computation than the others, so weights are not scanned but taken by their number: a stack without
        its last layer would be a copy. The backward pass takes them again.
        """
        c = self.config
        stacked = self.variables["params"]["layers"]

        def layer(x: jax.Array, number: Any, inputs: Any, places: Places) -> tuple[jax.Array, Any]:
            weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), stacked)
            return DecoderBlock(c, parent=None).apply({"params": weights}, x, *inputs, places)  # pyright: ignore[reportReturnType]

        def step(x: jax.Array, one: Any) -> tuple[jax.Array, Any]:
            number, inputs = one
            return jax.checkpoint(layer, prevent_cse=False, policy=_POLICIES[c.remat])(x, number, inputs, places)

        count = c.num_layers - 1
        first = jax.tree.map(lambda leaf: leaf[:count], (layers, each))
        x, kept = jax.lax.scan(step, x, (jnp.arange(count), first), unroll=max(count, 1) if c.unrolled else 1)
        last = jax.tree.map(lambda leaf: leaf[count], (layers, each))
        x, kept_last = layer(x, count, last, places._replace(wanted=wanted))
        return x, jax.tree.map(lambda stack, one: jnp.concatenate([stack, one[None]]), kept, kept_last)

    def _row_masks(self, positions: jax.Array, valid: jax.Array | None) -> tuple[jax.Array | None, ...]:
        """The masks of whole rows; no mask at all where all kinds of layers see the whole row."""
        kinds, length = self.config.layer_kinds, positions.shape[1]
        if valid is None and all(kind.window is None or kind.window >= length for kind in kinds):
            return (None,) * len(kinds)
        valid = jnp.ones(positions.shape, bool) if valid is None else valid
        return tuple(causal_mask(positions, positions, valid, kind.window) for kind in kinds)

    def _layers(self, dropout: Dropout | None) -> Layer:
        c = self.config
        kinds = jnp.asarray(c.layer_pattern, jnp.int32) if c.layer_pattern else None
        scales = 1.0 / jnp.arange(1, c.num_layers + 1, dtype=jnp.float32) if c.attention_scale_by_layer else None
        return Layer(kinds, scales, None if dropout is None else dropout[: c.num_layers])


def embed(config: DecoderConfig, params: FrozenTree, tokens: jax.Array) -> jax.Array:
    """What enters the first block before positions; the soft prompts join the text here.

    Gemma's scale and OPT-350m's projection are behind it: whatever the family, a soft prompt is M wide.

    Args:
        config: The decoder.
        params: The frozen tree.
        tokens: int ``[..., T]``.

    Returns:
        ``[..., T, M]`` in the decoder's type.
    """
    x = jnp.take(params["embed_tokens"], tokens, axis=0)
    if config.embedding_size is not None:
        x = x @ params["project_in"]
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    return x


def decode(
    config: DecoderConfig,
    params: FrozenTree,
    embeddings: jax.Array,
    positions: jax.Array,
    valid: jax.Array | None,
    cache: Cache | None = None,
    dropout: Dropout | None = None,
    visible: jax.Array | None = None,
    wanted: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states after the last norm.

    Args:
        config: The decoder.
        params: The frozen tree. With a cache whose layers lie apart, so do those of the tree
            (`spt_jax.models.layers_apart`).
        embeddings: ``[B, T, M]``.
        positions: int ``[B, T]``, counted from the row's first real token (the soft prompt's first). Real tokens stand
            in their order.
        valid: bool ``[B, T]``, False on padding, on either side. None where padding stands behind the real tokens of a
            row alone, so that none of them sees it, and attention needs no mask; only without a cache.
        cache: Keys and values of earlier tokens, such as a `spt_jax.models.attention.KVCache` with at least T free
            slots; None for a whole row at once.
        dropout: The LM's own dropout in training, on what each block's attention and MLP add to the residual stream, as
            OPT and GPT-2 are trained, and on what enters the first block where `DecoderConfig.embedding_dropout` says
            so. Every layer, place, row and feature has its own draw. Dropout of attention probabilities (GPT-2's
            ``attn_pdrop``; 0 in OPT) is left out. None, or a rate of 0, for none.
        visible: bool ``[B, T, C]``, C slots of the cache (T without one): which of what its position lets a token see
            it may see, so that alternatives stand side by side in a row, each at the positions it would have alone;
            None for all.
        wanted: int ``[B, S]``, the places among the T whose hidden states are returned; the last block then projects
            what it attended to, and runs its MLP, there alone. None for all. The gradient of a tree that is learned
            would be summed up layer by layer: leave it out there, and take the places from the result.

    Returns:
        Hidden states ``[B, T, M]``, or ``[B, S, M]`` of the wanted places, and what the cache becomes with these tokens
        added (None when there was none). Values at invalid positions are finite and meaningless.
    """
    dropout = None if dropout is None or dropout.rate == 0 else dropout
    return Decoder(config).apply({"params": params}, embeddings, positions, valid, cache, dropout, visible, wanted)  # pyright: ignore[reportReturnType]


def vocabulary_head(params: FrozenTree) -> FrozenTree:
    """The part of the frozen tree that `vocabulary_logits` needs."""
    return {name: params[name] for name in ("embed_tokens", "project_out", "lm_head") if name in params}


def vocabulary_logits(config: DecoderConfig, params: FrozenTree, hidden: jax.Array) -> jax.Array:
    """The vocabulary projection: hidden states ``[..., M]`` to float32 logits ``[..., V]``."""
    if config.embedding_size is not None:
        hidden = hidden @ params["project_out"]
    if config.tie_word_embeddings:
        kernel, axis = params["embed_tokens"], 1
    else:
        kernel, axis = params["lm_head"], 0
    dimensions = (((hidden.ndim - 1,), (axis,)), ((), ()))
    logits = jax.lax.dot_general(hidden, kernel, dimensions, preferred_element_type=jnp.float32)
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)
