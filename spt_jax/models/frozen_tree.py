"""The frozen tree before there are weights: its shapes, random values, and a float tree quantised."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.models.decoder import Decoder, FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.quantized import QTensor, quantize


def _init(config: DecoderConfig, key: jax.Array) -> Any:
    row = jnp.zeros((1, 1), jnp.int32)
    embeddings = jnp.zeros((1, 1, config.hidden_size), config.jax_dtype)
    return Decoder(config).init(key, embeddings, row, row == 0, None)["params"]


def abstract_params(config: DecoderConfig) -> FrozenTree:
    """Shapes, types and logical axes of the frozen tree, without allocating it.

    Returns:
        The tree with `flax.linen.LogicallyPartitioned` leaves around `jax.ShapeDtypeStruct`; a quantised kernel is a
        `QTensor` of them.
    """
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def random_params(config: DecoderConfig, key: jax.Array) -> FrozenTree:
    """A randomly initialised frozen tree, for tests, benchmarks and planning."""
    return nn.unbox(_init(config, key))


def quantize_params(config: DecoderConfig, params: FrozenTree) -> FrozenTree:
    """A float tree with its blocks' kernels quantised, the rest as it is.

    Args:
        config: The quantised decoder.
        params: The frozen tree of the same decoder without quantisation.
    """

    def one(spec: Any, leaf: jax.Array) -> Any:
        return _quantize(leaf, spec.scale.value.shape, spec.q.value.dtype) if isinstance(spec, QTensor) else leaf

    # A node that is no dict: a quantised kernel's specification stands beside a float kernel.
    return jax.tree.map(one, abstract_params(config), params, is_leaf=lambda node: not isinstance(node, dict))


_quantize = jax.jit(quantize, static_argnums=(1, 2))
