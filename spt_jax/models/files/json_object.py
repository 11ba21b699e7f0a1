"""The JSON object in a file of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spt_jax.errors import UserError


def json_object(path: Path) -> dict[str, Any]:
    """The fields of the JSON object in the file at `path`.

    Raises:
        UserError: The file is not JSON, or holds something else than an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not JSON that can be read: it is nested too deeply") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object")
    return fields
