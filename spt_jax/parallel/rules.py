"""Which mesh axis shards which logical axis of an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from spt_jax.parallel.mesh import ROW_AXES

LOGICAL_AXIS_RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "positions": None,
}


def parameter_sharding(mesh: Mesh | AbstractMesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of one frozen parameter.

    An axis that its mesh axis does not divide evenly (three key-value heads on two devices, say) is replicated.

    Args:
        mesh: The mesh.
        names: A logical name for each axis; None replicates it.
        shape: The array's shape.
    """
    axes = [LOGICAL_AXIS_RULES[name] if name else None for name in names]
    even = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*even))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same values on every device: the trainable tree, the optimizer's state, scalars."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis (rows) over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def attention_sharding(mesh: Mesh) -> NamedSharding:
    """Of queries, keys and values ``[B, T, H, head_dim]`` of whole rows: rows as they are, heads as their weights."""
    return NamedSharding(mesh, PartitionSpec(*row_sharding(mesh).spec, None, LOGICAL_AXIS_RULES["heads"], None))


def cache_sharding(rows: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Of keys and values ``[L, B, G, C, head_dim]`` whose rows lie like this: heads as the weights that make them."""
    heads = parameter_sharding(rows.mesh, (None, None, "kv_heads", None, None), shape).spec[2]
    return NamedSharding(rows.mesh, PartitionSpec(None, rows.spec[0] if rows.spec else None, heads))


def row_devices(mesh: Mesh | AbstractMesh) -> int:
    """In how many parts rows are split; the batch must be a multiple."""
    return int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))


def rows_here(mesh: Mesh, count: int) -> np.ndarray:
    """int ``[rows]``, ascending: those of `count` rows that lie on this process's devices.

    Processes that share rows, because an axis other than the row axes runs through them, have the same.
    """
    places = row_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[place] for place in places]))


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a process's part of a batch onto the mesh: rows over the row axes, ``similar`` (all pairs) on every device.

    Args:
        mesh: The mesh.
        batch: The rows `rows_here` of each array and, where there are pairs, the global ``similar``.

    Returns:
        Global arrays.
    """
    return {
        name: place_whole(x, replicated(mesh)) if name == "similar" else _place_rows(mesh, x)
        for name, x in batch.items()
    }


def place_whole_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The same for a batch that every process has whole."""
    return {name: place_whole(x, row_sharding(mesh)) for name, x in batch.items()}


def place_whole(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, as one global array."""
    if sharding.is_fully_addressable:
        return jax.make_array_from_process_local_data(sharding, x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def _place_rows(mesh: Mesh, x: np.ndarray) -> jax.Array:
    sharding = row_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.make_array_from_process_local_data(sharding, x)
    parts = rows_here(mesh, row_devices(mesh))
    size = len(x) // len(parts)

    def part(index: Any) -> np.ndarray:
        first = int(np.searchsorted(parts, (index[0].start or 0) // size)) * size
        return x[first : first + size]

    return jax.make_array_from_callback((size * row_devices(mesh), *x.shape[1:]), sharding, part)
