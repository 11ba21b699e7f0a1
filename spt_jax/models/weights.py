"""Weights of a file to (sharded) device arrays, one tensor at a time.

The parameters of all layers are one array stacked on axis 0. A stack is made on its devices and filled layer by layer
in place, so the host never holds more than one tensor of the file; of a memory-mapped one each shard reads its own
part. A quantised kernel is quantised on its devices, a layer at a time, from the numbers in the file: no stack of
floats ever exists.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.family import Layout, Shape, TensorTable
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.host_transfer import to_devices
from spt_jax.models.quantized import QTensor, quantize

ShardingFor = Callable[[tuple[str | None, ...], Shape], jax.sharding.Sharding]
"""Logical axis names and shape of a (stacked) parameter to its sharding."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, parameters done so far, and parameters in all."""


class Checkpoint(Protocol):
    """Weight files as a reader shows them; see `SafetensorsFolder` and `GGUFFile`."""

    @property
    def where(self) -> str:
        """The folder or file, for messages."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Type of every tensor by name, as its format spells it."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, perhaps a view of the file."""
        ...


@dataclasses.dataclass(frozen=True)
class _Parameter:
    path: tuple[str, ...]
    leaf: Any
    """Shape, type and logical axes: a `LogicallyPartitioned`, or a `QTensor` of them."""
    names: tuple[tuple[str, ...], ...]
    """For each layer (one, where layers are not stacked) the tensor, or a tensor a head."""
    stacked: bool
    layout: Layout

    @property
    def quantized(self) -> bool:
        return isinstance(self.leaf, QTensor)

    @property
    def shape(self) -> Shape:
        return kernel_shape(self.leaf)

    @property
    def layer_shape(self) -> Shape:
        return self.shape[1:] if self.stacked else self.shape


def load_params(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    table: TensorTable,
    *,
    sharding_for: ShardingFor | None = None,
    progress: Progress | None = None,
) -> FrozenTree:
    """Reads every tensor of a checkpoint into our tree.

    Names and shapes are checked before any memory is taken.

    Args:
        config: The decoder; its dtype is the type of the result.
        checkpoint: The opened weight files.
        table: The family's tensors in this kind of file.
        sharding_for: Where each parameter goes; None for the default device.
        progress: Told after every tensor.

    Returns:
        The frozen tree.

    Raises:
        UserError: A tensor is missing, left over, or has another shape; all such tensors are named.
    """
    parameters = _match(config, checkpoint, table)
    total = sum(int(np.prod(parameter.shape)) for parameter in parameters)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("loading weights", done, total)

    tree: dict[tuple[str, ...], Any] = {}
    # The large first, while there is room: whole tables, then stacks.
    for parameter in sorted(parameters, key=lambda parameter: (parameter.stacked, -math.prod(parameter.shape))):
        sharding = shardings_of(parameter.leaf, sharding_for)
        tree[parameter.path] = _read(config, parameter, checkpoint, sharding, advance)
    return traverse_util.unflatten_dict(tree)


def check_tensors(config: DecoderConfig, checkpoint: Checkpoint, table: TensorTable) -> None:
    """Sees that names and shapes of a checkpoint's tensors are the configuration's, as `load_params` does first.

    Raises:
        UserError: A tensor is missing, left over, or has another shape; all such tensors are named.
    """
    _match(config, checkpoint, table)


def _match(config: DecoderConfig, checkpoint: Checkpoint, table: TensorTable) -> list[_Parameter]:
    ours = traverse_util.flatten_dict(abstract_params(config))
    prefix = table.prefix_in(checkpoint.shapes)
    parameters = []
    for rule in table.rules:
        path = tuple(rule.path.split("/"))
        leaf = ours.pop(path, None)
        if leaf is None:
            continue
        shape = kernel_shape(leaf)
        stacked = path[0] == "layers"
        spelled = [name for name in rule.names if name.format(prefix=prefix, layer=0, head=0) in checkpoint.shapes]
        name = (spelled or rule.names)[0]
        heads = range(shape[-2]) if "{head}" in name else range(1)
        names = tuple(
            tuple(name.format(prefix=prefix, layer=layer, head=head) for head in heads)
            for layer in range(config.num_layers if stacked else 1)
        )
        parameters.append(_Parameter(path, leaf, names, stacked, rule.layout))
    if ours:
        raise RuntimeError(f"the family's table has no rule for {', '.join('/'.join(path) for path in ours)}")
    wanted = {name for parameter in parameters for layer in parameter.names for name in layer}
    _check_names(config, checkpoint, table, prefix, wanted)
    wrong = [
        f"{name} is {checkpoint.shapes[name]} and should be {expected}"
        for parameter in parameters
        for expected in [_stored_shape(config, parameter)]
        for layer in parameter.names
        for name in layer
        if checkpoint.shapes[name] != expected
    ]
    if wrong:
        wrong = list(dict.fromkeys(wrong))  # joined tensors are asked for once a part
        raise UserError(f"{checkpoint.where}: tensors of the wrong shape for its configuration: {_listed(wrong)}")
    return parameters


def _stored_shape(config: DecoderConfig, parameter: _Parameter) -> Shape:
    shape = parameter.layer_shape
    return parameter.layout.stored_shape(config, shape[1:] if len(parameter.names[0]) > 1 else shape)


