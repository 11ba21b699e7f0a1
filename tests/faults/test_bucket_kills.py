"""A run whose workdir is a bucket is killed while its checkpoints are copied: what has its marker there is whole.

The bucket is a folder behind fsspec, so that it outlives the processes. After half of the kills the local copy goes
too, as with a machine that is taken away.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from campaign import Campaign
from disturbances import Disturbance
from forked_command import SECONDS, Start
from short_run import STEPS, steps_on_disk

from spt_jax.exit_codes import FINISHED
from spt_jax.storage.bucket import open_bucket
from spt_jax.storage.complete_steps import complete_steps

pytestmark = pytest.mark.first_python

SLOW = Disturbance(copy_seconds=0.004)


def whole(bucket: Path) -> list[int]:
    """The steps that a reader of the bucket finds."""
    return sorted(complete_steps(open_bucket(f"file://{bucket}")))


def half_copied(bucket: Path) -> set[int]:
    """The steps of which files are there, and no marker; folders are none of an object store's business."""
    marked = {int(path.stem) for path in bucket.glob("complete/*.json")}
    return {step for step in steps_on_disk(bucket) if step not in marked and has_files(bucket / f"checkpoints/{step}")}


def has_files(folder: Path) -> bool:
    return any(names for _, _, names in os.walk(folder))


def until_a_copy(start: Start, bucket: Path, target: int) -> None:
    """Returns when a step from `target` on is half copied."""
    deadline = time.monotonic() + SECONDS
    while not any(step >= target for step in half_copied(bucket)):
        assert start.process.is_alive(), start.err
        assert time.monotonic() < deadline, f"step {target} was not copied: {start.err}"
        time.sleep(0.0005)


def killed_while_copying(undisturbed: Campaign, bucket: Path, kills: int, seed: int) -> int:
    """Starts and kills a run; returns how many of the kills left a step half copied."""
    draws, torn, known = random.Random(seed), 0, -1
    staged = undisturbed.command.caches / "spt_jax" / "buckets"
    for number in range(kills):
        start = undisturbed.command.start(f"file://{bucket}", disturbance=SLOW)
        try:
            until_a_copy(start, bucket, target=(STEPS - 4) * number // kills)
            time.sleep(draws.uniform(0, 0.05))
        finally:
            start.process.kill()
        assert start.wait() == -signal.SIGKILL, (start.out, start.err)
        resumed = re.search(r"resuming from step (\d+) of", start.out)
        assert (int(resumed[1]) if resumed else -1) == known, (start.out, start.err)
        torn += bool(half_copied(bucket))
        if draws.random() < 0.5:
            shutil.rmtree(staged)
        local = [step for folder in staged.glob("*/run") for step in steps_on_disk(folder)]
        known = max([*whole(bucket), *local], default=-1)
    return torn


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.campaign)])
def test_a_run_killed_while_it_is_copied_into_its_bucket_ends_as_the_undisturbed_one(undisturbed, tmp_path, kills):
    bucket = tmp_path / "bucket" / "run"
    assert killed_while_copying(undisturbed, bucket, kills, seed=kills) >= kills // 3
    code, out, err = undisturbed.command.run(f"file://{bucket}")
    assert code == FINISHED, err
    assert re.search(rf"resuming from step \d+ of {STEPS}", out)
    undisturbed.assert_undisturbed(bucket)
    assert whole(bucket)[-1] == STEPS and not half_copied(bucket)
