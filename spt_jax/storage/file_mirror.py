"""The files of a run beside its checkpoints, in a local folder and in a bucket."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from spt_jax.atomic_file import write_atomically
from spt_jax.cache_folder import cache_home, key_of
from spt_jax.errors import UserError
from spt_jax.storage.bucket import Bucket, is_part
from spt_jax.storage.complete_steps import CHECKPOINTS, MARKERS

RUN_ID = "run_id"
"""A file at the root of a run's bucket, by which a local copy of another run of the same URL is known."""
CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"


def staging_folder(url: str) -> Path:
    """Where the local copies of a bucket lie.

    Raises:
        UserError: The account has no home, so there is no cache folder.
    """
    home = cache_home()
    if home is None:
        raise UserError(f"--workdir={url} needs a local folder beside it: set XDG_CACHE_HOME to one")
    return home / "buckets" / key_of(url)[:24]


def files_at_root(files: Iterable[str]) -> list[str]:
    """Those of a bucket's files that a run goes on from and a reader needs: profiles and TensorBoard's are not."""
    return [name for name in files if "/" not in name and name != RUN_ID and not is_part(name)]


def new_run_id() -> str:
    """An identity for a run that begins."""
    return uuid.uuid4().hex


_ANOTHER = (-1, -1)
"""The state of no file here."""


class FileMirror:
    """Copies files that changed from a folder into a bucket; checkpoints are not among them.

    Args:
        bucket: The run's.
        folder: The local working directory.
    """

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self._bucket, self._folder = bucket, folder
        self._equal: dict[str, tuple[int, int]] = {}

    def pull(self, names: Iterable[str]) -> None:
        """Copies files of the bucket; what is gone there meanwhile is left out."""
        for name in names:
            content = self._bucket.read(name)
            if content is not None:
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
                self._equal[name] = _state(path)

    def replace(self, names: Iterable[str]) -> None:
        """Knows files of the bucket that those of the folder, or their absence, go before."""
        self._equal |= dict.fromkeys(names, _ANOTHER)

    def push(self) -> None:
        """Copies what changed since it was last pulled or pushed; what vanished from a folder of it vanishes there."""
        found = self._found()
        for name in sorted(found, key=lambda name: (name == RESULTS_FILE, name)):  # it vouches for the others
            state = found[name]
            if self._equal.get(name) != state:
                try:
                    content = (self._folder / name).read_bytes()
                except FileNotFoundError:
                    continue
                self._bucket.write(name, content)
                self._equal[name] = state
        for name in [name for name in self._equal if name not in found]:
            # The files at the root stay: what is missing there was not removed by a run.
            if "/" in name and (self._folder / CONFIG_FILE).is_file():
                self._bucket.delete(name)
                del self._equal[name]

    def _found(self) -> dict[str, tuple[int, int]]:
        found = {}
        # Checkpoints come and go while this looks, and are another's to copy; os.walk does not mind what vanishes.
        for place, folders, names in os.walk(self._folder):
            folders[:] = [name for name in folders if name not in (CHECKPOINTS, MARKERS) and not name.startswith(".")]
            for path in (Path(place, name) for name in names if not name.startswith(".")):
                with contextlib.suppress(FileNotFoundError):
                    found[path.relative_to(self._folder).as_posix()] = _state(path)
        return found


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
