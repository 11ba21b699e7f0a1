"""A run that is trained into a bucket: it works in a local folder, which the bucket is kept equal to."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.locked_folder import locked_folder
from spt_jax.step_names import names_a_step
from spt_jax.storage.background import BackgroundCopies
from spt_jax.storage.bucket import is_part, open_bucket
from spt_jax.storage.complete_steps import (
    CHECKPOINTS,
    complete_steps,
    delete_step,
    manifest_of,
    marker_name,
    pull_step,
    push_step,
)
from spt_jax.storage.file_mirror import CONFIG_FILE, RUN_ID, FileMirror, files_at_root, new_run_id, staging_folder

INTERVAL = 1.0
"""Seconds between two looks for a new checkpoint."""

_Identity = tuple[int, int]
_NEVER: _Identity = (0, 0)


class StagedRun:
    """The working directory of a bucket's run, as a local folder.

    Entering brings `folder` to where the run is: to the bucket's state, unless the folder is further, left by a start
    whose last checkpoints could not be copied. While the context is open, each finished checkpoint is copied, after
    the metrics that led to it and with its marker last, and those that were deleted here are deleted there.

    Args:
        url: Of the run.
        say: Takes sentences about the network.
        interval: Seconds between two looks for a new checkpoint.
        waits: See `spt_jax.storage.bucket.open_bucket`.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], None] = print,
        interval: float = INTERVAL,
        waits: Sequence[float] | None = None,
    ) -> None:
        self._bucket = open_bucket(url, waits)
        self._place = staging_folder(self._bucket.url)
        self.folder = self._place / "run"
        self._files = FileMirror(self._bucket, self.folder)
        self._equal: dict[int, _Identity] = {}
        self._lock_folder = self._place.with_name(f"{self._place.name}.lock")
        self._lock = contextlib.ExitStack()
        self._copies = BackgroundCopies(self._copy, say, str(self.folder), interval)

    @property
    def complete(self) -> bool:
        """After the context: whether the bucket has everything."""
        return self._copies.complete

    def __enter__(self) -> StagedRun:
        with contextlib.ExitStack() as stack:
            # Before anything here or in the bucket is put right: that is another training's while one is going on.
            stack.enter_context(
                locked_folder(self._lock_folder, f"another process here is training in {self._bucket.url}")
            )
            self._pull()
            self._copies.__enter__()
            self._lock = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._leave(kind, error, trace)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._copies.__exit__(kind, error, trace)
        if not (self.folder / CONFIG_FILE).exists() and set(self._bucket.files()) == {RUN_ID}:
            # A start that was refused leaves nothing behind.
            self._bucket.delete(RUN_ID)
            shutil.rmtree(self._place, ignore_errors=True)
            self._lock_folder.rmdir()

    def _pull(self) -> None:
        files = self._bucket.files()
        self._settle_identity(files)
        steps, here = complete_steps(self._bucket, files), _local_steps(self.folder)
        for rest in self.folder.glob(".pull-*"):
            shutil.rmtree(rest)  # of a start that was killed
        for step in _unfinished_steps(files):
            delete_step(self._bucket, step)  # the rest of a copy that was interrupted
        same = {step for step in here if step in steps and manifest_of(here[step]) == steps[step]}
        self._equal = {step: _identity(here[step]) if step in same else _NEVER for step in steps}
        if max(here, default=-1) > max(steps, default=-1):
            self._copy(last=True)
            return
        for step in here.keys() - same:
            shutil.rmtree(here[step])
        for step in steps.keys() - same:
            folder = self.folder / CHECKPOINTS / str(step)
            pull_step(self._bucket, step, steps[step], folder)
            self._equal[step] = _identity(folder)
        self._files.pull(files_at_root(files))

    def _settle_identity(self, files: dict[str, int]) -> None:
        """Throws a local copy of another run away; a bucket without a run gets an identity, which it must take."""
        known = self._place / RUN_ID
        if RUN_ID in files:
            identity = (self._bucket.read(RUN_ID) or b"").decode()
        elif not all(map(is_part, files)):
            raise UserError(
                f"{self._bucket.url} is not empty and holds no run that was trained there (no {RUN_ID}); choose "
                "another --workdir"
            )
        else:
            identity = new_run_id()
            self._bucket.write(RUN_ID, identity.encode())
        if not known.is_file() or known.read_text(encoding="utf-8") != identity:
            shutil.rmtree(self._place, ignore_errors=True)
            self._place.mkdir(parents=True)
            write_atomically(known, identity)

    def _copy(self, last: bool) -> None:
        if not (self.folder / CONFIG_FILE).is_file():
            return  # a start that was refused, or a folder that somebody removed: the bucket stays as it is
        here = _local_steps(self.folder)
        new = [step for step, folder in here.items() if self._equal.get(step) != _identity(folder)]
        if new or last:
            self._files.push()
        for step in new:
            try:
                identity = _identity(here[step])
                push_step(self._bucket, step, here[step])
            except FileNotFoundError:  # it was deleted here meanwhile: a later one is there
                if step not in self._equal:
                    delete_step(self._bucket, step)
                continue
            self._equal[step] = identity
        for step in sorted(self._equal)[:-1]:
            if step not in here:
                delete_step(self._bucket, step)
                del self._equal[step]


def _local_steps(folder: Path) -> dict[int, Path]:
    """The finished checkpoints of a folder, ascending."""
    place = folder / CHECKPOINTS
    found = [path for path in place.iterdir() if names_a_step(path.name)] if place.is_dir() else []
    return {int(path.name): path for path in sorted(found, key=lambda path: int(path.name))}


def _unfinished_steps(files: Collection[str]) -> set[int]:
    """The steps of which a bucket has files, but no marker."""
    parts = [name.split("/") for name in files]
    begun = {int(part[1]) for part in parts if part[0] == CHECKPOINTS and len(part) > 2 and names_a_step(part[1])}
    return {step for step in begun if marker_name(step) not in files}


def _identity(folder: Path) -> _Identity:
    """Tells a step's folder from a later one of the same name."""
    try:
        about = folder.stat()
    except FileNotFoundError:
        return _NEVER
    return about.st_ino, about.st_mtime_ns
