"""One causal decoder in Flax Linen; families are data (`DecoderConfig`), not classes.

The decoder has never heard of prompts: it takes embeddings, positions and perhaps a cache, and gives hidden states.
The embedding table and the vocabulary projection are functions of their own, so that callers decide where they apply
(SPT needs logits at target positions only).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.models.attention import KVCache, attention, causal_mask, write_slots
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.rotary import rotary_table, rotate

FrozenTree = dict[str, Any]
"""The frozen LM's parameters: nested dicts of arrays, an argument of every function here, never closed over."""


def _rematerialised(config: DecoderConfig) -> Any:
    if config.remat == "none":
        return DecoderBlock
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return nn.remat(DecoderBlock, policy=policies[config.remat], prevent_cse=False)


def _partitioned(init: Any, axes: tuple[str, ...]) -> Any:
    return nn.with_logical_partitioning(init, axes)


class Projection(nn.Module):
    """A dense map whose input and output may have several axes, such as heads.

    Attributes:
        features: Sizes of the output axes.
        axes: Logical names of the kernel's axes, inputs first; they say how the kernel is sharded.
        num_inputs: How many trailing axes of the input are contracted.
        use_bias: Whether a bias is added.
        dtype: Type of the kernel and of the product.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in axes]`` to ``[..., features]``."""
        inputs = x.shape[x.ndim - self.num_inputs :]
        shape = (*inputs, *self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=tuple(range(self.num_inputs)))
        kernel = self.param("kernel", _partitioned(init, self.axes), shape, self.dtype)
        contracted = tuple(range(self.num_inputs))
        y = jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - self.num_inputs, x.ndim)), contracted), ((), ())))
        if self.use_bias:
            names = self.axes[self.num_inputs :]
            zeros = _partitioned(nn.initializers.zeros, names)
            y = y + self.param("bias", zeros, self.features, self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), statistics in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``[..., M]``."""
        ones = _partitioned(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],), self.config.jax_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return scale * normed.astype(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer_cache: tuple[jax.Array, jax.Array] | None,
        slot: jax.Array | None,
        mask: jax.Array,
        table: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """``[B, T, M]`` to ``[B, T, M]``, and this layer's cache with the new keys and values written at `slot`."""
        c = self.config

        def heads(count: int, name: str) -> jax.Array:
            kind = "heads" if name == "q_proj" else "kv_heads"
            axes = ("embed", kind, "head_dim")
            return Projection((count, c.head_dim), axes, use_bias=c.attention_bias, dtype=c.jax_dtype, name=name)(x)

        query = rotate(heads(c.num_attention_heads, "q_proj"), table)
        key = rotate(heads(c.num_key_value_heads, "k_proj"), table)
        value = heads(c.num_key_value_heads, "v_proj")
        if layer_cache is not None:
            assert slot is not None
            key = write_slots(layer_cache[0], key, slot)
            value = write_slots(layer_cache[1], value, slot)
            layer_cache = (key, value)
        y = attention(query, key, value, mask)
        axes = ("heads", "head_dim", "embed")
        output = Projection((c.hidden_size,), axes, 2, use_bias=c.attention_bias, dtype=c.jax_dtype, name="o_proj")
        return output(y), layer_cache


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) · up(x))``."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., M]`` to ``[..., M]``."""
        c = self.config

        def dense(size: int, axes: tuple[str, str], name: str) -> Projection:
            return Projection((size,), axes, use_bias=c.mlp_bias, dtype=c.jax_dtype, name=name)

        gate = nn.silu(dense(c.intermediate_size, ("embed", "mlp"), "gate_proj")(x))
        up = dense(c.intermediate_size, ("embed", "mlp"), "up_proj")(x)
        return dense(c.hidden_size, ("mlp", "embed"), "down_proj")(gate * up)


class DecoderBlock(nn.Module):
    """One pre-norm block; the carry of the scan is the hidden state, the scanned input and output its cache."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer_cache: tuple[jax.Array, jax.Array] | None,
        slot: jax.Array | None,
        mask: jax.Array,
        table: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """One step of the scan over layers: ``[B, T, M]`` and the layer's cache, in and out."""
        normed = RMSNorm(self.config, name="input_norm")(x)
        attended, layer_cache = SelfAttention(self.config, name="attention")(normed, layer_cache, slot, mask, table)
        x = x + attended
        x = x + GatedMLP(self.config, name="mlp")(RMSNorm(self.config, name="post_attention_norm")(x))
        return x, layer_cache


