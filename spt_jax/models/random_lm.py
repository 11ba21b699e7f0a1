"""A model without files: random weights made in their place, and a tokenizer of single bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import traverse_util
from tokenizers import decoders, models, pre_tokenizers

from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.family import Shape
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.quantized import QTensor, quantize
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.models.weights import Progress, ShardingFor, kernel_shape, shardings_of

SEED = 0
"""Of every random model: the same shape has the same weights on any devices."""

_SPECIALS = ("<s>", "</s>", "<pad>")
_SCALE = 0.02 / math.sqrt(4 * (256**2 - 1) / 12)
"""From a sum of four bytes to a standard deviation of 0.02, GPT-2's ``initializer_range`` and most families'."""


def random_lm_params(
    config: DecoderConfig, *, sharding_for: ShardingFor | None = None, progress: Progress | None = None
) -> FrozenTree:
    """Random weights, made on the devices that hold them.

    Matrices are bell-shaped with a standard deviation of 0.02, biases 0, norms the identity. Every number is a hash of
    its place, so each device makes its own shard with no buffer beside it, and any number of devices makes the same.
    A quantised decoder has the same weights, quantised a layer at a time.

    Args:
        config: The decoder.
        sharding_for: Where each parameter goes; None for the default device.
        progress: Told after every parameter.

    Returns:
        The frozen tree.
    """
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(abstract_params(config))
    shapes = {path: kernel_shape(leaf) for path, leaf in leaves.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    done = 0
    tree: dict[tuple[str, ...], Any] = {}
    for path, leaf in leaves.items():
        shape, sharding = shapes[path], shardings_of(leaf, sharding_for)
        if isinstance(leaf, QTensor):
            make = _quantized_maker(shape, leaf.scale.value.shape, leaf.q.value.dtype, sharding)
        elif path[-1] in ("bias", "scale"):
            value = 1 if path[-1] == "scale" and not config.norm_plus_one else 0
            make = _constant(value, shape, leaf.value.dtype, sharding)
        else:
            make = matrix_maker(leaf.names[0] == "layers", shape, leaf.value.dtype, sharding)
        tree[path] = make(np.uint32((zlib.crc32("/".join(path).encode()) + SEED) % 2**32))
        done += math.prod(shape)
        if progress is not None:
            progress("making random weights", done, total)
    return traverse_util.unflatten_dict(tree)


Sharding = jax.sharding.Sharding | None


@functools.lru_cache(maxsize=64)  # parameters of one shape share one compilation
def _constant(value: int, shape: Shape, dtype: Any, sharding: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda seed: jnp.full(shape, value, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def matrix_maker(stacked: bool, shape: Shape, dtype: Any, sharding: Sharding) -> Callable[..., jax.Array]:
    """A jitted function from a seed (uint32) to random matrices of a shape; see `random_lm_params`."""

    def make(seed: jax.Array) -> jax.Array:
        # Layers are hashed apart: the index of one is below 2**32, that of a stack need not be.
        seed = _mixed(seed + jax.lax.broadcasted_iota(jnp.uint32, shape, 0)) if stacked else seed
        return _bell_shaped(seed, shape, int(stacked)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _quantized_maker(shape: Shape, scale_shape: Shape, dtype: Any, sharding: Any) -> Callable[..., QTensor]:
    """What `matrix_maker` makes for a stack, quantised without the stack of floats."""

    def make(seed: jax.Array) -> QTensor:
        def layer(number: jax.Array) -> QTensor:
            floats = _bell_shaped(_mixed(seed + number), shape[1:], 0)
            # Many of these numbers lie halfway between two integers: left to fuse the two, XLA would round some apart.
            made = quantize(jax.lax.optimization_barrier(floats), scale_shape[1:], dtype)
            # Bytes until all are there: XLA on the CPU writes a layer into packed numbers by copying them all.
            return dataclasses.replace(made, q=made.q.astype(jnp.int8))

        stack = jax.lax.map(layer, jnp.arange(shape[0], dtype=jnp.uint32))
        return dataclasses.replace(stack, q=stack.q.astype(dtype))

    return jax.jit(make, out_shardings=sharding)


def _bell_shaped(seed: jax.Array, shape: Shape, first_axis: int) -> jax.Array:
    """Float32 numbers, each a hash of `seed` and of its place along the axes from `first_axis` on."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(first_axis, len(shape)):
        index = index * np.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = _mixed(_mixed(index) ^ seed)
    # The sum of four uniform bytes is nearly normal (Irwin-Hall).
    total = sum((bits >> shift) & 255 for shift in (8, 16, 24)) + (bits & 255)
    return (total.astype(jnp.float32) - 4 * 127.5) * _SCALE


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def shape_sha256(fields: Mapping[str, Any]) -> str:
    """What stands for the hash of weight bytes: SHA-256 of the shape's fields and the seed."""
    content = json.dumps({"fields": dict(fields), "seed": SEED}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def byte_tokenizer() -> Tokenizer:
    """A token a byte: ids 0 to 2 are ``<s>``, ``</s>`` and ``<pad>``, byte b of the UTF-8 text is 3 + b."""
    letters = [_letter(byte) for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate((*_SPECIALS, *letters))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in _SPECIALS])
    return Tokenizer(backend, bos_id=0, eos_id=1, pad_id=2)


def _letter(byte: int) -> str:
    """The letter that byte-level BPE writes for a byte: itself where it prints, else the next from 256 on (GPT-2)."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printing:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printing].index(byte))
