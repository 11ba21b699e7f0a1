"""Where metrics go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases behind the same two methods."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.json_text import is_number, whole_objects

METRICS_FILE = "metrics.jsonl"
EVALUATION = "development/"
"""How the figures of an evaluation begin."""

FLUSH_SECONDS = 10.0
"""How often TensorBoard's events are brought to the disk, which may be slow."""


def logged_rows(path: Path) -> list[dict[str, Any]]:
    """What `JsonLines` wrote: in each row a whole number ``step``, and numbers or None by name.

    What is no such row is left out: one that is being written, or was cut short by a kill. Without a file there is
    none.

    Raises:
        UserError: The file cannot be read.
    """
    return [
        row
        for row in whole_objects(_content(path))
        if type(row.get("step")) is int and all(value is None or is_number(value) for value in row.values())
    ]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


class Tracker(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics by name."""

    def close(self) -> None:
        """Flushes and closes."""


class JsonLines:
    """One JSON object a logged step, ``{"step": ..., "loss/total": ..., ...}``; values that are not finite become null.

    Args:
        path: The file; appended to.
        resume_step: Rows beyond this step, left by a run that was killed after its last checkpoint, are cut away;
            -1, for a run without a checkpoint, cuts every row.
        pending: The evaluation of this step is still to come: a row of it, after which a run was killed, is cut away.

    Raises:
        UserError: The file is there and cannot be read or written.
    """

    def __init__(self, path: Path, resume_step: int, pending: bool = False) -> None:
        self._path = path
        if path.exists():
            _cut_back(path, resume_step, pending)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row and flushes it."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(_cannot_write(self._path, error)) from error

    def close(self) -> None:
        """Closes the file; what could not be flushed was reported by `log`."""
        with contextlib.suppress(OSError):
            self._file.close()


def _cannot_write(path: Path, error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror or error}); the checkpoints are intact"


def _cut_back(path: Path, step: int, pending: bool) -> None:
    kept = []
    for row in whole_objects(_content(path)):
        # A row that somebody has added, of no step, is kept.
        number = row["step"] if is_number(row.get("step")) else step
        again = pending and number == step and any(name.startswith(EVALUATION) for name in row)
        if number <= step and not again:
            kept.append(json.dumps(row) + "\n")
    write_atomically(path, "".join(kept))


class TensorBoard:
    """TensorBoard events through tensorboardX's record files.

    They are written on this thread: tensorboardX's own `SummaryWriter` has a background thread that dies when the disk
    is full, and then every further scalar waits for it forever.

    Args:
        directory: Where the events go; made when missing.
        resume_step: Later events of an earlier start are hidden; -1 hides them all.
    """

    def __init__(self, directory: Path, resume_step: int) -> None:
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._event, self._summary = Event, Summary
        self._directory = directory
        self._flushed = -math.inf
        with self._told():
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"))
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a scalar for each metric."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        with self._told():
            self._writer.write_event(event)
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the event file; what a full disk refuses is lost."""
        with contextlib.suppress(OSError):
            self._writer.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(_cannot_write(self._directory, error)) from error


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Lets an import find no torch: tensorboardX takes it where it is installed, seconds, for tensors it never sees."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["torch"]


class WeightsAndBiases:
    """Weights & Biases; a resumed run is continued under the id that its working directory keeps.

    Charts are over ``step``, a figure beside the others: W&B's own counter takes nothing behind what it has, such as
    the evaluation of a checkpoint after which a run was killed.

    Raises:
        UserError: The package ``wandb`` is not installed, nobody is logged in, or the server does not answer.
    """

    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("tracking.wandb needs the package wandb: pip install wandb") from error
        self._errors = wandb.Error
        identity = directory / "wandb_id"  # folders of one name in two places are two runs
        if not identity.exists():
            write_atomically(identity, uuid.uuid4().hex)
        with self._told("set WANDB_MODE=offline to keep the figures for `wandb sync`, or tracking.wandb=False"):
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(directory),
                config=config,
                allow_val_change=True,  # more steps than before, for instance
            )
            self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics."""
        with self._told("the checkpoints are intact"):
            self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Finishes the run, as a failed one where an exception passes by; what W&B refuses is lost."""
        with contextlib.suppress(self._errors):
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))

    @contextlib.contextmanager
    def _told(self, hint: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise UserError(f"tracking.wandb: {' '.join(str(error).split())[:300].rstrip('.')}; {hint}") from error


def open_trackers(
    workdir: Path,
    resume_step: int,
    *,
    tensorboard: bool,
    wandb: bool,
    project: str,
    config: dict[str, Any],
    pending: bool = False,
) -> Sequence[Tracker]:
    """The trackers of a working directory; see the classes."""
    trackers: list[Tracker] = []
    # The one that may be refused comes first, so that nothing is left open behind it.
    if wandb:
        trackers.append(WeightsAndBiases(workdir, project, config))
    trackers.append(JsonLines(workdir / METRICS_FILE, resume_step, pending))
    if tensorboard:
        trackers.append(TensorBoard(workdir / "tensorboard", resume_step))
    return trackers
