"""One causal decoder in Flax Linen; families are data (`DecoderConfig`), not classes.

The decoder has never heard of prompts: it takes embeddings, positions and perhaps a cache, and gives hidden states.
The embedding table and the vocabulary projection are functions of their own, so that callers decide where they apply
(SPT needs logits at target positions only).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.models.attention import Cache, LayerCache, causal_mask
from spt_jax.models.decoder_block import DecoderBlock, Layer, Places
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.dropout import Dropout
from spt_jax.models.layers import Norm, partitioned
from spt_jax.models.rotary import rotary_table

FrozenTree = dict[str, Any]
"""The frozen LM's parameters: nested dicts of arrays, an argument of every function here, never closed over."""


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


@jax.named_scope("embedding")
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
