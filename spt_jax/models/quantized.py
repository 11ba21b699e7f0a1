"""Frozen kernels in 8 or 4 bits: integers with a scale for each block of inputs.

A kernel ``[in..., out...]`` becomes integers of its shape and scales of its rank: along each axis the number of scales
divides the size, so scales shard as their kernel does and the shapes alone say which numbers share one.

- int8: a block is all inputs of an output. ``scale = max |w| / 127``, ``q = round(w / scale)``.
- int4: a block is up to `GROUP_SIZE` neighbouring inputs of an output. Its sixteen levels reach from its smallest
  number to its largest: ``scale = (max w - min w) / 15``, ``offset = min w + 8 scale``,
  ``q = round((w - offset) / scale)``. GGUF's Q4_1 has the same grid, which therefore comes through unharmed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from spt_jax.models.low_rank import LowRankKernel, product

Shape = tuple[int, ...]

GROUP_SIZE = 32
"""At most so many inputs share a scale under int4; the largest divisor of the axis up to it is taken."""

INTEGERS: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.int4}
"""Type of the integers for each quantisation; XLA keeps two int4 in a byte."""

_RANGES = {"int8": (-127, 127), "int4": (-8, 7)}


@flax.struct.dataclass
class QTensor:
    """A quantised kernel; a node of the frozen tree, of one layer or stacked over layers.

    Attributes:
        q: int8 or int4, the kernel's shape.
        scale: The kernel's rank; each axis divides the kernel's. float32 under int8. bfloat16 under int4, where it and
            the offset cost a group of 32 one bit a weight.
        offset: Like `scale`, what a q of 0 stands for; None under int8, where that is 0.
    """

    q: Any
    scale: Any
    offset: Any = None

    def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel that this stands for, ``q · scale + offset`` rounded once to `dtype`."""
        w = self.q.astype(jnp.float32) * _spread(self.scale, self.q.shape)
        return (w if self.offset is None else w + _spread(self.offset, self.q.shape)).astype(dtype)


