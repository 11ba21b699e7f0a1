"""The weight files of a folder: which ones an index names, and what each must be before its header is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spt_jax.errors import UserError
from spt_jax.json_text import parse_json

FLOATING: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
"""Types of tensors that can be read, by safetensors' names for them."""

_LONGEST_NAME = 255  # bytes, on every file system in use
_LFS_POINTER = b"version https://git-lfs"


def shard_names(index: Path) -> tuple[str, ...]:
    """The file names in the ``weight_map`` of an index such as ``model.safetensors.index.json``, sorted.

    Raises:
        UserError: It is not such an index, or it names a file outside its folder.
    """
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if name != Path(name).name or name in ("", "..") or "\0" in name]
        too_long = [name for name in names if len(os.fsencode(name)) > _LONGEST_NAME]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not an index of weight files (JSON with a 'weight_map'): {error}") from error
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, which is not a file in its own folder")
    if too_long:
        raise UserError(
            f"{index} names a file {too_long[0][:40]!r}..., longer than the {_LONGEST_NAME} bytes of a name"
        )
    if not names:
        raise UserError(f"{index} names no weight file: its 'weight_map' is empty")
    return tuple(names)


def shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of which are there.

    Raises:
        UserError: As `shard_names`; or a file is missing.
    """
    files = tuple(index.parent / name for name in shard_names(index))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index} names {len(files)} shards, but {', '.join(missing)} is missing from {index.parent}")
    return files


def mapped(path: Path, dtype: Any, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of a weight file as a read-only view of it, from the byte `start` on.

    The file's size is looked at again: to touch a page beyond the end of a mapped file would kill the process.

    Raises:
        UserError: The file is gone, cannot be opened, or ends before the last number.
    """
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} has changed since its header was read ({error}); nothing may move, cut or replace it while it is "
            "being loaded"
        ) from error


def weight_file_size(path: Path) -> int:
    """Bytes of a weight file.

    Raises:
        UserError: It is empty, or the pointer that git leaves in place of a large file.
    """
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty; download it again")
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer, not the weights; 'git lfs pull' in its folder fetches them")
    return size
