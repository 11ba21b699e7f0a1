"""The standard streams of this process where a command names a file: ``-``, or ``/dev/stdout``."""

from __future__ import annotations

import fcntl
import os
import re
import sys
from pathlib import Path

from spt_jax.errors import UserError

_NAMES = {"stdin": 0, "stdout": 1, "stderr": 2}
_OWN = re.compile(r"/dev/(stdin|stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")


def stream_path(text: str, stream: str) -> Path:
    """The path of a file of text, of which ``-`` is a standard stream.

    Args:
        text: As the user wrote it.
        stream: ``"stdin"`` or ``"stdout"``.
    """
    return Path(f"/dev/{stream}" if text == "-" else text)


def own_stream(path: Path) -> int | None:
    """The descriptor of this process that a path is the name of; None for any other path.

    What is opened by such a name is another file than the descriptor's: it has a place of its own to write at, and a
    socket has none. A file must not take the name, either.
    """
    found = _OWN.fullmatch(os.path.normpath(path))
    if found is None:
        return None
    return _NAMES[found[1]] if found[1] else int(found[2])


def check_stream(path: Path, descriptor: int) -> None:
    """Says before the work whether an `own_stream` could be written to after it.

    Raises:
        UserError: It is closed, or open for reading alone.
    """
    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    if mode == os.O_RDONLY:
        raise UserError(f"{path} cannot be written: it is open for reading alone")


def write_stream(descriptor: int, content: bytes) -> None:
    """Writes behind what was written to a descriptor before, by this process too.

    Raises:
        OSError: It is closed, full, or nobody reads it any more.
    """
    sys.stdout.flush()
    with open(os.dup(descriptor), "wb") as file:
        file.write(content)


def read_file(path: Path) -> bytes:
    """The bytes of a file, or of an `own_stream` to its end.

    Raises:
        OSError: It cannot be read.
    """
    descriptor = own_stream(path)
    if descriptor is None:
        return path.read_bytes()
    with open(os.dup(descriptor), "rb") as file:
        return file.read()
