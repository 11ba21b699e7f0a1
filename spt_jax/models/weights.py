"""Weights of a file to (sharded) device arrays, one tensor at a time.

The parameters of all layers are one array stacked on axis 0. A stack is made on its devices and filled layer by layer
in place, so the host never holds more than one tensor of the file; of a
memory-mapped one each shard reads its own part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree, abstract_params
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.family import Layout, Shape, TensorTable

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
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, perhaps a view of the file."""
        ...


@dataclasses.dataclass(frozen=True)
class _Parameter:
    path: tuple[str, ...]
    axes: tuple[str | None, ...]
    shape: Shape
    names: tuple[tuple[str, ...], ...]
    """For each layer (one, where layers are not stacked) the tensor, or a tensor a head."""
    stacked: bool
    layout: Layout

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

    tree: dict[tuple[str, ...], jax.Array] = {}
    for parameter in parameters:
        sharding = None if sharding_for is None else sharding_for(parameter.axes, parameter.shape)
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
        assert isinstance(leaf, nn.LogicallyPartitioned)
        shape = leaf.value.shape
        stacked = path[0] == "layers"
        spelled = [name for name in rule.names if name.format(prefix=prefix, layer=0, head=0) in checkpoint.shapes]
        name = (spelled or rule.names)[0]
        heads = range(shape[-2]) if "{head}" in name else range(1)
        names = tuple(
            tuple(name.format(prefix=prefix, layer=layer, head=head) for head in heads)
            for layer in range(config.num_layers if stacked else 1)
        )
        parameters.append(_Parameter(path, leaf.names, shape, names, stacked, rule.layout))
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
        if not np.array_equal(checkpoint.read(head), checkpoint.read(embedding)):
            raise UserError(
                f"{checkpoint.where}: the configuration ties the head to the embedding table, "
                f"but the tensors {head} and {embedding} differ"
            )
    if leftover:
        raise UserError(
            f"{checkpoint.where} holds tensors that its configuration has no place for: {_listed(sorted(leftover))}"
        )


def _listed(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def _read(
    config: DecoderConfig,
    parameter: _Parameter,
    checkpoint: Checkpoint,
    sharding: jax.sharding.Sharding | None,
    advance: Callable[[int], None],
) -> jax.Array:
    dtype = config.jax_dtype

    def arranged(names: tuple[str, ...]) -> np.ndarray:
        arrays = [checkpoint.read(name) for name in names]
        stored = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return parameter.layout.arrange(config, stored, parameter.layer_shape)

    if not parameter.stacked:
        array = _placed(arranged(parameter.names[0]), dtype, sharding)
        advance(array.size)
        return array
    layer_sharding = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        layer_sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    stack = _empty_stack(parameter.shape, dtype, sharding)()
    write = _layer_writer(sharding)
    for number, names in enumerate(parameter.names):
        layer = _placed(arranged(names), dtype, layer_sharding)
        stack = write(stack, layer, number)
        advance(layer.size)
    return stack


@functools.lru_cache(maxsize=64)  # parameters of one shape share one compilation
def _empty_stack(shape: Shape, dtype: Any, sharding: jax.sharding.Sharding | None) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _layer_writer(sharding: jax.sharding.Sharding | None) -> Callable[..., jax.Array]:
    return jax.jit(_write_layer, donate_argnums=0, out_shardings=sharding)


def _write_layer(stack: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)


def _placed(view: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    # Always a copy: JAX may borrow a NumPy array's memory, and the file's pages must not stay mapped.
    if sharding is None:
        return jnp.asarray(np.array(view, dtype, order="C"))
    return jax.make_array_from_callback(view.shape, sharding, lambda index: np.array(view[index], dtype, order="C"))