def _check_names(
    config: DecoderConfig, checkpoint: Checkpoint, table: TensorTable, prefix: str, wanted: set[str]
) -> None:
    found = {name for name in checkpoint.shapes if not table.ignores(name)}
    if missing := sorted(wanted - found):
        raise UserError(f"{checkpoint.where} lacks tensors that its configuration asks for: {_listed(missing)}")
    leftover = found - wanted
    embedding = table.embedding.format(prefix=prefix)
    for head in leftover.intersection(table.heads) if config.tie_word_embeddings else ():
        leftover.remove(head)
        if not _equal(checkpoint.read(head), checkpoint.read(embedding)):
            raise UserError(
                f"{checkpoint.where}: the configuration ties the head to the embedding table, "
                f"but the tensors {head} and {embedding} differ"
            )
    if leftover:
        raise UserError(
            f"{checkpoint.where} holds tensors that its configuration has no place for: {_listed(sorted(leftover))}"
        )


def _equal(table: np.ndarray, other: np.ndarray) -> bool:
    if table.shape != other.shape:
        return False
    if table.dtype == other.dtype:  # a copy has the same bits, and they compare faster than bfloat16 does
        table, other = (array.view(f"u{array.itemsize}") for array in (table, other))
    pieces = range(0, len(table), 1024)  # so that the comparisons of a large table do not stand in memory at once
    return all(np.array_equal(table[i : i + 1024], other[i : i + 1024]) for i in pieces)


def _listed(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def _read(
    config: DecoderConfig,
    parameter: _Parameter,
    checkpoint: Checkpoint,
    sharding: Any,
    advance: Callable[[int], None],
) -> Any:
    def arranged(names: tuple[str, ...]) -> np.ndarray:
        arrays = [checkpoint.read(name) for name in names]
        stored = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        view = parameter.layout.arrange(config, stored, parameter.layer_shape)
        return view.astype(np.float32) if view.dtype == np.float64 else view  # JAX has no float64 by default

    if not parameter.stacked:
        array = to_devices(arranged(parameter.names[0]), sharding)
        if array.dtype != config.jax_dtype:  # only here, where the file's pages are no longer mapped
            array = jax.block_until_ready(_converter(config.jax_dtype, sharding)(array))
        advance(array.size)
        return array
    layer_sharding = sharding.q if parameter.quantized and sharding is not None else sharding
    if isinstance(layer_sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*layer_sharding.spec[1:])
        layer_sharding = jax.sharding.NamedSharding(layer_sharding.mesh, spec)
    shapes = map_boxes(lambda box: box.value, parameter.leaf)
    packed = parameter.quantized and shapes.q.dtype == jnp.int4
    if packed:  # XLA on the CPU writes a layer into packed numbers by copying them all: bytes until all are there
        shapes = shapes.replace(q=jax.ShapeDtypeStruct(shapes.q.shape, jnp.int8))
    stack = _empty_stack(shapes, sharding)()
    write = _layer_writer(parameter.leaf.q.value.dtype if parameter.quantized else None, sharding)
    for number, names in enumerate(parameter.names):
        # In the file's type: what a quantised kernel is rounded from. One layer at a time: the host does not run ahead.
        layer = to_devices(arranged(names), layer_sharding, borrow=True)
        stack = jax.block_until_ready(write(stack, layer, number))
        advance(layer.size)
        del layer
    return jax.block_until_ready(_packer(sharding)(stack)) if packed else stack


def kernel_shape(leaf: Any) -> Shape:
    """The shape that a leaf of `abstract_params` stands for, quantised or not."""
    return (leaf.q if isinstance(leaf, QTensor) else leaf).value.shape


def shardings_of(leaf: Any, sharding_for: ShardingFor | None) -> Any:
    """The sharding of a leaf of `abstract_params`, or a `QTensor` of those of a quantised kernel's leaves."""
    return None if sharding_for is None else map_boxes(lambda box: sharding_for(box.names, box.value.shape), leaf)


def map_boxes(function: Callable[[nn.LogicallyPartitioned], Any], leaf: Any) -> Any:
    """Applies a function to a leaf of `abstract_params`, or to each of a quantised kernel's."""
    return jax.tree.map(function, leaf, is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned))


@functools.lru_cache(maxsize=64)  # parameters of one shape share one compilation
def _empty_stack(shapes: Any, sharding: Any) -> Callable[[], Any]:
    return jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _packer(sharding: Any) -> Callable[[QTensor], QTensor]:
    return jax.jit(lambda stack: dataclasses.replace(stack, q=stack.q.astype(jnp.int4)), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _layer_writer(dtype: Any, sharding: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_write_layer, dtype), donate_argnums=0, out_shardings=sharding)


def _write_layer(dtype: Any, stack: Any, layer: jax.Array, number: jax.Array) -> Any:
    written: Any = layer
    if isinstance(stack, QTensor):
        written = quantize(layer, stack.scale.shape[1:], dtype)
    return jax.tree.map(functools.partial(_with_layer, number), stack, written)


def _with_layer(number: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
    layer = layer.astype(stack.dtype)
    if stack.dtype != jnp.bfloat16:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)
    # As plain bits: XLA on the CPU takes seven times as long to move bfloat16.
    stack, layer = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (stack, layer))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0), jnp.bfloat16)


@functools.lru_cache(maxsize=64)
def _converter(dtype: Any, sharding: jax.sharding.Sharding | None) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)
