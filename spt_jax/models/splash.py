"""Attention over whole rows by the TPU kernel that ships with JAX, `splash_attention`.

It never writes a row's square of attention weights to memory, forward or backward, and leaves out blocks of keys that a
causal row hides. XLA cannot split a kernel, so each device runs it on its own rows and heads.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from spt_jax.models.decoder_config import DecoderConfig

LANES = 128
"""Places that a TPU's vector unit works on at once; blocks are multiples of it."""
MOST_IN_A_BLOCK = 512
"""Queries, and keys, of a block: MaxText's choice for v5e and v5p, not measured here."""


def splash_lacks(config: DecoderConfig, device: Any, tensor: int = 1) -> str:
    """Why the kernel cannot serve a decoder on a device; empty where it can.

    Rows whose layers look through windows shorter than the row, rows that devices cannot share evenly, and cached
    decoding take XLA's attention either way.

    Args:
        config: The decoder.
        device: One of a mesh.
        tensor: Among how many devices heads are split.
    """
    if device.platform != "tpu":
        return f"the device is {device.device_kind}; splash attention needs a TPU"
    if config.head_dim % 8:
        return f"a head is {config.head_dim} wide; splash attention allows multiples of 8"
    if config.num_attention_heads % tensor or config.num_key_value_heads % tensor:
        return (
            f"mesh.tensor = {tensor} does not divide {config.num_attention_heads} heads and "
            f"{config.num_key_value_heads} heads of keys and values, and a head cannot be split"
        )
    return ""


def can_share(rows: int, heads: int, key_heads: int, sharding: NamedSharding | None) -> bool:
    """Whether every device gets as many rows and heads; a kernel takes no others."""
    if sharding is None:
        return True
    over_rows, _, over_heads, _ = (_places(sharding, axis) for axis in range(4))
    return rows % over_rows == 0 and heads % over_heads == 0 and key_heads % over_heads == 0


def _places(sharding: NamedSharding, axis: int) -> int:
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    return math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """`spt_jax.models.attention.attention` of causal rows, where query i sees the keys 0 … i.

    Away from a TPU the kernel is interpreted, which is for tests.

    Args:
        query: ``[B, T, H, head_dim]``.
        key: ``[B, T, num_key_value_heads, head_dim]``.
        value: Like `key`.
        scale: See `attention`.
        softcap: See `attention`.
        sharding: How queries lie on the devices, rows and heads alone being split; None for one device.

    Returns:
        ``[B, T, H, head_dim]``.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    platform = jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform

    def on_a_device(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        # The kernel has no scale of its own; one rounding to the query's type is what it costs.
        query = (query.astype(jnp.float32) * factor).astype(query.dtype)
        length = query.shape[1]
        padded = -(-length // LANES) * LANES
        # What stands behind a row is hidden from it, as the row is causal.
        rows = ((0, 0), (0, padded - length), (0, 0), (0, 0))
        heads_first = (jnp.swapaxes(jnp.pad(x, rows), 1, 2) for x in (query, key, value))
        kernel = _kernel(query.shape[2], padded, softcap, interpret=platform != "tpu")
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)[:, :length]

    if sharding is None:
        return on_a_device(query, key, value)
    spec = sharding.spec
    return jax.shard_map(on_a_device, mesh=sharding.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
        query, key, value
    )


def _kernel(heads: int, length: int, softcap: float | None, *, interpret: bool) -> Any:
    """The kernel for one causal row: ``[H, length, head_dim]`` behind keys and values of their own heads."""
    # Half a second that no other device needs to wait.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = max(size for size in range(LANES, MOST_IN_A_BLOCK + 1, LANES) if length % size == 0)
    sizes = kernels.BlockSizes(block, block, block, block, block, block, block, block)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
