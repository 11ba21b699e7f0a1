"""What a command needs of a bucket's run to read it: the small files, and one checkpoint without its optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.step_names import names_a_step
from spt_jax.storage.background import BackgroundCopies
from spt_jax.storage.bucket import BucketError, open_bucket
from spt_jax.storage.complete_steps import CHECKPOINTS, MARKERS, Manifest, complete_steps, marker_name, pull_step
from spt_jax.storage.file_mirror import CONFIG_FILE, FileMirror, files_at_root, staging_folder

INTERVAL = 20.0
"""Seconds between two copies of what an evaluation has found so far."""

JOURNAL = "evaluation.partial/"
_ARRAYS = ("trainable/", "optimizer/")

Preference = Callable[[Path], Iterable[int]]
"""Takes the local folder of the checkpoints, without their arrays; gives steps, the one to be read first."""


class ReadCopy:
    """A local copy of a bucket's run for commands that read it.

    Args:
        url: Of the run.
    """

    def __init__(self, url: str) -> None:
        self._bucket = open_bucket(url)
        self.folder = staging_folder(self._bucket.url) / "reading"
        self._files = FileMirror(self._bucket, self.folder)

    def pull(self, preference: Preference | None = None) -> None:
        """Brings the copy to what the bucket holds now.

        Args:
            preference: Which checkpoint's arrays are wanted; None for no checkpoint at all.

        Raises:
            UserError: There is no run, or it cannot be read.
        """
        files = self._bucket.files()
        if CONFIG_FILE not in files:
            raise UserError(f"{self._bucket.url} is not the working directory of a run: it has no {CONFIG_FILE}")
        wanted = [*files_at_root(files), *(name for name in files if name.startswith(JOURNAL))]
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_file() and path.name not in files:
                path.unlink()  # of an evaluation, or a run, that is there no longer
        shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)
        self._files.pull(wanted)
        if preference is not None:
            self._pull_checkpoint(complete_steps(self._bucket, files), preference)

    def _pull_checkpoint(self, steps: dict[int, Manifest], preference: Preference) -> None:
        place = self.folder / CHECKPOINTS
        for path in place.iterdir() if place.is_dir() else ():
            if names_a_step(path.name) and not self._is_copy(int(path.name), steps):
                shutil.rmtree(path)
        for step, manifest in tuple(steps.items()):
            if (place / str(step)).is_dir():
                continue
            try:
                self._pull_step(step, manifest, lambda name: not name.startswith(_ARRAYS))
            except BucketError:
                del steps[step]
                if step in complete_steps(self._bucket) or not steps:
                    raise  # not for a trainer that deleted it
        place.mkdir(parents=True, exist_ok=True)
        failure = None
        for step in preference(place):
            if step not in steps:
                continue
            try:
                if not (place / str(step) / "trainable").is_dir():
                    self._pull_step(step, steps[step], lambda name: not name.startswith("optimizer/"))
                return
            except BucketError as error:
                failure = error  # a trainer may be deleting it, and then has a later one
        if failure is not None:
            raise failure

    def _pull_step(self, step: int, manifest: Manifest, wanted: Callable[[str], bool]) -> None:
        pull_step(self._bucket, step, manifest, self.folder / CHECKPOINTS / str(step), wanted)
        marker = self.folder / marker_name(step)
        marker.parent.mkdir(exist_ok=True)
        write_atomically(marker, manifest.to_json())

    def _is_copy(self, step: int, steps: dict[int, Manifest]) -> bool:
        marker = self.folder / MARKERS / f"{step}.json"
        return step in steps and marker.is_file() and marker.read_bytes() == steps[step].to_json()

    def copied_back(self, say: Callable[[str], None] = print, interval: float = INTERVAL) -> BackgroundCopies:
        """A context in which what is written into the copy goes to the bucket too, at its end at the latest."""
        return BackgroundCopies(lambda last: self._files.push(), say, str(self.folder), interval)