class Decoder(nn.Module):
    """The whole LM. Use the functions below, which take the frozen tree as an argument."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the embedding table, the scanned blocks, the last norm and the head."""
        c = self.config
        table = _partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embed_tokens = self.param("embed_tokens", table, (c.vocab_size, c.hidden_size), c.jax_dtype)
        self.layers = nn.scan(
            _rematerialised(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c)
        if not c.tie_word_embeddings:
            head = _partitioned(nn.initializers.normal(0.02), ("embed", "vocab"))
            self.lm_head = self.param("lm_head", head, (c.hidden_size, c.vocab_size), c.jax_dtype)

    def __call__(
        self, embeddings: jax.Array, positions: jax.Array, valid: jax.Array, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """See `decode`."""
        table = rotary_table(self.config, positions)
        embeddings = embeddings.astype(self.config.jax_dtype)
        if cache is None:
            mask = causal_mask(positions, positions, valid)
            hidden, _ = self.layers(embeddings, None, None, mask, table)
            return self.final_norm(hidden), None
        extended = cache.extended(positions, valid)
        mask = causal_mask(positions, extended.positions, extended.valid)
        hidden, (key, value) = self.layers(embeddings, (cache.key, cache.value), cache.length, mask, table)
        return self.final_norm(hidden), extended.replace(key=key, value=value)  # pyright: ignore[reportAttributeAccessIssue]


def embed(config: DecoderConfig, params: FrozenTree, tokens: jax.Array) -> jax.Array:
    """What enters the first block before positions; the soft prompts join the text here.

    Args:
        config: The decoder.
        params: The frozen tree.
        tokens: int ``[..., T]``.

    Returns:
        ``[..., T, M]`` in the decoder's type.
    """
    del config
    return jnp.take(params["embed_tokens"], tokens, axis=0)


def decode(
    config: DecoderConfig,
    params: FrozenTree,
    embeddings: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states after the last norm.

    Args:
        config: The decoder.
        params: The frozen tree.
        embeddings: ``[B, T, M]``.
        positions: int ``[B, T]``, counted from the row's first real token (the soft prompt's first).
        valid: bool ``[B, T]``, False on padding, on either side.
        cache: Keys and values of earlier tokens, with at least T free slots; None for a whole row at once.

    Returns:
        Hidden states ``[B, T, M]`` and the cache with these tokens added (None when there was none). Values at invalid
        positions are finite and meaningless.
    """
    return Decoder(config).apply({"params": params}, embeddings, positions, valid, cache)  # pyright: ignore[reportReturnType]


def vocabulary_logits(config: DecoderConfig, params: FrozenTree, hidden: jax.Array) -> jax.Array:
    """The vocabulary projection: hidden states ``[..., M]`` to float32 logits ``[..., V]``."""
    if config.tie_word_embeddings:
        kernel, axis = params["embed_tokens"], 1
    else:
        kernel, axis = params["lm_head"], 0
    dimensions = (((hidden.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(hidden, kernel, dimensions, preferred_element_type=jnp.float32)


def abstract_params(config: DecoderConfig) -> FrozenTree:
    """Shapes, types and logical axes of the frozen tree, without allocating it.

    Returns:
        The tree with `flax.linen.LogicallyPartitioned` leaves around `jax.ShapeDtypeStruct`.
    """

    def init() -> Any:
        row = jnp.zeros((1, 1), jnp.int32)
        embeddings = jnp.zeros((1, 1, config.hidden_size), config.jax_dtype)
        return Decoder(config).init(jax.random.key(0), embeddings, row, row == 0, None)

    return jax.eval_shape(init)["params"]


def random_params(config: DecoderConfig, key: jax.Array) -> FrozenTree:
    """A randomly initialised frozen tree, for tests, benchmarks and planning."""
    row = jnp.zeros((1, 1), jnp.int32)
    embeddings = jnp.zeros((1, 1, config.hidden_size), config.jax_dtype)
    return nn.unbox(Decoder(config).init(key, embeddings, row, row == 0, None))["params"]  # pyright: ignore[reportIndexIssue]
