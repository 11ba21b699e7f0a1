"""LoRA (arXiv 2106.09685): low-rank updates beside the frozen LM's kernels, as PEFT defines them.

The trainable tree names projections of a block: ``{"q_proj": {"down": [L, in..., r], "up": [L, r, out...]}, ...}``, all
float32, stacked over the L layers as the frozen tree is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spt_jax.errors import UserError, nearest
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.dropout import Dropout
from spt_jax.models.low_rank import LowRankKernel
from spt_jax.models.quantized import QTensor

LoraTree = Mapping[str, Mapping[str, jax.Array]]
"""The trainable tree; see the module."""

_PARTS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


class KernelShape(NamedTuple):
    """The axes of one layer's kernel.

    Attributes:
        inputs: Sizes of the input axes.
        outputs: Sizes of the output axes.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def lora_targets(config: DecoderConfig) -> dict[str, KernelShape]:
    """The projections of a block that may get an update, in the block's order; ``gate_proj`` where the MLP is gated."""
    width, inner = (config.hidden_size,), (config.intermediate_size,)
    query = (config.num_attention_heads, config.head_dim)
    key = (config.num_key_value_heads, config.head_dim)
    shapes = {
        "q_proj": KernelShape(width, query),
        "k_proj": KernelShape(width, key),
        "v_proj": KernelShape(width, key),
        "o_proj": KernelShape(query, width),
        "gate_proj": KernelShape(width, inner),
        "up_proj": KernelShape(width, inner),
        "down_proj": KernelShape(inner, width),
    }
    return shapes if config.gated_mlp else {name: shape for name, shape in shapes.items() if name != "gate_proj"}


def init_lora(
    config: DecoderConfig, key: jax.Array, rank: int, targets: Sequence[str]
) -> dict[str, dict[str, jax.Array]]:
    """A fresh tree, whose update is 0: `down` is Kaiming uniform with a = √5, hence U(±1/√in), `up` is 0 (PEFT's).

    Args:
        config: The decoder.
        key: A random key. A projection's start does not depend on which others are targets.
        rank: r.
        targets: Names in `lora_targets`.

    Returns:
        ``{name: {"down": [L, in..., r], "up": [L, r, out...]}}``, float32.

    Raises:
        UserError: The rank is below 1, no target is named, or one is no projection of this LM.
    """
    if rank < 1:
        raise UserError(f"lora.rank is {rank}; allowed: 1 or more")
    known = lora_targets(config)
    if not targets:
        raise UserError(f"lora.targets names no projection; allowed: some of {', '.join(known)}")
    tree = {}
    for name in targets:
        if name not in known:
            raise UserError(
                f"lora.targets names {name!r}, which is no projection of this LM's blocks; "
                f"allowed: {', '.join(known)}.{nearest(name, known)}"
            )
        inputs, outputs = known[name]
        bound = math.prod(inputs) ** -0.5
        shape = (config.num_layers, *inputs, rank)
        tree[name] = {
            "down": jax.random.uniform(_own_key(key, name), shape, jnp.float32, -bound, bound),
            "up": jnp.zeros((config.num_layers, rank, *outputs), jnp.float32),
        }
    return tree


def with_lora(
    params: FrozenTree, tree: LoraTree, scale: float, key: jax.Array | None = None, dropout: float = 0.0
) -> FrozenTree:
    """The frozen tree with the updates beside its kernels, for `decode`; every array of `params` is shared.

    Args:
        params: The frozen tree, its kernels quantised or not.
        tree: The trainable tree; gradients with respect to it, cast to the LM's type where it joins, are exact.
        scale: α / r, a Python number: it is part of the compiled program.
        key: A random key for the dropout of the updates' inputs in training; None for no dropout. Every layer and
            projection draws its own mask.
        dropout: Its rate, in [0, 1).

    Raises:
        UserError: The rate is not in [0, 1), or the tree does not fit the LM.
    """
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"lora.dropout is {dropout}; allowed: a number from 0 to below 1")

    def joined(name: str, base: Any, update: Mapping[str, jax.Array]) -> LowRankKernel:
        down, up = update["down"], update["up"]
        dropped = None if key is None or dropout == 0.0 else Dropout(_own_key(key, name), dropout).split(down.shape[0])
        return LowRankKernel(base, down, up, dropped, scale)

    return _replaced(params, tree, joined)


def merge_lora(params: FrozenTree, tree: LoraTree, scale: float) -> FrozenTree:
    """The frozen tree with the updates added to its kernels, for inference at the LM's own cost.

    The sum is taken in float32 and rounded once to the kernel's type, so that a float32 LM computes what it computes
    behind `with_lora`, and a bfloat16 one the same up to the rounding of its kernels.

    Args:
        params: The frozen tree.
        tree: The trainable tree.
        scale: α / r.

    Raises:
        UserError: The kernels are quantised, or the tree does not fit the LM. Rounding a sum to 8 or 4 bits would
            lose most of a small update; `with_lora` serves there.
    """

    def merged(name: str, base: Any, update: Mapping[str, jax.Array]) -> jax.Array:
        if isinstance(base, QTensor):
            raise UserError(
                f"the kernels of {name} are quantised, and a LoRA update merged into them would be rounded away; "
                "leave the update beside the kernels, or load the LM with model.quantization = none"
            )
        return _merged(base, update["down"], update["up"], scale)

    return _replaced(params, tree, merged)


def _own_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, list(_PARTS).index(name))


@jax.jit
def _merged(base: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    def one(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = layer
        update = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

    # A layer at a time: the float32 sum of all layers would be as large as the kernels, or twice that.
    return jax.lax.map(one, (base, down, up))


def _replaced(params: FrozenTree, tree: LoraTree, replacement: Any) -> FrozenTree:
    """`params` with ``replacement(name, kernel, update)`` for every kernel that the tree names."""
    layers = {part: dict(projections) for part, projections in params["layers"].items()}
    for name, update in tree.items():
        projections = layers.get(_PARTS.get(name, ""), {})
        if name not in projections:
            present = [n for n, part in _PARTS.items() if n in layers.get(part, {})]
            raise UserError(
                f"the LoRA tree holds {name!r}, which is no projection of this LM's blocks; "
                f"allowed: {', '.join(present)}.{nearest(name, present)}"
            )
        base = projections[name]["kernel"]
        _check_shapes(name, base, update)
        projections[name] = {**projections[name], "kernel": replacement(name, base, update)}
    return {**params, "layers": layers}


def _check_shapes(name: str, base: Any, update: Mapping[str, jax.Array]) -> None:
    shape = tuple(base.q.shape if isinstance(base, QTensor) else base.shape)
    down, up = tuple(update["down"].shape), tuple(update["up"].shape)
    if (*down[:-1], *up[2:]) != shape or down[-1:] != up[1:2] or down[:1] != up[:1]:
        raise UserError(
            f"the LoRA update of {name} has shapes {down} (down) and {up} (up), "
            f"which do not fit the LM's kernels of shape {shape}"
        )
