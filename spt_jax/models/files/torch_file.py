"""Torch's old weight files, ``pytorch_model.bin``, as lazily read arrays; torch itself is not needed.

Since torch 1.6 such a file is a zip archive: ``NAME/data.pkl`` describes the tensors, and each storage is an entry
``NAME/data/KEY``, stored uncompressed, so that its bytes can be mapped where they lie.
"""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spt_jax.errors import UserError
from spt_jax.models.files.torch_pickle import TorchTensor, read_state_dict, read_training_checkpoint
from spt_jax.models.files.weight_shards import FLOATING, mapped, shards_of, weight_file_size

TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LARGEST_PICKLE = 1 << 26
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_DIRECTORY_MAGIC = b"PK\x01\x02"
_ENCRYPTED = 0x1
_DESCRIBED = 0x8  # a descriptor follows the data


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: Path
    start: int
    tensor: TorchTensor


@dataclasses.dataclass(frozen=True)
class _Record:
    start: int
    size: int
    crc: int


class TorchFolder:
    """The weights of a folder: ``pytorch_model.bin``, or the shards that ``pytorch_model.bin.index.json`` names.

    Tensors may share a storage (tied weights), start anywhere in it and have any strides. Nothing in a file is ever
    executed; see `spt_jax.models.files.torch_pickle`.

    Attributes:
        where: The folder, for messages.
        files: The weight files, in the order of their names.
        shapes: Shape of every tensor by name, known before any weight is read.
        dtypes: Type of every tensor by name, as safetensors spells it (``"F32"``, ``"BF16"``, ``"BOOL"``, ...).

    Raises:
        UserError: No weight file, a missing shard, an empty, truncated or damaged file, one from before torch 1.6, or
            one whose pickle holds or asks for anything but tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._entries: dict[str, _Entry] = {}
        self.files = _files(folder)
        for file in self.files:
            for name, entry in _read_archive(file).items():
                if name in self._entries:
                    other = self._entries[name].path.name
                    raise UserError(f"{folder}: the tensor {name!r} is in both {other} and {file.name}")
                self._entries[name] = entry
        self.shapes = {name: entry.tensor.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.tensor.storage.dtype for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the file, in the file's type and with the file's strides.

        Raises:
            UserError: Its type is not a floating-point one.
        """
        return _view(name, self._entries[name])


