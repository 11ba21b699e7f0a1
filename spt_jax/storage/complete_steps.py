"""Checkpoints in a bucket: a step is there when its marker is, which is written last and names every file.

A step lies in ``checkpoints/N/``, its marker is ``complete/N.json``: ``{"files": {name: [bytes, sha256], ...}}``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from spt_jax.json_text import parse_json
from spt_jax.step_names import names_a_step
from spt_jax.storage.bucket import Bucket, BucketError

CHECKPOINTS = "checkpoints"
MARKERS = "complete"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a complete step consists of.

    Attributes:
        files: Bytes and sha256 of every file, by its name below the step's folder.
    """

    files: Mapping[str, tuple[int, str]]

    def to_json(self) -> bytes:
        """As the marker has it."""
        return json.dumps({"files": self.files}, sort_keys=True).encode()


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a local step.

    Raises:
        FileNotFoundError: A file vanished: the step is being deleted.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest({str(path.relative_to(folder)): (path.stat().st_size, _sha256(path)) for path in paths})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_steps(bucket: Bucket, files: Mapping[str, int] | None = None) -> dict[int, Manifest]:
    """The steps of a bucket that are whole, ascending.

    Args:
        bucket: A run's.
        files: Its `Bucket.files`, where they are known.
    """
    files = bucket.files() if files is None else files
    found = {}
    for step in sorted(int(name[len(MARKERS) + 1 : -len(".json")]) for name in files if _is_marker(name)):
        manifest = _read_marker(bucket, step)
        if manifest is not None and all(
            files.get(f"{CHECKPOINTS}/{step}/{name}") == size for name, (size, _) in manifest.files.items()
        ):
            found[step] = manifest
    return found


def _is_marker(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == MARKERS and file.endswith(".json") and names_a_step(file[: -len(".json")])


def marker_name(step: int) -> str:
    """The name of a step's marker."""
    return f"{MARKERS}/{step}.json"


def _read_marker(bucket: Bucket, step: int) -> Manifest | None:
    try:
        files = parse_json(bucket.read(marker_name(step)) or b"")["files"]
        return Manifest({name: (int(size), str(sha256)) for name, (size, sha256) in files.items()})
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def push_step(bucket: Bucket, step: int, folder: Path) -> None:
    """Copies a local step, its marker last; one that has only grown, as by its rating, stays complete all the while.

    Raises:
        FileNotFoundError: The step is being deleted here; what was copied has no marker.
        BucketError: The bucket cannot be written.
    """
    manifest = manifest_of(folder)
    there = complete_steps(bucket, _files_of(bucket, step)).get(step)
    if there is None or not there.files.items() <= manifest.files.items():
        delete_step(bucket, step)  # what an interrupted push, or another start, left under this number
        there = Manifest({})
    for name in manifest.files:
        if name not in there.files:
            bucket.upload(folder / name, f"{CHECKPOINTS}/{step}/{name}")
    bucket.write(marker_name(step), manifest.to_json())


def delete_step(bucket: Bucket, step: int) -> None:
    """Removes a step, its marker first, so that no reader takes half of it for the whole."""
    marker = marker_name(step)
    bucket.delete(marker)
    for name in _files_of(bucket, step):
        if name != marker:
            bucket.delete(name)


def _files_of(bucket: Bucket, step: int) -> dict[str, int]:
    """Sizes of what a bucket holds under a step's number, its marker among it."""
    own = f"{CHECKPOINTS}/{step}/"
    return {n: size for n, size in bucket.files().items() if n == marker_name(step) or n.startswith(own)}


def pull_step(
    bucket: Bucket, step: int, manifest: Manifest, folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Copies a complete step to `folder`, which appears whole or not at all and replaces what was there.

    Args:
        bucket: A run's.
        step: The step.
        manifest: Its own, of `complete_steps`.
        folder: Where it shall lie.
        wanted: Which files, by their names below the step's folder.

    Raises:
        BucketError: The bucket cannot be read, or a file is not the one of the manifest.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not beside the step: a name that Orbax does not know, in its folder, is its to judge.
    with tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix=".pull-") as place:
        arriving = Path(place) / "step"
        arriving.mkdir()
        for name, expected in manifest.files.items():
            if not wanted(name):
                continue
            bucket.download(f"{CHECKPOINTS}/{step}/{name}", arriving / name)
            if ((arriving / name).stat().st_size, _sha256(arriving / name)) != expected:
                raise BucketError(f"{bucket.url}/{CHECKPOINTS}/{step}/{name} is not the file that was saved there")
        shutil.rmtree(folder, ignore_errors=True)
        arriving.rename(folder)
