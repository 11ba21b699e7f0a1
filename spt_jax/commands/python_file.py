"""Python files of the user's that give a configuration or a sweep: run them, and say where they go wrong."""

from __future__ import annotations

import importlib.util
import re
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from spt_jax.errors import UserError, nearest

# What ml_collections says of a value whose type is not the default's.
_WRONG_TYPE = re.compile(
    r"Could not override field '(.*)' \(reference\)\. (.*) is of original type <class '(\w+)'> .*<class '(\w+)'>"
)


def run_python_file(path: Path, flag: str, kind: str, example: str = "") -> ModuleType:
    """The module that a Python file makes.

    Args:
        path: The file.
        flag: The flag that named it, for the errors.
        kind: What the file is to the user, such as ``config file``.
        example: Such a flag with a file that exists; empty for none.

    Raises:
        UserError: There is no such file, or it does not run.
    """
    such_as = f", such as {example}" if example else ""
    if path.is_dir():
        raise UserError(f"{flag}={path} is a folder; give a Python file{such_as}")
    if not path.is_file():
        siblings = [str(path.with_name(sibling.name)) for sibling in path.parent.glob("*.py")]
        raise UserError(f"the {kind} {path} does not exist.{nearest(str(path), siblings)}")
    name = f"spt_jax_user_{kind.split()[0]}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{flag}={path} is not a Python file; give one{such_as}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(where_raised(path, error, kind)) from error
    return module


def where_raised(path: Path, error: Exception, kind: str) -> str:
    """The user's line that raised, and what was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}: the {kind} is not Python: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}:{frames[-1].lineno}" if frames else str(path)
    if isinstance(error, UserError):
        return f"{place}: {error}"
    reason = " ".join(str(error).split())
    if isinstance(error, TypeError) and (match := _WRONG_TYPE.match(reason)):
        name, value, found, expected = match.groups()
        return f"{place}: the option {name!r} is {value} of type {found}; allowed: a value of type {expected}"
    return f"{place}: the {kind} fails with {type(error).__name__}: {reason}"