class TorchTrainingCheckpoint:
    """A file that a training program wrote with ``torch.save``: plain values and, under one key, a state dict.

    Nothing in it is ever executed. What is only described, such as tensors outside the state dict, is never read.

    Args:
        path: The file.
        part: The key of the state dict.

    Attributes:
        where: The file, for messages.
        values: Everything but the state dict; see `spt_jax.models.files.torch_pickle.read_training_checkpoint`.
        shapes: Shape of every tensor of the state dict by name.

    Raises:
        UserError: As `TorchFolder`, or there is no such state dict.
    """

    def __init__(self, path: Path, part: str) -> None:
        self.where = str(path)
        self.values: dict[str, Any] = {}

        def described(pickle: bytes, where: str) -> Mapping[str, TorchTensor]:
            tensors, self.values = read_training_checkpoint(pickle, where, part)
            return tensors

        self._entries = _read_archive(path, described)
        self.shapes = {name: entry.tensor.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` of the state dict, as `TorchFolder.read` gives it."""
        return _view(name, self._entries[name])


def float32_copy(view: np.ndarray, path: Path, name: str) -> np.ndarray:
    """A tensor in memory of its own.

    Args:
        view: As a reader of `path` gives it.
        path: The file, for messages.
        name: The tensor's.

    Returns:
        float32, of the view's shape.

    Raises:
        UserError: It has more numbers than its file: strides of 0 say the same ones again and again.
    """
    if view.nbytes > path.stat().st_size:
        raise UserError(f"{path}: the tensor {name!r} has {view.size:,} numbers, more than are in the file")
    return np.array(view, np.float32)


def _view(name: str, entry: _Entry) -> np.ndarray:
    tensor, storage = entry.tensor, entry.tensor.storage
    if storage.dtype not in FLOATING:
        raise UserError(
            f"{entry.path}: the tensor {name!r} has type {storage.dtype}, which is not supported; "
            f"supported: {', '.join(FLOATING)}"
        )
    kind = np.dtype(FLOATING[storage.dtype])
    if 0 in tensor.shape:
        return np.empty(tensor.shape, kind)
    elements = mapped(entry.path, kind, entry.start, (storage.numel,))
    strides = tuple(step * kind.itemsize for step in tensor.strides)
    return np.lib.stride_tricks.as_strided(elements[tensor.offset :], tensor.shape, strides, writeable=False)


def _files(folder: Path) -> tuple[Path, ...]:
    if (folder / TORCH_FILE).is_file():
        return (folder / TORCH_FILE,)
    if (folder / TORCH_INDEX).is_file():
        return shards_of(folder / TORCH_INDEX)
    files = tuple(sorted(folder.glob("pytorch_model*.bin")))
    if not files:
        raise UserError(f"{folder} holds no {TORCH_FILE} and no {TORCH_INDEX} with its shards")
    return files


def _read_archive(
    path: Path, described: Callable[[bytes, str], Mapping[str, TorchTensor]] = read_state_dict
) -> dict[str, _Entry]:
    records = _records(path)
    with path.open("rb") as stream:
        byteorder = records.get("byteorder")
        if byteorder is not None and (order := _content(stream, path, byteorder)) != b"little":
            raise UserError(f"{path} was saved on a machine with byte order {order[:20]!r}; supported: b'little'")
        if records["data.pkl"].size > _LARGEST_PICKLE:
            raise UserError(f"{path}: its pickle has {records['data.pkl'].size} bytes; at most {_LARGEST_PICKLE}")
        state = described(_content(stream, path, records["data.pkl"]), str(path))
    entries = {}
    for name, tensor in state.items():
        record = records.get(f"data/{tensor.storage.key}")
        if record is None:
            raise UserError(f"{path} is damaged: the data of the tensor {name!r} is missing from it")
        expected = tensor.storage.numel * tensor.storage.itemsize
        if record.size != expected:
            raise UserError(
                f"{path} is damaged: the data behind the tensor {name!r} takes {record.size} bytes, "
                f"but {tensor.storage.numel} elements of {tensor.storage.dtype} take {expected}"
            )
        entries[name] = _Entry(path, record.start, tensor)
    return entries


def _records(path: Path) -> dict[str, _Record]:
    """The archive's entries by their name below its one folder."""
    size = weight_file_size(path)
    with path.open("rb") as stream:
        magic = stream.read(len(_ZIP_MAGIC))
        if magic != _ZIP_MAGIC:
            raise UserError(
                f"{path} is not supported: it starts with {magic!r}, so it is no zip archive as torch writes since "
                "version 1.6; load it with torch and save its state dict again, best as safetensors"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, IndexError) as error:
            raise UserError(f"{path} is truncated or damaged ({error}); download it again") from error
        folders = [info.orig_filename.removesuffix("data.pkl") for info in infos if _is_pickle(info.orig_filename)]
        if len(folders) != 1:
            raise UserError(f"{path} is a zip archive, but not one of torch.save: it holds {len(folders)} data.pkl")
        records: dict[str, _Record] = {}
        for info in infos:
            name = info.orig_filename.removeprefix(folders[0])
            if name in records:
                raise UserError(f"{path} is damaged: it holds the entry {name!r} twice")
            records[name] = _record(stream, path, size, info)
    return records


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _record(stream: BinaryIO, path: Path, size: int, info: zipfile.ZipInfo) -> _Record:
    """Where an entry's bytes lie, by its local header, which must agree with the archive's directory.

    The weights' checksums would cost a reading of them all; so that a damaged header cannot shift them unseen, the
    data must end where the archive's next part begins.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        raise UserError(
            f"{path}: the entry {info.orig_filename!r} is compressed or encrypted, which torch.save never does; "
            "not supported"
        )
    stream.seek(min(max(info.header_offset, 0), size))
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size:
        magic, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = stream.read(name_length).decode("utf-8" if flags & 0x800 else "cp437", errors="replace")
        extra = stream.read(extra_length)
        start = stream.tell()
        stream.seek(min(start + info.file_size, size))
        after = stream.read(4)
        if (
            (magic, name, method) == (_ZIP_MAGIC, info.orig_filename, zipfile.ZIP_STORED)
            and info.file_size == info.compress_size
            and _well_formed(extra)
            and after in ((_DESCRIPTOR_MAGIC,) if flags & _DESCRIBED else (_ZIP_MAGIC, _DIRECTORY_MAGIC))
        ):
            return _Record(start, info.file_size, info.CRC)
    raise UserError(f"{path} is truncated or damaged: its entry {info.orig_filename!r} is not where it should be")


def _well_formed(extra: bytes) -> bool:
    # Fields of (id, length, bytes); a wrong total would shift the data that follows.
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def _content(stream: BinaryIO, path: Path, record: _Record) -> bytes:
    stream.seek(record.start)
    content = stream.read(record.size)
    if record.crc not in (0, zlib.crc32(content)):  # torch can be told to leave the checksums 0
        raise UserError(f"{path} is damaged: a checksum inside does not fit; download it again")
    return content
