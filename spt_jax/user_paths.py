"""Paths as users write them: ``~`` is a home, and what cannot be looked up is told in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

from spt_jax.errors import UserError


def expanded(text: str, what: str) -> Path:
    """The path that a text names, of which it can be asked whether it is there.

    Args:
        text: As the user wrote it.
        what: What the user calls it, such as the option's name.

    Raises:
        UserError: It begins with the home of nobody, or see `present`.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what} {text} cannot be looked up: there is no such home") from error
    present(path, what)
    return path


def present(path: Path, what: str) -> bool:
    """Whether there is something at a path.

    Args:
        path: Any.
        what: What the user calls it.

    Raises:
        UserError: It cannot be known: the name is too long, or a folder on the way may not be searched.
    """
    try:
        path.stat()
        return True
    except (FileNotFoundError, NotADirectoryError, ValueError):  # of the last kind: no name of any file
        return False
    except OSError as error:
        raise UserError(f"{what} {path} cannot be looked up: {error.strerror or error}") from error


def check_around(path: Path, what: str) -> None:
    """Says before the work whether something could be made at a path after it.

    Args:
        path: Of nothing, or of what is replaced; the folders around it may be missing.
        what: What the user calls it.

    Raises:
        UserError: One of the folders around it is a file, or may not be written.
    """
    around = path.absolute().parent
    while not present(around, what):
        around = around.parent
    if not around.is_dir():
        raise UserError(f"{what}={path} cannot be made: {around} is a file")
    if not os.access(around, os.W_OK):
        raise UserError(f"{what}={path} cannot be made: no permission to write in {around}")
