"""The parts of a block that act on each position alone: projections, norms, the MLP."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.low_rank import LowRankKernel
from spt_jax.models.quantized import QTensor, contract, quantized_init

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def partitioned(init: Any, axes: tuple[str, ...]) -> Any:
    """An initialiser whose parameter carries the logical names of its axes."""
    return nn.with_logical_partitioning(init, axes)


class Projection(nn.Module):
    """A dense map whose input and output may have several axes, such as heads.

    Attributes:
        features: Sizes of the output axes.
        axes: Logical names of the kernel's axes, inputs first; they say how the kernel is sharded.
        num_inputs: How many trailing axes of the input are contracted.
        use_bias: Whether a bias is added.
        dtype: Type of the kernel, if it is not quantised, and of the product.
        quantization: ``"none"``, ``"int8"`` or ``"int4"``: how the kernel is stored.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    quantization: str = "none"

    @nn.compact
    def weights(self, inputs: tuple[int, ...]) -> tuple[Any, jax.Array | None]:
        """The kernel ``[*inputs, *features]``, which may be a `LowRankKernel` or a `QTensor`, and the bias or None.

        Raises:
            UserError: The kernel is stored in another way than `quantization` says.
        """
        shape = (*inputs, *self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=tuple(range(self.num_inputs)))
        if self.quantization == "none":
            kernel = self.param("kernel", partitioned(init, self.axes), shape, self.dtype)
        else:
            kernel = self.param("kernel", quantized_init(init, self.axes, self.num_inputs, self.quantization), shape)
        stored = kernel.base if isinstance(kernel, LowRankKernel) else kernel
        if isinstance(stored, QTensor) != (self.quantization != "none"):
            raise UserError(f"the decoder's quantization is {self.quantization}, but its kernels are not stored so")
        if not self.use_bias:
            return kernel, None
        zeros = partitioned(nn.initializers.zeros, self.axes[self.num_inputs :])
        return kernel, self.param("bias", zeros, self.features, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in axes]`` to ``[..., features]``.

        Raises:
            UserError: As `weights`.
        """
        kernel, bias = self.weights(x.shape[x.ndim - self.num_inputs :])
        y = contract(x, kernel, self.num_inputs)
        return y if bias is None else y + bias


JOINT_TOKENS = 4
"""So many tokens for each feature of the outputs make a joint product worth putting its kernels side by side."""


def project_together(x: jax.Array, projections: Sequence[Projection], jointly: bool) -> list[jax.Array]:
    """Several projections of one input ``[..., M]``: one product of matrices where that is faster.

    On a GPU a product of a narrow M takes as long as its input and output take to be read and written. A joint one
    reads the input once, and gives its gradient at once instead of in parts that are summed. Putting the kernels side
    by side costs time too, which counts where there are few tokens for each feature.

    Args:
        x: ``[..., M]``.
        projections: Of one input axis each.
        jointly: Whether the device is one that gains by it. Quantised kernels and low-rank updates stay apart.

    Returns:
        ``[..., features]`` of each.
    """
    weights = [projection.weights(x.shape[-1:]) for projection in projections]
    kernels = [kernel for kernel, _ in weights]
    ends = list(itertools.accumulate(math.prod(projection.features) for projection in projections))
    enough = math.prod(x.shape[:-1]) >= JOINT_TOKENS * ends[-1]
    if jointly and enough and all(isinstance(kernel, jax.Array) for kernel in kernels):
        joint = jnp.concatenate([kernel.reshape(x.shape[-1], -1) for kernel in kernels], axis=1)
        parts = jnp.split(contract(x, joint, 1), ends[:-1], axis=-1)
        parts = [y.reshape(*x.shape[:-1], *p.features) for y, p in zip(parts, projections, strict=True)]
    else:
        parts = [contract(x, kernel, 1) for kernel in kernels]
    return [y if bias is None else y + bias for y, (_, bias) in zip(parts, weights, strict=True)]


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) as the family has it, computed in float32.

    Attributes:
        config: The decoder.
        axes: Logical names of the parameters' axes, the last of the input's.
        num_axes: Over how many trailing axes the statistics are taken.
        use_bias: Whether a LayerNorm has a bias.
    """

    config: DecoderConfig
    axes: tuple[str, ...] = ("norm",)
    num_axes: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last `num_axes` axes of ``[..., M]`` or ``[..., H, head_dim]``."""
        c = self.config
        over = tuple(range(x.ndim - self.num_axes, x.ndim))
        shape = x.shape[x.ndim - len(self.axes) :]
        y = x.astype(jnp.float32)
        if c.norm == "layer":
            y = y - jnp.mean(y, axis=over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=over, keepdims=True) + c.norm_eps)
        if c.norm_affine:
            init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
            scale = self.param("scale", partitioned(init, self.axes), shape, c.jax_dtype).astype(jnp.float32)
            y = y * (1.0 + scale if c.norm_plus_one else scale)
            if c.norm == "layer" and self.use_bias:
                zeros = partitioned(nn.initializers.zeros, self.axes)
                y = y + self.param("bias", zeros, shape, c.jax_dtype).astype(jnp.float32)
        return y.astype(x.dtype)


class MLP(nn.Module):
    """The block's MLP, gated (arXiv 2002.05202) or plain."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., M]`` to ``[..., M]``."""
        c = self.config
        activation = _ACTIVATIONS[c.activation]

        def dense(size: int, axes: tuple[str, str], name: str) -> Projection:
            return Projection(
                (size,), axes, use_bias=c.mlp_bias, dtype=c.jax_dtype, quantization=c.quantization, name=name
            )

        up = dense(c.intermediate_size, ("embed", "mlp"), "up_proj")
        if c.gated_mlp:
            gate = dense(c.intermediate_size, ("embed", "mlp"), "gate_proj")
            gate, inner = project_together(x, [gate, up], c.joint_projections)
            inner = activation(gate) * inner
        else:
            inner = activation(up(x))
        return dense(c.hidden_size, ("mlp", "embed"), "down_proj")(inner)
