"""Frozen trees of dequantised weights in the cache folder: to dequantise a file again takes longer than to read it.

An entry is a folder with ``model.safetensors``, the tree in its final type and shapes (all layers of a parameter in one
tensor), and ``checksums.json``, the CRC-32 of each tensor's bytes. Both are checked before a number is used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from spt_jax.cache_folder import code_digest, drop, entry_path, key_of, make_room, new_folder_entry, touch
from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.files.safetensors_file import SAFETENSORS_FILE, SafetensorsFolder
from spt_jax.models.files.weight_shards import FLOATING
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.host_transfer import to_devices
from spt_jax.models.weights import Checkpoint, Progress, ShardingFor, kernel_shape, shardings_of

CHECKSUM_FILE = "checksums.json"
WORTH_NUMBERS = 1 << 24
"""Fewer numbers are dequantised in a tenth of a second."""

# Buffers beside the weights, such as Pythia's causal masks.
_NO_WEIGHTS = re.compile(r"BOOL|[IU]\d+")
_NAMES = {np.dtype(dtype): name for name, dtype in FLOATING.items()}


def is_worth_keeping(config: DecoderConfig, checkpoint: Checkpoint) -> bool:
    """Whether a tree is read faster than made again: many numbers that a file holds in less than 16 bits each.

    A tree with kernels in int8 or int4 is made from the floats each time, and one process of several keeps nothing.
    """
    quantized = {
        name for name, dtype in checkpoint.dtypes.items() if dtype not in FLOATING and not _NO_WEIGHTS.fullmatch(dtype)
    }
    numbers = sum(math.prod(checkpoint.shapes[name]) for name in quantized)
    return config.quantization == "none" and jax.process_count() == 1 and numbers >= WORTH_NUMBERS


def kept_params(
    load: Callable[[], FrozenTree],
    config: DecoderConfig,
    sha256: str,
    *,
    sharding_for: ShardingFor | None = None,
    progress: Progress | None = None,
) -> FrozenTree:
    """The tree that `load` gives: from the cache folder where it is there and whole, else made and kept.

    Args:
        load: Makes the tree.
        config: The decoder; its dtype is that of the tree.
        sha256: Of the weight files.
        sharding_for: Where each parameter goes; see `spt_jax.models.weights.load_params`.
        progress: Told after every parameter that is read.
    """
    makers = code_digest("spt_jax.models"), importlib.metadata.version("gguf"), importlib.metadata.version("numpy")
    entry = entry_path("weights", key_of(sha256, config.dtype, *makers))
    if entry is None:
        return load()
    if entry.is_dir():
        try:
            params = _read(entry, config, sharding_for, progress)
            touch(entry)
            return params
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            drop(entry)  # truncated or damaged
    params = load()
    with contextlib.suppress(OSError):
        _write(entry, params)
    return params


def _read(
    entry: Path, config: DecoderConfig, sharding_for: ShardingFor | None, progress: Progress | None
) -> FrozenTree:
    checksums = json_object(entry / CHECKSUM_FILE)
    file = SafetensorsFolder(entry)
    leaves: dict[str, Any] = traverse_util.flatten_dict(abstract_params(config), sep="/")
    wanted = {name: (kernel_shape(leaf), _NAMES[np.dtype(leaf.value.dtype)]) for name, leaf in leaves.items()}
    found = {name: (shape, file.dtypes[name]) for name, shape in file.shapes.items()}
    if found != wanted:
        raise ValueError("it holds other tensors")

    def placed(name: str) -> jax.Array:
        view = file.read(name)
        if zlib.crc32(_bytes(view)) != checksums[name]:
            raise ValueError(f"the tensor {name!r} is damaged")
        return to_devices(view, shardings_of(leaves[name], sharding_for))

    total, done = sum(math.prod(shape) for shape, _ in wanted.values()), 0
    tree: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(2) as threads:  # one reads and checks while the other copies
        for name, array in zip(leaves, threads.map(placed, leaves), strict=True):
            tree[name] = array
            done += array.size
            if progress is not None:
                progress("loading weights", done, total)
    return traverse_util.unflatten_dict(tree, sep="/")


def _write(entry: Path, params: FrozenTree) -> None:
    """Writes an entry, unless the tree is spread over devices, or there is no room.

    Raises:
        OSError: It cannot be written; nothing is left then.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    whole = all(leaf.is_fully_replicated and leaf.is_fully_addressable for leaf in leaves.values())
    if not whole or not make_room(sum(leaf.nbytes for leaf in leaves.values())):
        return
    header, end = {}, 0
    for name, leaf in leaves.items():
        start, end = end, end + leaf.nbytes
        header[name] = {"dtype": _NAMES[leaf.dtype], "shape": leaf.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    # Not flushed to the disk: what a crash of the machine loses is found by its checksum.
    with new_folder_entry(entry) as folder:
        with (folder / SAFETENSORS_FILE).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, leaf in leaves.items():
                content = _bytes(np.ascontiguousarray(leaf.addressable_data(0)))
                checksums[name] = zlib.crc32(content)
                stream.write(content)
        (folder / CHECKSUM_FILE).write_text(json.dumps(checksums), encoding="utf-8")


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
