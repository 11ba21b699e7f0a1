"""Where metrics go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases behind the same two methods."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError


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
        resume_step: Rows beyond this step, left by a run that was killed after its last checkpoint, are cut away.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        if path.exists():
            _cut_back(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row and flushes it."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror}); the checkpoints are intact") from error

    def close(self) -> None:
        """Closes the file; what could not be flushed was reported by `log`."""
        try:
            self._file.close()
        except OSError:
            return


def _cut_back(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a row cut short by a kill
        if row.get("step", 0) <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


class TensorBoard:
    """TensorBoard events through tensorboardX.

    Args:
        directory: Where the events go.
        resume_step: Later events of an earlier start are hidden.
    """

    def __init__(self, directory: Path, resume_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; a run is continued under the working directory's name.

    Raises:
        UserError: The package ``wandb`` is not installed.
    """

    def __init__(self, directory: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError("tracking.wandb needs the package wandb: pip install wandb") from error
        self._run = wandb.init(
            project=project, name=directory.name, id=directory.name, resume="allow", dir=str(directory), config=config
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


def open_trackers(
    workdir: Path, resume_step: int, *, tensorboard: bool, wandb: bool, project: str, config: dict[str, Any]
) -> Sequence[Tracker]:
    """The trackers of a working directory; see the classes."""
    trackers: list[Tracker] = []
    # The one that may be refused comes first, so that nothing is left open behind it.
    if wandb:
        trackers.append(WeightsAndBiases(workdir, project, config))
    trackers.append(JsonLines(workdir / "metrics.jsonl", resume_step))
    if tensorboard:
        trackers.append(TensorBoard(workdir / "tensorboard", resume_step))
    return trackers
