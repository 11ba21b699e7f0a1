"""Safetensors files of a Hugging Face folder, one or many, as lazily read arrays.

The format is eight bytes of header length, a JSON header of names, types, shapes and byte ranges, and the bytes
(https://huggingface.co/docs/safetensors). We map the bytes ourselves because the package's NumPy door has no bfloat16,
and because a mapped view lets each device's shard read its own pages alone.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.json_text import parse_json
from spt_jax.models.files.weight_shards import FLOATING, mapped, shards_of, weight_file_size

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

_MOST = 1 << 63  # bytes, or the size of an axis, that can be
_MOST_AXES = 32


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFolder:
    """The weights of a folder: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    Attributes:
        where: The folder, for messages.
        files: The weight files, in the order of their names.
        shapes: Shape of every tensor by name, known before any weight is read.
        dtypes: Type of every tensor by name, as the file spells it (``"F32"``, ``"BF16"``, ...).

    Raises:
        UserError: No weight file, a missing shard, or an empty, truncated or damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._entries: dict[str, _Entry] = {}
        self.files = _files(folder)
        for file in self.files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    other = self._entries[name].path.name
                    raise UserError(f"{folder}: the tensor {name!r} is in both {other} and {file.name}")
                self._entries[name] = entry
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the file, in the file's type.

        Raises:
            UserError: Its type is not a floating-point one that we can read, or the file is gone or was cut.
        """
        entry = self._entries[name]
        if entry.dtype not in FLOATING:
            raise UserError(
                f"{entry.path}: the tensor {name!r} has type {entry.dtype}, which is not supported; "
                f"supported: {', '.join(FLOATING)}"
            )
        if 0 in entry.shape:  # nothing to map
            try:
                return np.empty(entry.shape, FLOATING[entry.dtype])
            except ValueError as error:  # beside a zero the other sizes can be anything
                raise UserError(f"{entry.path} is damaged: the tensor {name!r} has shape {entry.shape}") from error
        return mapped(entry.path, FLOATING[entry.dtype], entry.start, entry.shape)


def _files(folder: Path) -> tuple[Path, ...]:
    if (folder / SAFETENSORS_FILE).is_file():
        return (folder / SAFETENSORS_FILE,)
    if (folder / SAFETENSORS_INDEX).is_file():
        return shards_of(folder / SAFETENSORS_INDEX)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UserError(f"{folder} holds no weight file; expected {SAFETENSORS_FILE} or {SAFETENSORS_INDEX}")
    return files


def _span(fields: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    shape, places = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(n) is int for n in (*shape, *places)):
        raise ValueError("a tensor whose shape or place is not in whole numbers")
    start, end = places
    if not 0 <= start <= end < _MOST or any(not 0 <= n < _MOST for n in shape) or len(shape) > _MOST_AXES:
        raise ValueError("a tensor with impossible shape or place")
    return str(fields["dtype"]), shape, start, end


def _read_header(path: Path) -> dict[str, _Entry]:
    size = weight_file_size(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is truncated or not a safetensors file: {size} bytes, header of {length}")
        try:
            header = parse_json(stream.read(length))
            about = header.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in about.values()):
                raise ValueError("its __metadata__ is not texts by name")
            spans = {name: _span(fields) for name, fields in header.items()}
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            raise UserError(f"{path} is not a safetensors file: its header does not parse ({error})") from error
    expected = 8 + length + max((span[3] for span in spans.values()), default=0)
    if size < expected:
        raise UserError(f"{path} is truncated: {size} bytes, its header describes {expected}; download it again")
    reached = 0
    for name, (_, _, start, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if start != reached:  # the format allows no gap, and no byte that is two tensors'
            raise UserError(f"{path} is damaged: the tensor {name!r} begins at byte {start} of the data, not {reached}")
        reached = end
    if size > expected:
        raise UserError(f"{path} is damaged: {size} bytes, its header describes {expected}")
    for name, (dtype, shape, start, end) in spans.items():
        if dtype in FLOATING and end - start != math.prod(shape) * np.dtype(FLOATING[dtype]).itemsize:
            raise UserError(f"{path} is damaged: the tensor {name!r} of {dtype} {shape} takes {end - start} bytes")
    return {name: _Entry(path, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in spans.items()}
