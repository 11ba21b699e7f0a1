"""A GGUF file, whole or in parts: its metadata and its tensors, dequantised by the `gguf` package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from spt_jax.errors import UserError
from spt_jax.models.files.gguf_header import read_header

ROPE_TENSORS = ("rope_freqs", "rope_factors_short", "rope_factors_long")
"""Tensors that describe the rotation (Llama 3's and LongRoPE's divisors of its frequencies), without ``.weight``."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SLICE = 1 << 20  # numbers dequantised at once


class GGUFFile:
    """An opened GGUF file, or the parts of one (``NAME-00001-of-00003.gguf``) as one file.

    Attributes:
        where: The path, for messages.
        files: The file, or its parts in order.
        metadata: Every field but the header's own, as Python values; the tensors `ROPE_TENSORS` appear as lists under
            their names.
        shapes: Shape of every tensor by name, in NumPy's order.
        dtypes: Type of every tensor by name, ``"F32"``, ``"Q4_K"``.

    Raises:
        UserError: The file is missing, empty, truncated or not GGUF, or a part of it is.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.files = parts_of(path)
        headers = [read_header(file) for file in self.files]
        self.metadata: dict[str, Any] = headers[0][0]
        self._tensors = {name: tensor for _, tensors in headers for name, tensor in tensors.items()}
        self._check_parts(sum(len(tensors) for _, tensors in headers))
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.kind.name for name, tensor in self._tensors.items()}
        for name in ROPE_TENSORS:
            if f"{name}.weight" in self._tensors:
                self.metadata[name] = self.read(f"{name}.weight").tolist()

    def _check_parts(self, found: int) -> None:
        count, wanted = self.metadata.get("split.count", 1), self.metadata.get("split.tensors.count", found)
        if type(count) is not int or type(wanted) is not int:
            raise UserError(f"{self.where} is damaged: its number of parts or of their tensors is no whole number")
        if count != len(self.files) and count > 1:
            first = _part(self.files[0].with_suffix(""), 1, count).name
            raise UserError(
                f"{self.where} is one of {count} parts of a GGUF file, but its name does not say which; name the parts "
                f"as they were made, {first} and so on, in one folder"
            )
        if len(self.files) > 1 and (found != len(self._tensors) or wanted != found):
            raise UserError(
                f"{self.where}: the {len(self.files)} parts hold {len(self._tensors)} tensors by different names in "
                f"{found}, and the first says {wanted}; they are not the parts of one file"
            )

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as float32; a view of the file where it is stored so.

        Host memory is that of the result and a few megabytes: rows are dequantised slice by slice.

        Raises:
            UserError: The package cannot dequantise its type.
        """
        tensor = self._tensors[name]
        kind, shape, rows = tensor.kind, tensor.shape, tensor.data
        if kind == gguf.GGMLQuantizationType.F32:
            return rows.view(np.float32).reshape(shape)
        values = np.empty((len(rows), shape[-1]), np.float32)
        step = max(1, _SLICE // shape[-1])
        try:
            for start in range(0, len(rows), step):
                values[start : start + step] = gguf.quants.dequantize(rows[start : start + step], kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.where}: the tensor {name!r} has type {kind.name}, which the gguf package cannot dequantise"
            ) from error
        return values.reshape(shape)


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files that make up the GGUF file at `path`: itself, or all parts where it is one of several.

    Parts are known by llama.cpp's names, ``NAME-00001-of-00003.gguf``; any of them stands for the whole.

    Raises:
        UserError: Parts are missing; names them.
    """
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= 99_999:
        return (path,)
    files = tuple(_part(path.with_name(match["stem"]), i + 1, int(match["count"])) for i in range(int(match["count"])))
    if missing := [file.name for file in files if not file.is_file()]:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise UserError(f"{path} is one of {len(files)} parts of a GGUF file, but {shown} is missing from its folder")
    return files


def _part(stem: Path, number: int, count: int) -> Path:
    return stem.with_name(f"{stem.name}-{number:05}-of-{count:05}.gguf")
