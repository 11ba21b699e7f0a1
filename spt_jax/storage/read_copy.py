"""What a command needs of a bucket's run to read it: the small files, and one checkpoint without its optimizer."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.locked_folder import locked_folder
from spt_jax.step_names import names_a_step
from spt_jax.storage.background import BackgroundCopies
from spt_jax.storage.bucket import BucketError, open_bucket
from spt_jax.storage.complete_steps import CHECKPOINTS, MARKERS, Manifest, complete_steps, marker_name, pull_step
from spt_jax.storage.file_mirror import CONFIG_FILE, RESULTS_FILE, FileMirror, files_at_root, staging_folder

INTERVAL = 20.0
"""Seconds between two copies of what an evaluation has found so far."""

JOURNAL, ENDED = "evaluation.partial/", ".evaluation/"
"""Folders of what an evaluation has found so far, and of what the last one had found at its end; a bucket gets no copy
of hidden ones."""
_RESULTS = (RESULTS_FILE, "predictions.jsonl", "report.html")
"""What an evaluation leaves."""
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
        # While an evaluation's files may not all be in the bucket: which results the bucket had before.
        self._unsent = self.folder.with_name("reading.unsent")
        self._files = FileMirror(self._bucket, self.folder)

    def pull(self, preference: Preference | None = None) -> None:
        """Brings the copy to what the bucket holds now, but for what an evaluation here could not copy into it.

        Args:
            preference: Which checkpoint's arrays are wanted; None for no checkpoint at all.

        Raises:
            UserError: There is no run, or it cannot be read.
        """
        # Two commands that would fetch the same at once: the second waits, and finds it here.
        with locked_folder(self.folder.with_name("reading.lock")):
            self._pull(preference)

    def _pull(self, preference: Preference | None) -> None:
        files = self._bucket.files()
        if CONFIG_FILE not in files:
            raise UserError(f"{self._bucket.url} is not the working directory of a run: it has no {CONFIG_FILE}")
        kept = self._kept()
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_file() and path.name not in files and path not in kept:
                path.unlink()  # of an evaluation, or a run, that is there no longer
        if not kept:
            self._unsent.unlink(missing_ok=True)
            shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)
        wanted = [*files_at_root(files), *(name for name in files if name.startswith(JOURNAL))]
        replaced = {name for name in wanted if kept and (self.folder / name in kept or self._ended(name))}
        self._files.pull(name for name in wanted if name not in replaced)
        self._files.replace(replaced)
        if preference is not None:
            self._pull_checkpoint(complete_steps(self._bucket, files), preference)

    def _kept(self) -> set[Path]:
        """The local files that go before the bucket's: its run is the same, and nobody else has evaluated it since."""
        if not self._unsent.is_file():
            return set()
        mine, theirs = _digest(self._local(RESULTS_FILE)), _digest(self._bucket.read(RESULTS_FILE))
        same_run = self._bucket.read(CONFIG_FILE) == self._local(CONFIG_FILE)
        if not same_run or theirs not in (mine, self._unsent.read_text(encoding="utf-8")):
            return set()
        found = (*(self.folder / name for name in _RESULTS), *(self.folder / JOURNAL).rglob("*"))
        return {path for path in found if path.is_file()}

    def _ended(self, name: str) -> bool:
        """Whether a file of the bucket is of an evaluation that has come to its end here."""
        return name.startswith(JOURNAL) and (self.folder / ENDED / name.split("/")[1]).is_dir()

    def _local(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

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
        """A context in which what is written into the copy goes to the bucket too, at its end at the latest.

        What could not be copied then, `pull` leaves as it is, and the next such context copies.
        """
        if not self._unsent.is_file():
            write_atomically(self._unsent, _digest(self._local(RESULTS_FILE)))

        def copy(last: bool) -> None:
            self._files.push()
            if last:
                self._unsent.unlink(missing_ok=True)

        return BackgroundCopies(copy, say, str(self.folder), interval)


def _digest(content: bytes | None) -> str:
    return "none" if content is None else hashlib.sha256(content).hexdigest()
