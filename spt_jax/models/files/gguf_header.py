"""What stands before the numbers in a GGUF file: its fields, and where each tensor lies.

The layout is llama.cpp's, version 2 and 3, little-endian:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes an object of every
element of every array: 14 seconds and 1.2 GB for a vocabulary of 262,144.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from spt_jax.errors import UserError

_STRING, _ARRAY, _FLOAT32, _BOOL = 8, 9, 6, 7
_SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    _FLOAT32: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_ALIGNMENTS = [1 << power for power in range(3, 32)]
_DEEPEST = 4  # arrays within arrays


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as it lies in the file.

    Attributes:
        kind: How its numbers are stored.
        shape: Its shape in NumPy's order.
        data: uint8 ``[rows, bytes of a row]``, a view of the file.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The fields of a GGUF file as Python values, and its tensors by name; no number of a tensor is read.

    Raises:
        UserError: The file is missing, empty, truncated, of another version, or not GGUF.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; download it again")
    content = np.memmap(path, np.uint8, "r")
    if (magic := bytes(content[:4])) != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
    try:
        return _Header(content).read()
    except (ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
        raise UserError(
            f"{path} cannot be read as GGUF: it is truncated, damaged or of a newer kind ({error})"
        ) from error


class _Header:
    """A cursor over the bytes of a file; what does not fit raises `ValueError`."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content
        self.buffer = content.data
        self.place = 4

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        version = self.number(_U32)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3, little-endian, can be read")
        num_tensors, num_fields = self.number(_U64), self.number(_U64)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self.string()
            if name in fields:
                raise ValueError(f"the field {name!r} occurs twice")
            fields[name] = self.value(self.number(_U32))
        places: dict[str, tuple[gguf.GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(num_tensors):
            name = self.string()
            if name in places:
                raise ValueError(f"the tensor {name!r} occurs twice")
            sizes = [self.number(_U64) for _ in range(self.within(self.number(_U32), 8))]
            places[name] = gguf.GGMLQuantizationType(self.number(_U32)), tuple(reversed(sizes)), self.number(_U64)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise ValueError(f"its alignment is {alignment!r}, which is no power of two")
        start = math.ceil(self.place / alignment) * alignment
        return fields, {name: self.tensor(name, start + offset, k, s) for name, (k, s, offset) in places.items()}

    def tensor(self, name: str, start: int, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> StoredTensor:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = shape or (1,)
        if 0 in shape:  # beside a zero the other sizes could be anything
            raise ValueError(f"the tensor {name!r} has no numbers: its shape is {shape}")
        if shape[-1] % block:
            raise ValueError(
                f"rows of {shape[-1]} in the tensor {name!r} are no multiple of the {block} of {kind.name}"
            )
        rows, width = math.prod(shape[:-1]), shape[-1] // block * size
        end = start + rows * width
        if end > len(self.content):
            raise ValueError(f"the tensor {name!r} ends at byte {end} of {len(self.content)}")
        return StoredTensor(kind, shape, self.content[start:end].reshape(rows, width))

    def take(self, size: int) -> memoryview:
        start, self.place = self.place, self.place + size
        if self.place > len(self.buffer):
            raise ValueError(f"it ends at byte {len(self.buffer)}, within its header")
        return self.buffer[start : self.place]

    def within(self, count: int, most: int) -> int:
        if count > most:
            raise ValueError(f"{count} where at most {most} can be")
        return count

    def number(self, kind: struct.Struct) -> int:
        return kind.unpack(self.take(kind.size))[0]

    def string(self) -> str:
        return str(self.take(self.number(_U64)), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element = self.number(_U32)
            count = self.within(self.number(_U64), len(self.buffer))
            self.within(depth, _DEEPEST)
            if element in (_STRING, _ARRAY):
                return [self.value(element, depth + 1) for _ in range(count)]
            return self.scalars(element, count)
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"{kind} is not a type of field")
        dtype = _SCALARS[kind]
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _FLOAT32 and count == 1:
            return [float(str(values[0]))]  # the shortest decimal: 1e-05, not 9.999999747378752e-06
        return (values != 0).tolist() if kind == _BOOL else values.tolist()
