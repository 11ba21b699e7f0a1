"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from spt_jax.errors import UserError

_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, but every refusal is a ValueError: of text that is nested too deeply, too.

    Raises:
        ValueError: It is not JSON, no text, nested too deeply, or has a whole number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(path: Path) -> dict[str, Any]:
    """The fields of the JSON object in the file at `path`.

    Raises:
        UserError: The file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = parse_json(text)
        # Looked for in the few files that spell a pair at all.
        written = not _HALF_A_PAIR.search(text) or is_text(json.dumps(fields, ensure_ascii=False))
    except RecursionError:  # a little less deep than what can be read
        raise UserError(f"{path} is not JSON: it is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object")
    if not written:
        raise UserError(f"{path} holds half of a surrogate pair (such as \\ud83d alone), which is no text")
    return fields


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold; Python's JSON reads longer ones, NaN and booleans too."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a text that can be written: half of a surrogate pair, as in ``"\\ud83d"``, is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def whole_objects(content: bytes) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines; what is none, as a line that is being written, is left out."""
    for line in content.split(b"\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
