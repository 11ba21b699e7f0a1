"""A folder that one process has for itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from spt_jax.errors import UserError


@contextlib.contextmanager
def locked_folder(folder: Path, taken: str = "") -> Iterator[None]:
    """Keeps other processes that lock it out of a folder, which is made when missing, while the context is open.

    The lock is the kernel's, on the folder itself: it ends with this process, whatever becomes of that, and leaves no
    file. A file system without locks, as a bucket that is mounted, has none.

    Args:
        folder: What is locked.
        taken: Tells what the other process does; where it is empty, the other is waited for.

    Raises:
        UserError: The folder cannot be made, or another process has it and is not waited for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, taken)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, taken: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0))
    except BlockingIOError:
        raise UserError(f"{taken}; wait for it, stop it, or choose another --workdir") from None
    except OSError:
        pass  # no locks here
