"""NumPy's own files, ``.npy`` and ``.npz``, as anybody may have written them.

`numpy.load` allocates what an array's header claims before it looks for the numbers, and unpacks what a few bytes
unfold to; here both are refused first.
"""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(content: bytes, most_bytes: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` archive, read-only.

    Args:
        content: Of the whole file.
        most_bytes: What its members may take unpacked; None for no more than the file, as in one that is not packed.

    Raises:
        ValueError: It is no such archive, is damaged (a checksum, a size), claims more, or holds Python objects.
    """
    most = len(content) if most_bytes is None else most_bytes
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            taken = sum(member.file_size for member in members)
            if taken > most:
                raise ValueError(f"its arrays take {taken} bytes unpacked; allowed: {most}")
            return {member.filename.removesuffix(".npy"): read_npy(archive.read(member)) for member in members}
    except ValueError:
        raise
    except Exception as error:  # zipfile lets through what its libraries raise: zlib.error, struct.error, EOFError, …
        raise ValueError(str(error) or type(error).__name__) from error


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
