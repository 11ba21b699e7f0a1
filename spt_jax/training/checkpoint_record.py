"""The record beside a checkpoint's arrays: JSON values, sealed, so that a bit that has changed is noticed.

Orbax keeps it, as the item ``meta``, and the perplexity once more as its own metrics. Neither has a checksum there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRIC = "perplexity"
METRICS_FILE = Path("metrics", "metrics")
"""Where Orbax keeps the perplexity below a step's folder."""

SEAL = "sha256"
SHAPES = {"trainable": "shapes", "optimizer": "optimizer_shapes"}
"""Under which name the record has the shapes of a tree's arrays."""

_ARRAYS = ("np.ndarray", "jax.Array")
"""What Orbax calls them; beside them it tells of members of a tree that hold nothing."""


class DamagedCheckpointError(Exception):
    """A checkpoint that cannot be read, or whose arrays are not those that were saved."""


def sealed(record: Mapping[str, Any], perplexity: float | None) -> dict[str, Any]:
    """The record with the perplexity, None for a step that was not evaluated, and the sha256 of all of it."""
    record = {**record, METRIC: perplexity}
    return {**record, SEAL: _digest(record)}


def rated(record: Mapping[str, Any], perplexity: float) -> dict[str, Any]:
    """What `METRICS_FILE` holds of a step that was evaluated after it had been saved: sealed together with its record.

    Args:
        record: Of the step, as `read_record` gives it.
        perplexity: Of the development dialogues.
    """
    return {METRIC: perplexity, SEAL: _digest({"record": record.get(SEAL), METRIC: perplexity})}


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_record(step_folder: Path, items: Iterable[str]) -> dict[str, Any]:
    """Reads the small files of a step, which Orbax would trip over later.

    Args:
        step_folder: Of the step, named for it.
        items: The trees that must be there.

    Returns:
        What was `sealed`, with the perplexity of a step that was `rated` later; a record of before there were seals is
        taken as it is.

    Raises:
        DamagedCheckpointError: A file is missing, or not as it was written.
    """
    try:
        record = json.loads((step_folder / "meta" / "metadata").read_text())
        if not isinstance(record, dict) or "digests" not in record:
            raise ValueError("its metadata holds no digests")
        if SEAL in record:
            _check_seal(record)
        record[METRIC] = _checked_perplexity(step_folder / METRICS_FILE, record)
        for item in items:
            _check_item(step_folder / item, record.get(SHAPES[item]))
    except Exception as error:
        raise DamagedCheckpointError(f"the checkpoint of step {step_folder.name} is damaged: {error}") from error
    return record


def _check_seal(record: Mapping[str, Any]) -> None:
    if record[SEAL] != _digest({name: value for name, value in record.items() if name != SEAL}):
        raise ValueError("its metadata is not what was saved")


def _checked_perplexity(file: Path, record: Mapping[str, Any]) -> float | None:
    perplexity, seal = None, None
    if file.exists():
        metrics = json.loads(file.read_text())
        perplexity, seal = float(metrics[METRIC]), metrics.get(SEAL)
    if SEAL not in record:
        return perplexity
    if perplexity is not None and record[METRIC] is None and seal == rated(record, perplexity)[SEAL]:
        return perplexity
    # Text, because what is not a number is not equal to itself.
    if json.dumps(record[METRIC]) != json.dumps(perplexity):
        raise ValueError(f"its perplexity is {perplexity}, but {record[METRIC]} was saved")
    return perplexity


def _check_item(folder: Path, shapes: Mapping[str, list[int]] | None) -> None:
    """The names that Orbax tells of an item's arrays, which are known before any of them is read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.name} is missing")
    leaves = json.loads((folder / "_METADATA").read_bytes())["tree_metadata"].values()
    arrays = [leaf for leaf in leaves if leaf["value_metadata"]["value_type"] in _ARRAYS]
    told = {"/".join(str(part["key"]) for part in array["key_metadata"]) for array in arrays}
    if shapes and told != set(shapes):
        raise ValueError(f"the names of the arrays of {folder.name} are not those that were saved")
