"""A command's --workdir: a folder, or the local copy of a bucket's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from spt_jax.errors import UserError
from spt_jax.exit_codes import STOPPED
from spt_jax.step_names import names_a_step
from spt_jax.storage.bucket import is_bucket_url

if TYPE_CHECKING:
    from spt_jax.storage.read_copy import ReadCopy


def local_workdir(workdir: str, checkpoint: str | None = None) -> Path:
    """The folder of a run that is read; one in a bucket is copied first.

    Args:
        workdir: A folder or a URL.
        checkpoint: ``best``, ``latest`` or a step's number, whose arrays are needed; None where none are.

    Raises:
        UserError: The bucket cannot be read, or holds no such run.
    """
    if not is_bucket_url(workdir):
        return Path(workdir)
    return _pulled(workdir, checkpoint).folder


def trained_in(workdir: str, say: Callable[[str], None], train: Callable[[Path], int]) -> int:
    """Trains in a folder, or in a local one whose checkpoints are copied into a bucket.

    Args:
        workdir: A folder or a URL.
        say: Takes sentences about the network.
        train: Takes the folder; returns the exit code.

    Returns:
        The exit code: that of `train`, unless the bucket lacks something.

    Raises:
        UserError: The bucket cannot be used.
    """
    if not is_bucket_url(workdir):
        return train(Path(workdir))
    from spt_jax.parallel.distributed import is_lead
    from spt_jax.storage.staged_run import StagedRun

    run = StagedRun(workdir, say)
    if not is_lead():
        return train(run.folder)  # the first of several processes alone reads and writes it
    with run:
        code = train(run.folder)
    return code if run.complete else STOPPED


def evaluated_in(workdir: str, checkpoint: str, say: Callable[[str], None], evaluate: Callable[[Path], int]) -> int:
    """Evaluates in a folder, or in a local copy of a bucket's run whose results are copied into the bucket.

    Args:
        workdir: A folder or a URL.
        checkpoint: See `local_workdir`.
        say: Takes sentences about the network.
        evaluate: Takes the folder; returns the exit code.

    Returns:
        The exit code: that of `evaluate`, unless the bucket lacks something.

    Raises:
        UserError: The bucket cannot be used.
    """
    if not is_bucket_url(workdir):
        return evaluate(Path(workdir))
    from spt_jax.parallel.distributed import is_lead
    from spt_jax.storage.read_copy import ReadCopy

    if not is_lead():
        return evaluate(ReadCopy(workdir).folder)  # the first of several processes alone reads and writes it
    copy = _pulled(workdir, checkpoint)
    with copy.copied_back(say) as copies:
        code = evaluate(copy.folder)
    return code if copies.complete else STOPPED


def refuse_bucket(workdir: str, why: str) -> None:
    """Raises a `UserError` for a URL where a folder is needed."""
    if is_bucket_url(workdir):
        raise UserError(f"--workdir={workdir} is a bucket; {why}")


def _pulled(workdir: str, checkpoint: str | None) -> ReadCopy:
    # fsspec and what comes with it are not imported for a folder.
    from spt_jax.storage.read_copy import ReadCopy

    def preferred(folder: Path) -> Iterable[int]:
        from spt_jax.training.checkpoint import Checkpoints

        assert checkpoint is not None
        if names_a_step(checkpoint):
            return [int(checkpoint)]
        with Checkpoints(folder, read_only=True) as checkpoints:
            return list(checkpoints.candidates(checkpoint))

    copy = ReadCopy(workdir)
    copy.pull(preferred if checkpoint is not None else None)
    return copy
