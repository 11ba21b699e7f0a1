"""Files as ``torch.save`` writes them, and as it never would, made without torch."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_jax.errors import UserError
from spt_jax.models.files.torch_file import TorchFolder
from spt_jax.models.files.weight_files import weights_of_folder


class Pickled:
    """A small writer of pickles by hand; what torch.save and an attacker would write."""

    def __init__(self) -> None:
        self.code = b"\x80\x02"

    def name(self, module: str, name: str) -> bytes:
        return b"c" + f"{module}\n{name}\n".encode()

    def text(self, value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(self, value: int) -> bytes:
        content = pickle.encode_long(value)
        return b"\x8a" + bytes([len(content)]) + content

    def numbers(self, values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(self.number, values)) + b"t"

    def tensor(self, key: str, storage: str, numel: int, offset: int, shape: Any, strides: Any) -> bytes:
        place = b"(" + self.text("storage") + self.name("torch", storage) + self.text(key) + self.text("cpu")
        place += self.number(numel) + b"tQ"
        hooks = self.name("collections", "OrderedDict") + b")R"
        arguments = place + self.number(offset) + self.numbers(shape) + self.numbers(strides) + b"\x89" + hooks
        return self.name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"

    def state(self, tensors: dict[str, bytes]) -> bytes:
        return b"\x80\x02}(" + b"".join(self.text(name) + tensor for name, tensor in tensors.items()) + b"u."


def archive(path: Path, pickled: bytes, storages: dict[str, bytes], **entries: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickled)
        for name, content in {"byteorder": b"little", "version": b"3\n", **entries}.items():
            file.writestr(f"model/{name}", content)
        for key, content in storages.items():
            file.writestr(f"model/data/{key}", content)
    return path


def two_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Writes a file of two tensors without torch."""
    write, values = Pickled(), {"a": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.arange(4, dtype="<f2")}
    tensors = {
        "a": write.tensor("0", "FloatStorage", 6, 0, (2, 3), (3, 1)),
        "b": write.tensor("1", "HalfStorage", 4, 0, (4,), (1,)),
    }
    storages = {"0": values["a"].tobytes(), "1": values["b"].tobytes()}
    archive(folder / "pytorch_model.bin", write.state(tensors), storages)
    return values


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        weights_of_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def refused_pickle(folder: Path, pickled: bytes, *words: str) -> None:
    archive(folder / "pytorch_model.bin", pickled, {"0": bytes(24)})
    refused(folder, "pytorch_model.bin", *words)


def reading(folder: Path) -> dict[str, np.ndarray] | None:
    """Every tensor of a file; None where it is refused. Anything but a UserError fails the test."""
    try:
        weights = TorchFolder(folder)
        return {name: np.array(weights.read(name)) for name in weights.shapes}
    except UserError as error:
        assert "\n" not in str(error)
        return None
