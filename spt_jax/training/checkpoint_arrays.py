"""The arrays of a checkpoint: their names and digests, how they are read, and how they come onto the devices."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from spt_jax.parallel.distributed import told_by_lead
from spt_jax.parallel.rules import place_whole

Tree = Any


def tree_digest(tree: Tree) -> str:
    """The sha256 of every leaf with its path, type and shape, in the tree's order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tree_shapes(tree: Tree) -> dict[str, list[int]]:
    """``{"bank/prompts": [K, P, M], ...}``, as kept beside a checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def restore_targets(tree: Tree, sharding: Any) -> Tree:
    """The tree's shapes and types, as `Checkpoints.restore` wants them, with one sharding for all or a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)


def read_arrays(folder: Path, wanted: Tree) -> Tree:
    """Reads an item that Orbax wrote into the host's memory, one array after the other.

    Orbax's own reader opens all of them at once and waits for the first that fails; the others then complain, each with
    a traceback, into an event loop that is closed.

    Args:
        folder: Of the item, in Orbax's layout: zarr arrays in one OCDBT database, named by their path.
        wanted: A tree of the arrays' structure; its leaves are not looked at.

    Returns:
        The same tree, of NumPy arrays.

    Raises:
        ValueError: One is missing or damaged.
    """
    base = {"driver": "file", "path": f"{folder}/"}

    def read(path: Any, _: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return np.asarray(tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result().read().result())

    return jax.tree_util.tree_map_with_path(read, wanted)


def placed(target: jax.ShapeDtypeStruct, array: np.ndarray | None) -> jax.Array:
    """The first process's array as a global one of the sharding that is wanted; every process must ask.

    Args:
        target: Shape, type and sharding.
        array: Of that shape and type; None on the other processes.
    """
    if jax.process_count() > 1:
        content = told_by_lead(b"" if array is None else array.tobytes())
        array = np.frombuffer(content, target.dtype).reshape(target.shape)
    assert array is not None, "a process of its own has read it"
    return place_whole(array, target.sharding)
