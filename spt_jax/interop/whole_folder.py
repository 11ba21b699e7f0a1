"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from spt_jax.errors import UserError
from spt_jax.user_paths import check_around


def check_new_folder(path: Path, flag: str = "--out") -> None:
    """Says before the work whether `path` could become a new folder after it.

    Raises:
        UserError: It is a file, or holds something, or the folder around it may not be written.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise UserError(f"{flag}={path} is not empty; name a new folder")
    elif path.exists() or path.is_symlink():
        raise UserError(f"{flag}={path} is a file; name a new folder")
    check_around(path, flag)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary neighbour that becomes `path` at the end; a failure leaves nothing, folders around it included.

    Args:
        path: New or empty; the folders around it are made where they are missing.

    Raises:
        UserError: It cannot be written.
    """
    path = path.absolute()
    missing = [folder for folder in path.parents if not folder.exists()]
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        # A temporary folder is private; the result takes the mode any new folder would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"the folder {path} cannot be written: {error.strerror or error}") from error
        raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a `new_folder`, each flushed to disk.

    Args:
        path: The folder.
        files: Content by name; a name may have folders, ``"prompt_0/adapter_config.json"``.

    Raises:
        UserError: `path` holds something, or the disk is full or refuses; nothing is left behind then.
    """
    check_new_folder(path)
    with new_folder(path) as folder:
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
