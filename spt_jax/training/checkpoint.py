"""Checkpoints of the trainable tree and the optimizer, through Orbax; never of the frozen LM.

Saving is asynchronous; the latest and the best are kept. Every checkpoint carries the sha256 of its arrays, which a
restore computes again: a damaged step is set aside (``N`` becomes ``N.corrupt``) and the one before is taken.

Of several processes the first alone reads and writes, and tells the others what it read, so that they need not see its
disk. What is saved is small beside the LM, and lies whole on every device unless it is the LM itself.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.json_text import parse_json
from spt_jax.parallel.distributed import is_lead, json_told_by_lead, on_host
from spt_jax.step_names import names_a_step
from spt_jax.training.checkpoint_arrays import Tree, placed, read_arrays, tree_digest, tree_shapes
from spt_jax.training.checkpoint_record import (
    METRIC,
    METRICS_FILE,
    SHAPES,
    DamagedCheckpointError,
    rated,
    read_record,
    sealed,
)

_RATED = ".rated-"
SMALL_FILES_BYTES = 256 * 1024
"""What a checkpoint takes on the disk beside its arrays: about forty files and folders."""

PATIENCE_SECONDS = 100 * 365 * 24 * 3600
"""How long a save is waited for: Orbax measures it by the wall clock, which jumps ahead when a laptop wakes up."""

_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
"""The first process asks no other one."""


def _stored(tree: Tree) -> Tree:
    """The tree as it lies on the disk: Orbax refuses one without leaves, which a method that learns nothing has."""
    return tree if jax.tree.leaves(tree) else {"nothing": np.zeros((), np.int8)}


def _perplexity(metrics: Any) -> float:
    value = float(metrics[METRIC])
    return value if math.isfinite(value) else math.inf


def _patient() -> ocp.AsyncOptions:
    # Folders that are made in the background are waited for by the wall clock, too, and always for five minutes.
    return ocp.AsyncOptions(timeout_secs=PATIENCE_SECONDS, create_directories_asynchronously=False)


def _step_folders(directory: Path) -> list[int]:
    found = [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(int(path.name) for path in found if names_a_step(path.name))


def _step_of(which: str) -> int:
    if not names_a_step(which):
        raise UserError(f"the checkpoint is {which!r}; allowed: best, latest or a step's number")
    return int(which)


class Checkpoints:
    """The checkpoints of one working directory.

    Args:
        directory: Where they lie; made when missing.
        keep_latest: How many of the latest are kept.
        keep_best: How many of the best are kept, by the lowest perplexity given to `save`.
        read_only: Only restores; a damaged step is passed over but not renamed.
    """

    def __init__(self, directory: Path, *, keep_latest: int = 2, keep_best: int = 1, read_only: bool = False) -> None:
        self.directory = directory.absolute()
        self._read_only = read_only
        self._keep = (keep_latest, keep_best)
        if read_only and is_lead() and not _step_folders(self.directory):
            raise UserError(f"there is no checkpoint in {self.directory}")
        # Orbax narrates every save, and prints a traceback of every failure that it raises as well.
        for narrator in ("absl", "asyncio"):
            logging.getLogger(narrator).setLevel(logging.CRITICAL)
        self._failed_before = False
        # Orbax's manager stumbles over a damaged step as soon as it is made; reading needs none.
        self._manager = self._open() if is_lead() and not read_only else None

    def _open(self) -> ocp.CheckpointManager:
        keep_latest, keep_best = self._keep
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.parent.glob(f"{_RATED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for step in _step_folders(self.directory):
            try:
                self._peek(step)
            except DamagedCheckpointError as error:
                self._set_aside(step, error)
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep_latest),
                preservation_policy.BestN(
                    get_metric_fn=_perplexity, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            cleanup_tmp_directories=True,
            best_fn=_perplexity,
            best_mode="min",
            preservation_policy=policy,
            async_options=_patient(),
            multiprocessing_options=_ALONE,
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("trainable", "optimizer", "meta"))

    def _peek(self, step: int, items: Iterable[str] = ()) -> dict[str, Any]:
        # A copy to read has no optimizer.
        items = items or (("trainable",) if self._read_only else ("trainable", "optimizer"))
        return read_record(self.directory / str(step), items)

    def _set_aside(self, step: int, error: Exception) -> None:
        logger = logging.getLogger(__name__)
        if self._read_only:
            logger.warning("%s; it was passed over", error)
            return
        source = self.directory / str(step)
        target = source.with_name(f"{step}.corrupt")
        count = 1
        while target.exists():
            count += 1
            target = source.with_name(f"{step}.corrupt{count}")
        source.rename(target)
        logger.warning("%s; it was set aside as %s", error, target.name)

    def save(self, step: int, trainable: Tree, optimizer: Tree, meta: dict[str, Any], perplexity: float | None) -> None:
        """Starts saving a step in the background, after the one before has finished.

        Args:
            step: Steps done.
            trainable: The trainable tree.
            optimizer: The optimizer's state and the counters.
            meta: JSON values kept beside the arrays.
            perplexity: Of the development dialogues; None when the step was not evaluated.

        Raises:
            UserError: This save, or the one before it, could not be written. Earlier checkpoints stay usable.
        """
        assert not self._read_only, "these checkpoints were opened to be read only"
        # jax may reuse a donated buffer for the next step, so the arrays are fetched before anything else happens.
        trees = on_host({"trainable": trainable, "optimizer": optimizer})
        if self._manager is None:
            return
        record = {
            **meta,
            "step": step,
            "digests": {name: tree_digest(tree) for name, tree in trees.items()},
            **{key: tree_shapes(trees[item]) for item, key in SHAPES.items()},
        }
        try:
            self._check_space(trees)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(_stored(trees["trainable"])),
                    optimizer=ocp.args.StandardSave(_stored(trees["optimizer"])),
                    meta=ocp.args.JsonSave(sealed(record, None if perplexity is None else float(perplexity))),
                ),
                metrics=None if perplexity is None else {METRIC: float(perplexity)},
            )
        except Exception as error:
            raise self._failed(error) from error

    def rate(self, step: int, perplexity: float) -> None:
        """Gives a step that was saved without an evaluation its perplexity, as if it had been saved with it.

        The step lies whole on the disk at every moment: all that changes is one folder in it, which appears.

        Args:
            step: A step on disk, whose own perplexity is None.
            perplexity: Of the development dialogues.

        Raises:
            UserError: It could not be written. The step stays as it was.
        """
        if self._manager is None:
            return
        metrics = self.directory / str(step) / METRICS_FILE
        try:
            # Not beside the step: a name that Orbax does not know, in its folder, is its to judge.
            with tempfile.TemporaryDirectory(dir=self.directory.parent, prefix=_RATED) as place:
                arriving = Path(place) / metrics.parent.name
                arriving.mkdir()
                write_atomically(arriving / metrics.name, json.dumps(rated(self._peek(step), float(perplexity))))
                arriving.rename(metrics.parent)
        except Exception as error:
            raise self._failed(error) from error
        self._manager.close()  # it read the perplexities when it was made
        self._manager = self._open()

    def _check_space(self, trees: Tree) -> None:
        # A disk that fills up in the middle of a save makes Orbax's threads talk; before it, one sentence is enough.
        needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(trees)) + SMALL_FILES_BYTES
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wait(self) -> None:
        """Waits until every save is on disk; UserError when one could not be written."""
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        self._failed_before = True
        good = [step for step in _step_folders(self.directory) if self._is_whole(step)]
        last = f"the last good one is step {good[-1]}" if good else "there is no earlier one"
        full = os.strerror(errno.ENOSPC)
        text = " ".join(str(error).split())
        reason = full if full in text else text[:300]
        return UserError(
            f"a checkpoint could not be written to {self.directory} ({reason}); {last}. Free some space there and "
            "start the same command again to go on from it."
        )

    def _is_whole(self, step: int) -> bool:
        try:
            self._peek(step)
        except DamagedCheckpointError:
            return False
        return True

    def steps(self) -> list[int]:
        """The steps on disk, ascending; every process must ask."""
        return json_told_by_lead(_step_folders(self.directory) if is_lead() else None)

    def check(self, which: str) -> None:
        """Refuses a step that is not there; every process must ask.

        Args:
            which: As for `restore`.

        Raises:
            UserError: There is no such step, or `which` is neither a step nor ``"latest"`` or ``"best"``.
        """
        steps = self.steps()
        if which not in ("latest", "best"):
            self._check_step(_step_of(which), steps)

    def _check_step(self, step: int, steps: list[int]) -> None:
        if step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}; there are {steps}")

    def candidates(self, which: str) -> Iterator[int]:
        """Steps in the order in which they should be tried for ``best`` or ``latest``; for the first process."""
        latest_first = _step_folders(self.directory)[::-1]
        if which == "latest":
            yield from latest_first
            return
        perplexities = {}
        for step in latest_first:
            try:
                metrics = parse_json((self.directory / str(step) / METRICS_FILE).read_text())
                perplexities[step] = _perplexity(metrics)
            except (OSError, ValueError, KeyError, TypeError, OverflowError):
                continue
        yield from sorted(perplexities, key=lambda step: (perplexities[step], -step))
        yield from (step for step in latest_first if step not in perplexities)

    def _wanted(self, which: str) -> Iterator[int]:
        if which in ("latest", "best"):
            yield from self.candidates(which)
        else:
            yield _step_of(which)

    def meta(self, which: str) -> dict[str, Any] | None:
        """The JSON values beside the first readable checkpoint of ``latest``, ``best`` or a step; None without one.

        Every process must ask.

        Raises:
            UserError: `which` is none of these.
        """
        return json_told_by_lead(self._first_record(which) if is_lead() else None)

    def _first_record(self, which: str) -> dict[str, Any] | None:
        for step in self._wanted(which):
            try:
                return self._peek(step)
            except DamagedCheckpointError:
                continue
        return None

    def restore(self, which: str, targets: dict[str, Tree]) -> tuple[int, dict[str, Tree], dict[str, Any]] | None:
        """Restores the latest or the best checkpoint that is whole; every process must ask.

        Args:
            which: ``"latest"``, ``"best"`` or a step.
            targets: For each item wanted (``trainable``, ``optimizer``) a tree of `jax.ShapeDtypeStruct` with the
                shardings that the arrays shall have.

        Returns:
            The step, the restored trees and the JSON values; None when there is no checkpoint at all.

        Raises:
            UserError: The shapes differ from `targets`, there is no such step, or every checkpoint is damaged.
        """
        found = self._read(which, targets) if is_lead() else None
        about = json_told_by_lead(found and (found[0], found[2]))
        if about is None:
            return None
        step, meta = about
        # The others have no arrays, and the same targets.
        arrays = jax.tree.leaves(found[1]) if found else [None] * len(jax.tree.leaves(targets))
        wanted, structure = jax.tree.flatten(targets)
        return step, structure.unflatten(map(placed, wanted, arrays)), meta

    def _read(self, which: str, targets: dict[str, Tree]) -> tuple[int, dict[str, Tree], dict[str, Any]] | None:
        """What `restore` gives, on the host."""
        candidates = list(self._wanted(which))
        if not candidates:
            return None
        for step in candidates:
            try:
                trees, meta = self._read_step(step, targets)
            except DamagedCheckpointError as error:
                self._set_aside(step, error)
                if self._manager is not None:
                    self._manager.close()
                    self._manager = self._open()
                last_error = error
                continue
            return step, trees, meta
        raise UserError(f"no checkpoint in {self.directory} is whole: {last_error}")  # pyright: ignore[reportPossiblyUnboundVariable]

    def _read_step(self, step: int, targets: dict[str, Tree]) -> tuple[dict[str, Tree], dict[str, Any]]:
        self._check_step(step, _step_folders(self.directory))
        try:
            meta = self._peek(step, targets)
            self._check_shapes(step, meta, targets)
            folder = self.directory / str(step)
            trees = {name: read_arrays(folder / name, tree) for name, tree in targets.items()}
        except (UserError, DamagedCheckpointError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise DamagedCheckpointError(f"the checkpoint of step {step} is damaged: {reason}") from error
        if any(tree_digest(trees[name]) != meta["digests"][name] for name in targets):
            raise DamagedCheckpointError(f"the checkpoint of step {step} is damaged: its arrays are not those saved")
        return trees, meta

    def _check_shapes(self, step: int, meta: dict[str, Any], targets: dict[str, Tree]) -> None:
        for item, key in SHAPES.items():
            if item not in targets or key not in meta:
                continue
            saved, wanted = meta[key], tree_shapes(targets[item])
            for name in sorted(set(saved) | set(wanted)):
                if saved.get(name) != wanted.get(name):
                    raise UserError(
                        f"the checkpoint of step {step} in {self.directory} holds {name} of shape {saved.get(name)}, "
                        f"but this configuration needs {wanted.get(name)}"
                    )

    def close(self) -> None:
        """Waits for pending saves and frees the manager; UserError when a save failed and nobody was told yet."""
        try:
            if self._manager is not None:
                self._manager.close()
        except Exception as error:
            if not self._failed_before:
                raise self._failed(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
