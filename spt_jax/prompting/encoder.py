"""The transformer retriever's encoder: `torch.nn.TransformerEncoder` in Flax, over tokens or over rows.

A post-norm encoder (arXiv 1706.03762) without positions: each layer is ``x = norm1(x + attention(x))``, then
``x = norm2(x + linear2(relu(linear1(x))))``. It has two uses. Ours attends over the tokens of a row, causally, so that
a turn's vector does not depend on what follows it. The authors' program attends across the rows of a batch, because it
never told torch that rows come first: `across_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import UserError, nearest

EncoderTree = dict[str, Any]
"""The encoder's parameters, float32: for each layer ``layers_{i}``

- ``attention``: ``query``, ``key``, ``value`` (kernel ``[M, H, M/H]``, bias ``[H, M/H]``), ``out`` (kernel
  ``[H, M/H, M]``, bias ``[M]``),
- ``linear1``, ``linear2``: kernel ``[in, out]``, bias ``[out]``,
- ``norm1``, ``norm2``: scale and bias ``[M]``.
"""

NORM_EPSILON = 1e-5

_PRECISION = jax.lax.Precision.HIGHEST
# U(±√(6 / (M + 3M))): Glorot's bound for torch's one matrix of queries, keys and values [3M, M].
_GLOROT_OF_THREE = nn.initializers.variance_scaling(0.5, "fan_in", "uniform")
# U(±1/√fan_in), as torch.nn.Linear has it.
_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _linear_bias(fan_in: int) -> Any:
    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return uniform


class EncoderLayer(nn.Module):
    """One layer: attention, then the MLP, a norm behind each sum.

    Attributes:
        num_heads: H.
        feed_forward: Width of the MLP.
        dropout: Rate on attention probabilities, on attention's output, inside the MLP and on its output.
    """

    num_heads: int
    feed_forward: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """``[..., T, M]`` to ``[..., T, M]``; see `TransformerEncoder`."""
        width = x.shape[-1]

        def linear(features: int, name: str, h: jax.Array) -> jax.Array:
            bias = _linear_bias(h.shape[-1])
            return nn.Dense(features, kernel_init=_LINEAR, bias_init=bias, precision=_PRECISION, name=name)(h)

        def norm(name: str, h: jax.Array) -> jax.Array:
            return nn.LayerNorm(NORM_EPSILON, use_fast_variance=False, name=name)(h)

        def dropped(h: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout)(h, deterministic=deterministic)

        attended = nn.MultiHeadDotProductAttention(
            self.num_heads,
            kernel_init=_GLOROT_OF_THREE,
            out_kernel_init=_LINEAR,
            broadcast_dropout=False,
            dropout_rate=self.dropout,
            precision=_PRECISION,
            name="attention",
        )(x, mask=None if mask is None else mask[..., None, :, :], deterministic=deterministic)
        x = norm("norm1", x + dropped(attended))
        inner = dropped(nn.relu(linear(self.feed_forward, "linear1", x)))
        return norm("norm2", x + dropped(linear(width, "linear2", inner)))


class TransformerEncoder(nn.Module):
    """Layers like ``torch.nn.TransformerEncoderLayer``: post-norm, ReLU, biases, no positions, no norm at the end.

    Parameters are an `EncoderTree` in float32, initialised like torch's, except that each layer has its own draw
    (``torch.nn.TransformerEncoder`` copies one layer's).

    Attributes:
        num_layers: Number of layers.
        num_heads: H, heads of the attention; divides M.
        feed_forward: Width of each layer's MLP.
        dropout: Rate of each layer's dropout; torch's default is 0.1.
    """

    num_layers: int
    num_heads: int
    feed_forward: int = 2048
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """Encodes the last axis but one.

        Args:
            x: ``[..., T, M]``; computed in float32.
            mask: bool, broadcast to ``[..., T, T]``: whether a query (first T) sees a key (second T); None for all. A
                query that sees nothing gets a finite, meaningless result.
            deterministic: Whether dropout is off. If not, ``apply`` needs ``rngs={"dropout": key}``.

        Returns:
            float32 ``[..., T, M]``.

        Raises:
            UserError: The heads do not divide M.
        """
        _check_heads(x.shape[-1], self.num_heads)
        x = x.astype(jnp.float32)
        for i in range(self.num_layers):
            layer = EncoderLayer(self.num_heads, self.feed_forward, self.dropout, name=f"layers_{i}")
            x = layer(x, mask, deterministic)
        return x


def _check_heads(width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise UserError(
            f"the retriever's encoder has {num_heads} heads for a width of {width}; allowed: a number of heads that "
            "divides the width"
        )


def across_rows(
    encoder: Callable[[jax.Array, jax.Array | None], jax.Array], x: jax.Array, row_mask: jax.Array | None = None
) -> jax.Array:
    """The authors' use of the encoder: at each position, attention over the rows of the batch.

    Their batch holds every context K times, once a prompt. Equal rows weigh a softmax average alike, so without dropout
    one copy of each row gives the same result.

    Args:
        encoder: From ``[T, B, M]`` and a mask, bool ``[B, B]`` or None, to ``[T, B, M]``: a `TransformerEncoder`, bound
            or inside another module, or a function that applies one.
        x: ``[B, T, M]``: a batch's rows, padding included, or the bank ``[K, P, M]``.
        row_mask: bool ``[B]``, False for empty rows, which no row sees; None where there are none.

    Returns:
        float32 ``[B, T, M]``; finite and meaningless at empty rows.
    """
    mask = None if row_mask is None else jnp.broadcast_to(row_mask.astype(bool), (x.shape[0], x.shape[0]))
    return jnp.swapaxes(encoder(jnp.swapaxes(x, 0, 1), mask), 0, 1)


def _torch_shapes(num_layers: int, width: int, feed_forward: int) -> dict[str, tuple[int, ...]]:
    one = {
        "self_attn.in_proj_weight": (3 * width, width),
        "self_attn.in_proj_bias": (3 * width,),
        "self_attn.out_proj.weight": (width, width),
        "self_attn.out_proj.bias": (width,),
        "linear1.weight": (feed_forward, width),
        "linear1.bias": (feed_forward,),
        "linear2.weight": (width, feed_forward),
        "linear2.bias": (width,),
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
    }
    return {f"layers.{i}.{name}": shape for i in range(num_layers) for name, shape in one.items()}


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], num_layers: int, num_heads: int) -> None:
    what = "the retriever's encoder"
    sizes = {"layers.0.self_attn.in_proj_weight": 1, "layers.0.linear1.weight": 0}
    for name in sizes:
        if name not in shapes:
            raise UserError(f"{what}: the tensor {name} is missing.{nearest(name, shapes)}")
        if len(shapes[name]) != 2:
            raise UserError(f"{what}: the tensor {name} has the shape {list(shapes[name])}; allowed: a matrix")
    width, feed_forward = (shapes[name][axis] for name, axis in sizes.items())
    _check_heads(width, num_heads)
    expected = _torch_shapes(num_layers, width, feed_forward)
    for name, shape in expected.items():
        if name not in shapes:
            hint = nearest(name, [found for found in shapes if found not in expected])
            raise UserError(f"{what} has {num_layers} layers, but the tensor {name} is missing.{hint}")
        if shapes[name] != shape:
            raise UserError(
                f"{what}: the tensor {name} has the shape {list(shapes[name])}; a width of {width} with an MLP of "
                f"{feed_forward} needs {list(shape)}"
            )
    for name in shapes:
        if name not in expected:
            raise UserError(
                f"{what} of {num_layers} layers has no place for the tensor {name}.{nearest(name, expected)}"
            )


def from_torch(tensors: Mapping[str, Any], num_layers: int, num_heads: int) -> EncoderTree:
    """The parameters in the ``state_dict`` of a ``torch.nn.TransformerEncoder``.

    Args:
        tensors: Arrays by torch's names, ``layers.{i}.self_attn.in_proj_weight`` ``[3M, M]`` and so on.
        num_layers: Number of layers.
        num_heads: H; no tensor tells it.

    Returns:
        The tree in float32.

    Raises:
        UserError: A tensor is missing, has another shape or belongs elsewhere, or the heads do not divide M.
    """
    arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    _check_tensors({name: array.shape for name, array in arrays.items()}, num_layers, num_heads)

    def one_layer(layer: str) -> EncoderTree:
        weights, biases = (np.split(arrays[f"{layer}.self_attn.in_proj_{part}"], 3) for part in ("weight", "bias"))
        width = weights[0].shape[1]
        attention = {
            name: {
                "kernel": weight.T.reshape(width, num_heads, -1),
                "bias": bias.reshape(num_heads, -1),
            }
            for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
        }
        attention["out"] = {
            "kernel": arrays[f"{layer}.self_attn.out_proj.weight"].T.reshape(num_heads, -1, width),
            "bias": arrays[f"{layer}.self_attn.out_proj.bias"],
        }
        linears = {
            name: {"kernel": arrays[f"{layer}.{name}.weight"].T, "bias": arrays[f"{layer}.{name}.bias"]}
            for name in ("linear1", "linear2")
        }
        norms = {
            name: {"scale": arrays[f"{layer}.{name}.weight"], "bias": arrays[f"{layer}.{name}.bias"]}
            for name in ("norm1", "norm2")
        }
        return {"attention": attention, **linears, **norms}

    return jax.tree.map(jnp.asarray, {f"layers_{i}": one_layer(f"layers.{i}") for i in range(num_layers)})


def to_torch(params: EncoderTree) -> dict[str, np.ndarray]:
    """The ``state_dict`` of the ``torch.nn.TransformerEncoder`` with these parameters (or gradients), float32."""
    tensors: dict[str, np.ndarray] = {}
    for i in range(len(params)):
        tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params[f"layers_{i}"])
        attention = tree["attention"]
        three = [attention[name] for name in ("query", "key", "value")]
        width = three[0]["kernel"].shape[0]
        tensors |= {
            f"layers.{i}.self_attn.in_proj_weight": np.concatenate([p["kernel"].reshape(width, -1).T for p in three]),
            f"layers.{i}.self_attn.in_proj_bias": np.concatenate([p["bias"].reshape(-1) for p in three]),
            f"layers.{i}.self_attn.out_proj.weight": attention["out"]["kernel"].reshape(-1, width).T,
            f"layers.{i}.self_attn.out_proj.bias": attention["out"]["bias"],
        }
        for name in ("linear1", "linear2"):
            tensors[f"layers.{i}.{name}.weight"] = tree[name]["kernel"].T
            tensors[f"layers.{i}.{name}.bias"] = tree[name]["bias"]
        for name in ("norm1", "norm2"):
            tensors[f"layers.{i}.{name}.weight"] = tree[name]["scale"]
            tensors[f"layers.{i}.{name}.bias"] = tree[name]["bias"]
    # Safetensors writes an array's buffer as it lies, so transposed views must become arrays of their own.
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