def scale_shape(shape: Shape, num_inputs: int, quantization: str) -> Shape:
    """The shape of a kernel's scales.

    Args:
        shape: The kernel's, inputs first.
        num_inputs: How many of its axes are inputs.
        quantization: ``"int8"``: a scale an output. ``"int4"``: besides, one for each group of up to `GROUP_SIZE`
            neighbours along the last input axis and for each place along the other input axes.
    """
    inputs, outputs = shape[:num_inputs], shape[num_inputs:]
    if quantization == "int8":
        return (1,) * num_inputs + outputs
    group = max(size for size in range(1, GROUP_SIZE + 1) if inputs[-1] % size == 0)
    return (*inputs[:-1], inputs[-1] // group, *outputs)


def quantize(kernel: jax.Array, scale_shape: Shape, dtype: Any) -> QTensor:
    """The nearest integers to a kernel, with their scales; all of a zero block is zero.

    ``|kernel - dequantized| <= scale / 2``, and what is dequantised has the same integers again. A block with an
    infinity or a NaN does not come back finite. Subnormal scales count as zero.

    Args:
        kernel: A kernel, or several stacked.
        scale_shape: The kernel's rank; each axis divides the kernel's.
        dtype: int8 or int4, one of `INTEGERS`' values.
    """
    low, high = _RANGES[jnp.dtype(dtype).name]
    kernel = kernel.astype(jnp.float32)
    blocks = kernel.reshape([n for pair in _blocks(kernel.shape, scale_shape) for n in pair])
    within = tuple(range(1, blocks.ndim, 2))
    largest = jnp.max(jnp.abs(blocks), axis=within)
    if low == -high:
        scale, offset, kind = largest / high, jnp.zeros_like(largest), jnp.float32
    else:
        smallest = jnp.min(blocks, axis=within)
        # A block far from zero for its width keeps a scale beside which the rounding of its offset is small.
        scale = _bfloat16(jnp.maximum((jnp.max(blocks, axis=within) - smallest) / (high - low), largest / 128))
        offset, kind = _bfloat16(smallest - low * scale), jnp.bfloat16
    divisor = jnp.where(scale > 0, scale, 1)
    q = jnp.round((kernel - _spread(offset, kernel.shape)) / _spread(divisor, kernel.shape))
    q = jnp.clip(q, low, high).astype(dtype)
    return QTensor(q, scale.astype(kind), None if low == -high else offset.astype(kind))


def _bfloat16(x: jax.Array) -> jax.Array:
    # A cast there and back is an excess of precision that XLA may spare itself.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _blocks(shape: Shape, scale_shape: Shape) -> list[tuple[int, int]]:
    """For each axis the number of blocks and their length."""
    if len(shape) != len(scale_shape) or any(size % count for size, count in zip(shape, scale_shape, strict=True)):
        raise ValueError(f"scales of shape {scale_shape} do not divide a kernel of shape {shape}")
    return [(count, size // count) for size, count in zip(shape, scale_shape, strict=True)]


def _spread(scale: jax.Array, shape: Shape) -> jax.Array:
    """Repeats each scale over its block, in float32: to `shape`, or to one that broadcasts to it."""
    # An axis of one scale is left to broadcasting. The integers keep their shape, and with it their sharding.
    pairs = [(count, 1 if count == 1 else length) for count, length in _blocks(shape, scale.shape)]
    apart = scale.astype(jnp.float32).reshape([n for count, _ in pairs for n in (count, 1)])
    repeated = jnp.broadcast_to(apart, [n for pair in pairs for n in pair])
    return repeated.reshape([count * length for count, length in pairs])


def contract(x: jax.Array, kernel: jax.Array | QTensor | LowRankKernel, num_inputs: int) -> jax.Array:
    """Multiplies ``[..., in...]`` by a kernel ``[in..., out...]``, quantised or not: ``[..., out...]``.

    A `LowRankKernel` adds its update to the product with its base.

    A quantised kernel gives what its dequantised one would, in the type of `x`. Its backward pass dequantises again:
    left to itself JAX would keep every layer's dequantised kernel from the forward pass, the memory that quantisation
    saves. Gradients flow to `x`; those of a quantised kernel, which is frozen, are zero.
    """
    if isinstance(kernel, LowRankKernel):
        return contract(x, kernel.base, num_inputs) + kernel.update(x, num_inputs)
    if isinstance(kernel, QTensor):
        return _quantized_product(x, kernel, num_inputs)
    return product(x, kernel, num_inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized_product(x: jax.Array, kernel: QTensor, num_inputs: int) -> jax.Array:
    return product(x, kernel.dequantized(x.dtype), num_inputs)


def _forward(x: jax.Array, kernel: QTensor, num_inputs: int) -> tuple[jax.Array, QTensor]:
    # Spelled out, so that a rematerialisation policy sees a matrix product.
    return product(x, kernel.dequantized(x.dtype), num_inputs), kernel


def _backward(num_inputs: int, kernel: QTensor, cotangent: jax.Array) -> tuple[jax.Array, None]:
    outputs = range(num_inputs, kernel.q.ndim)
    ours = tuple(range(cotangent.ndim - len(outputs), cotangent.ndim))
    w = kernel.dequantized(cotangent.dtype)
    return jax.lax.dot_general(cotangent, w, ((ours, tuple(outputs)), ((), ()))), None


_quantized_product.defvjp(_forward, _backward)


def quantized_init(
    init: Callable[..., Any], axes: tuple[str, ...], num_inputs: int, quantization: str
) -> Callable[..., QTensor]:
    """An initialiser of quantised kernels whose leaves carry the logical names of their axes.

    Args:
        init: Makes the kernel that is quantised, in float32.
        axes: Logical names of the kernel's axes; the scale has the same.
        num_inputs: How many of them are inputs.
        quantization: ``"int8"`` or ``"int4"``.
    """

    def make(key: jax.Array, shape: Shape) -> QTensor:
        kernel = init(key, shape, jnp.float32)
        made = quantize(kernel, scale_shape(shape, num_inputs, quantization), INTEGERS[quantization])
        return jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, axes), made)

    return make


def tree_bytes(params: Any) -> int:
    """Bytes of a tree of arrays or of their shapes, every device's part of an array counted once.

    ``nbytes`` counts a whole byte for an int4, of which XLA keeps two in one.
    """
    return sum(-(-math.prod(leaf.shape) * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(params))


def _bits(dtype: Any) -> int:
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize
