"""Numbers that are not, a loader that raises: what a run skips or reports, and what is left to go on from."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from disturbances import Disturbance
from forked_command import SECONDS, Start
from short_run import STEPS, assert_same_run, rows, steps_on_disk

from spt_jax.exit_codes import FINISHED, MISTAKE, STOPPED

pytestmark = pytest.mark.first_python

NANS = Disturbance(nan_from=3, nan_until=5)


def kill_after(step: int, start: Start, workdir: Path) -> None:
    """Kills a run once it has saved this step, before its end."""
    deadline = time.monotonic() + SECONDS
    try:
        while max(steps_on_disk(workdir), default=-1) < step:
            assert start.process.is_alive(), start.err
            assert time.monotonic() < deadline, f"step {step} did not come: {start.err}"
            time.sleep(0.005)
    finally:
        start.process.kill()
        start.wait()


def test_a_run_with_steps_that_are_not_finite_is_the_same_run_when_it_is_killed(undisturbed, tmp_path):
    command = undisturbed.command
    code, _, err = command.run(tmp_path / "whole", disturbance=NANS)
    assert code == FINISHED, err
    assert [step for step, row in rows(tmp_path / "whole") if row.get("bad_in_a_row")] == [4, 5]
    start = command.start(tmp_path / "killed", disturbance=NANS)
    kill_after(4, start, tmp_path / "killed")
    code, out, err = command.run(tmp_path / "killed", disturbance=NANS)
    assert code == FINISHED, err
    assert "resuming from step" in out
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_restarts_do_not_forget_how_many_bad_steps_came_in_a_row(undisturbed, tmp_path):
    workdir, forever = tmp_path / "run", Disturbance(nan_from=6, nan_until=STEPS)
    start = undisturbed.command.start(workdir, "--config.train.max_bad_steps=99", disturbance=forever)
    kill_after(7, start, workdir)
    for _ in range(2):
        done = steps_on_disk(workdir)[-1]
        code, _, err = undisturbed.command.run(workdir, "--config.train.max_bad_steps=4", disturbance=forever)
        assert code == MISTAKE, err
        told = re.search(r"^spt-jax train: 4 steps in a row \(up to step (\d+)\) gave a loss", err.splitlines()[-1])
        assert told, err
        assert int(told[1]) == max(10, done + 1)


def test_a_loader_that_raises_ends_the_run_and_the_steps_before_it_are_kept(undisturbed, tmp_path):
    workdir, saved = tmp_path / "run", -1
    for step, error in ((5, ValueError), (9, OSError), (13, MemoryError)):
        code, out, err = undisturbed.command.run(workdir, disturbance=Disturbance(raise_at=step, error=error))
        assert code not in (FINISHED, STOPPED), (out, err)
        assert f"the batch of step {step} cannot be made" in err
        assert saved < 0 or f"resuming from step {saved} of" in out
        saved = steps_on_disk(workdir)[-1]
        assert saved == step
    code, out, err = undisturbed.command.run(workdir)
    assert code == FINISHED, err
    assert f"resuming from step {saved} of" in out
    undisturbed.assert_undisturbed(workdir)
