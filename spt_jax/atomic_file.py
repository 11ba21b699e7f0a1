"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from spt_jax.errors import UserError
from spt_jax.streams import check_stream, own_stream, write_stream
from spt_jax.user_paths import present


def check_writable(path: Path) -> None:
    """Says before the work whether `path` could be written after it.

    Raises:
        UserError: If its folder does not exist or may not be written, or if it is a folder itself.
    """
    if (descriptor := own_stream(path)) is not None:
        check_stream(path, descriptor)
        return
    present(path, "the file")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write")
    if _is_device(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{path} cannot be written: no permission")
        return
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission to write in the folder {path.parent}")


def check_other_file(target: Path, source: Path, name: str) -> None:
    """Refuses to write a command's result over what it reads, by whatever path.

    Args:
        target: What ``--out`` names.
        source: The input; need not exist.
        name: The input's flag.

    Raises:
        UserError: They are the same file; a terminal and a socket may be both.
    """
    # Neither name is looked at for its own sake here, so that one of a thousand letters is told where it is.
    if not (os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target)):
        return
    kind = os.stat(target).st_mode
    if not (stat.S_ISCHR(kind) or stat.S_ISSOCK(kind)):
        raise UserError(f"--out is the file of --{name}, {source}, itself; name another file")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes bytes, or text as UTF-8, to a temporary neighbour, flushes it to disk and renames it to `path`.

    A device, a pipe or a stream of this process, such as /dev/null or /dev/stdout, is written into: a file must not
    take its place.

    Raises:
        UserError: If the disk is full or refuses; a file that was there before is then unchanged.
        BrokenPipeError: If the reader of a stream of this process left.
    """
    check_writable(path)
    content = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        if (descriptor := own_stream(path)) is not None:
            write_stream(descriptor, content)
            return
        if _is_device(path):
            with path.open("wb") as device:
                device.write(content)
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; the result takes the mode any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and own_stream(path) is not None:
            raise
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_device(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder."""
    return path.exists() and not (path.is_file() or path.is_dir())
