"""Nothing is lost but the steps since the last save, whatever signal comes whenever."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import SIGNALS, Campaign, Report
from forked_command import SECONDS
from phases import PHASES
from short_run import STEPS, assert_same_run, steps_on_disk, unfinished_saves

from spt_jax.exit_codes import FINISHED

pytestmark = pytest.mark.first_python


@pytest.mark.parametrize("faults", [10, pytest.param(200, marks=pytest.mark.campaign)])
def test_runs_that_are_killed_stopped_and_woken_at_random_end_as_the_undisturbed_one(undisturbed, tmp_path, faults):
    report = undisturbed.run(tmp_path, faults, seed=faults)
    assert report.faults == faults
    if faults >= 200:
        assert all(report.hits[phase, signal.SIGKILL.name] for phase in PHASES), report.to_markdown()
        assert report.unfinished_saves and report.stopped_and_saved and report.jumping_clocks
        assert all(sum(report.hits[phase, s.name] for phase in PHASES) for s in SIGNALS)


def test_a_report_counts_what_hit():
    report = Report(seed=3, runs=2)
    report.hits.update({("save", "SIGKILL"): 2, ("step", "SIGSTOP"): 1})
    assert report.to_dict()["faults"] == 3
    table = report.to_markdown().splitlines()
    assert "| save | 2 | 0 | 0 |" in table
    assert "| step | 0 | 0 | 1 |" in table
    assert "3 faults in 2 runs" in table[-1]


def kills(seed: int, count: int) -> Iterator[str]:
    generator = random.Random(seed)
    for number in range(count):
        # Half of them at the sight of an unfinished save, half a random while after some progress.
        yield "save" if number % 2 == 0 else f"{generator.uniform(0, 0.15)}"


def killed_often(undisturbed: Campaign, workdir: Path, seed: int, count: int) -> int:
    """Starts and kills a run; returns how many of the kills left an unfinished save behind."""
    generator = random.Random(seed)
    during_a_save, newest = 0, -1
    for number, moment in enumerate(kills(seed, count)):
        start, deadline = undisturbed.command.start(workdir), time.monotonic() + SECONDS
        # The targets ascend, so that the run gets on and every kill comes before the end.
        target = (STEPS - 4) * number // count + generator.randrange(2)
        try:
            while max(steps_on_disk(workdir), default=-1) < target or (
                moment == "save" and not unfinished_saves(workdir)
            ):
                assert start.process.is_alive(), start.err
                assert time.monotonic() < deadline, f"step {target} did not come: {start.err}"
                time.sleep(0.001)
            if moment != "save":
                time.sleep(float(moment))
        finally:
            start.process.kill()
        assert start.wait() == -signal.SIGKILL, (start.out, start.err)
        # A kill may tear a save that is not finished or a checkpoint that is being deleted, never the newest one.
        resumed = re.search(r"resuming from step (\d+) of", start.out)
        assert resumed is None or int(resumed[1]) == newest, (start.out, start.err)
        newest = steps_on_disk(workdir)[-1]
        during_a_save += bool(unfinished_saves(workdir))
    return during_a_save


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 5), *[pytest.param(seed, 8, marks=pytest.mark.campaign) for seed in range(1, 5)]]
)
def test_a_run_killed_at_random_ends_bitwise_as_one_never_killed(undisturbed, tmp_path, seed, count):
    workdir = tmp_path / "run"
    assert killed_often(undisturbed, workdir, seed, count) >= 1
    code, out, err = undisturbed.command.run(workdir)
    assert code == FINISHED, err
    assert re.search(rf"resuming from step \d+ of {STEPS}", out)
    assert_same_run(workdir, undisturbed.undisturbed)
    assert not unfinished_saves(workdir)
