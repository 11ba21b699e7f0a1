"""A run whose workdir is a bucket is killed while its checkpoints are copied: what has its marker there is whole.

The bucket is a folder behind fsspec, so that it outlives the processes. After half of the kills the local copy goes
too, as with a machine that is taken away.
"""

from __future__ import annotations

import dataclasses
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

KILLS = 5
"""Of each run."""
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


def copied(bucket: Path) -> set[tuple[int, int]]:
    """The steps that are half copied, with how many files there are of each."""
    return {(step, sum(1 for _ in (bucket / f"checkpoints/{step}").rglob("*"))) for step in half_copied(bucket)}


def until_a_copy(start: Start, bucket: Path, target: int) -> None:
    """Returns when this start has copied a part of a step from `target` on."""
    deadline, before = time.monotonic() + SECONDS, copied(bucket)
    while not any(step >= target for step, _ in copied(bucket) - before):
        assert start.process.is_alive(), start.err
        assert time.monotonic() < deadline, f"step {target} was not copied: {start.err}"
        time.sleep(0.0005)


@dataclasses.dataclass
class Seen:
    """What the kills met: steps half copied, and starts that went on from a step."""

    torn: int = 0
    resumed: int = 0


def kill_while_copying(undisturbed: Campaign, bucket: Path, seed: int, seen: Seen) -> None:
    """Starts a run and kills it, `KILLS` times."""
    draws, known = random.Random(seed), -1
    staged = undisturbed.command.caches / "spt_jax" / "buckets"
    shutil.rmtree(staged, ignore_errors=True)
    for number in range(KILLS):
        start = undisturbed.command.start(f"file://{bucket}", disturbance=SLOW)
        try:
            until_a_copy(start, bucket, target=(STEPS - 4) * number // KILLS)
            time.sleep(draws.uniform(0, 0.05))
        finally:
            start.process.kill()
        assert start.wait() == -signal.SIGKILL, (start.out, start.err)
        # Nothing is said before a local copy that is further than the bucket has been copied.
        resumed = re.search(r"resuming from step (\d+) of", start.out)
        assert resumed is None or int(resumed[1]) == known, (start.out, start.err)
        seen.resumed += resumed is not None
        seen.torn += bool(half_copied(bucket))
        if draws.random() < 0.5:
            shutil.rmtree(staged)
        local = [step for folder in staged.glob("*/run") for step in steps_on_disk(folder)]
        known = max([*whole(bucket), *local], default=-1)


@pytest.mark.parametrize("runs", [1, pytest.param(12, marks=pytest.mark.campaign)])
def test_a_run_killed_while_it_is_copied_into_its_bucket_ends_as_the_undisturbed_one(undisturbed, tmp_path, runs):
    seen = Seen()
    for run in range(runs):
        bucket = tmp_path / f"bucket {run}" / "run"
        kill_while_copying(undisturbed, bucket, seed=run, seen=seen)
        code, out, err = undisturbed.command.run(f"file://{bucket}")
        assert code == FINISHED, err
        assert re.search(rf"resuming from step \d+ of {STEPS}", out)
        undisturbed.assert_undisturbed(bucket)
        assert whole(bucket)[-1] == STEPS and not half_copied(bucket)
    print(f"{runs * KILLS} kills in {runs} runs: {seen}")
    assert seen.torn >= runs * KILLS // 3 and seen.resumed >= runs
