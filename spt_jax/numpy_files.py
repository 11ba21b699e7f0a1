"""NumPy's own files, ``.npy`` and ``.npz``, as anybody may have written them.

`numpy.load` allocates what an array's header claims before it looks for the numbers, and unpacks what a few bytes
unfold to; here both are refused first.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np

_SUFFIX = ".npy"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npz_names(content: bytes) -> list[str]:
    """The names of the arrays of an ``.npz`` archive.

    Raises:
        ValueError: It is no such archive.
    """
    with _opened(content) as archive:
        return [name.removesuffix(_SUFFIX) for name in archive.namelist()]


def read_npz(
    content: bytes, names: Collection[str] | None = None, most_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` archive by name, read-only.

    Args:
        content: Of the whole file.
        names: Of those that are read; None for all.
        most_bytes: What they may take unpacked; None for no more than the file, as in one that is not packed.

    Raises:
        ValueError: It is no such archive, is damaged (a checksum, a size), claims more, or holds Python objects.
    """
    most = len(content) if most_bytes is None else most_bytes
    with _opened(content) as archive:
        members = {member.filename.removesuffix(_SUFFIX): member for member in archive.infolist()}
        wanted = {name: member for name, member in members.items() if names is None or name in names}
        taken = sum(member.file_size for member in wanted.values())
        if taken > most:
            raise ValueError(f"its arrays take {taken} bytes unpacked; allowed: {most}")
        return {name: read_npy(_unpacked(archive, member)) for name, member in wanted.items()}


@contextmanager
def _opened(content: bytes) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield archive
    except ValueError:
        raise
    except Exception as error:  # zipfile lets through what its libraries raise: zlib.error, struct.error, EOFError, …
        raise ValueError(str(error) or type(error).__name__) from error


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member's bytes, as many as it claims: `ZipFile.read` would unpack what is there, and then cut it."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in a way that NumPy does not write")
    with archive.open(member) as stream:
        content = stream.read(member.file_size)
        stream.read(1)  # the end, where the checksum is compared
        return content


def read_npy(content: bytes) -> np.ndarray:
    """The array of an ``.npy`` file, read-only.

    Raises:
        ValueError: It is no such file, has not the size that its header claims, or holds Python objects.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"its format is {version}; allowed: {', '.join(map(str, _HEADERS))}")
    try:
        shape, fortran, dtype = _HEADERS[version](stream)
    except ValueError:
        raise
    except Exception as error:  # the header is a Python literal, whose reader raises SyntaxError, MemoryError, …
        raise ValueError(f"its header cannot be read ({error})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    place = stream.tell()
    if min(shape, default=0) < 0 or len(content) - place != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"it has {len(content) - place} bytes, but claims {shape} of {dtype}"[:200])
    return np.frombuffer(content, dtype, offset=place).reshape(shape, order="F" if fortran else "C")
