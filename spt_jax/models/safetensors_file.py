"""Safetensors files of a Hugging Face folder, one or many, as lazily read arrays.

The format is eight bytes of header length, a JSON header of names, types, shapes and byte ranges, and the bytes
(https://huggingface.co/docs/safetensors). We map the bytes ourselves because the package's NumPy door has no bfloat16,
and because a mapped view lets each device's shard read its own pages alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spt_jax.errors import UserError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_INDEX = "model.safetensors.index.json"
_UNSUPPORTED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.gguf")


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

    Raises:
        UserError: No weight file, an unsupported one, a missing shard, or an empty, truncated or damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._entries: dict[str, _Entry] = {}
        index = folder / _INDEX
        if index.is_file():
            self.files = _shards(index)
        else:
            self.files = tuple(sorted(folder.glob("*.safetensors")))
            if len(self.files) > 1 and folder / "model.safetensors" in self.files:
                self.files = (folder / "model.safetensors",)
        if not self.files:
            raise UserError(_nothing_found(folder))
        for file in self.files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    other = self._entries[name].path.name
                    raise UserError(f"{folder}: the tensor {name!r} is in both {other} and {file.name}")
                self._entries[name] = entry
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the file, in the file's type.

        Raises:
            UserError: Its type is not a floating-point one that we can read.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{entry.path}: the tensor {name!r} has type {entry.dtype}, which is not supported; "
                f"supported: {', '.join(_DTYPES)}"
            )
        return np.memmap(entry.path, dtype=_DTYPES[entry.dtype], mode="r", offset=entry.start, shape=entry.shape)


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index (JSON with a 'weight_map'): {error}") from error
    files = tuple(index.parent / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index} names {len(files)} shards, but {', '.join(missing)} is missing from {index.parent}")
    return files


def _nothing_found(folder: Path) -> str:
    others = sorted(file.name for pattern in _UNSUPPORTED for file in folder.glob(pattern))
    if others:
        return f"{folder} holds {others[0]}, which is not supported here; supported in a folder: *.safetensors"
    return f"{folder} holds no weight file; expected model.safetensors or {_INDEX} with its shards"


def _span(fields: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, end = fields["data_offsets"]
    return str(fields["dtype"]), tuple(int(n) for n in fields["shape"]), int(start), int(end)


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty; download it again")
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is truncated or not a safetensors file: {size} bytes, header of {length}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            spans = {name: _span(fields) for name, fields in header.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is not a safetensors file: its header does not parse ({error})") from error
    expected = 8 + length + max((span[3] for span in spans.values()), default=0)
    if size < expected:
        raise UserError(f"{path} is truncated: {size} bytes, its header describes {expected}; download it again")
    for name, (dtype, shape, start, end) in spans.items():
        if dtype in _DTYPES and end - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise UserError(f"{path} is damaged: the tensor {name!r} of {dtype} {shape} takes {end - start} bytes")
    return {name: _Entry(path, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in spans.items()}
