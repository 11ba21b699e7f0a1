"""A GGUF file: its metadata and its tensors, dequantised by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from spt_jax.errors import UserError

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """An opened GGUF file.

    Attributes:
        where: The path, for messages.
        files: The path alone, as a tuple.
        metadata: Every field but the header's own, as Python values; the tensor ``rope_freqs.weight`` (Llama 3's
            divisors of the rotary frequencies) appears as the list ``rope_freqs``.
        shapes: Shape of every tensor by name, in NumPy's order.

    Raises:
        UserError: The file is missing, empty, truncated or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.files = (path,)
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty; download it again")
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: _value(field) for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{path} cannot be read as GGUF: it is truncated, damaged or of a newer kind ({error})"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        if _ROPE_FACTORS in self._tensors:
            self.metadata["rope_freqs"] = self.read(_ROPE_FACTORS).tolist()

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` dequantised to float32 (``F16`` and ``BF16`` too).

        Raises:
            UserError: The package cannot dequantise its type.
        """
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.where}: the tensor {name!r} has type {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantise"
            ) from error
        return values.reshape(self.shapes[name])


def _value(field: gguf.ReaderField) -> Any:
    value = field.contents()
    if isinstance(value, float):
        # The shortest decimal of the stored single: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if field.types[0] == gguf.GGUFValueType.FLOAT32 else value
    return value
