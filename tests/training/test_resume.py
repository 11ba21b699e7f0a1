"""A run that is stopped, killed or disturbed ends as one that was not: whole processes, through the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_run import STEPS, assert_same_run, rows, short_llama, steps_on_disk, write_short_run

from spt_jax.exit_codes import STOPPED

pytestmark = pytest.mark.first_python


@dataclasses.dataclass(frozen=True)
class Command:
    """`spt-jax train` on a tiny Llama and the dialogues of the package."""

    folder: Path

    def start(self, workdir: Path | str, *flags: str, terminal: int = subprocess.PIPE) -> subprocess.Popen[str]:
        environment = os.environ | {
            "XLA_FLAGS": "",
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        arguments = ["train", f"--config={self.folder / 'tiny.py'}", f"--workdir={workdir}", *flags]
        return subprocess.Popen(
            [sys.executable, "-m", "spt_jax", *arguments],
            stdout=terminal,
            stderr=terminal,
            text=True,
            env=environment,
            cwd=self.folder,
        )

    def run(self, workdir: Path | str, *flags: str) -> tuple[int, str, str]:
        process = self.start(workdir, *flags)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("resume")
    write_short_run(folder)
    return Command(folder)


@pytest.fixture(scope="module")
def never_killed(command: Command) -> Path:
    workdir = command.folder / "never_killed"
    code, out, err = command.run(workdir)
    assert code == 0, err
    assert f"finished {STEPS} steps" in out
    return workdir


def wait_until(process: subprocess.Popen[str], seen: Callable[[], Any]) -> bool:
    """Whether something was seen while the process still ran."""
    while process.poll() is None:
        if seen():
            return True
        time.sleep(0.001)
    return False


def test_the_run_has_every_step_once_and_its_losses_are_numbers(never_killed):
    training = [(step, row) for step, row in rows(never_killed) if "loss/total" in row]
    assert [step for step, _ in training] == list(range(1, STEPS + 1))
    assert all(row["loss/total"] > 0 and row["gradient_norm/bank"] > 0 for _, row in training)
    assert [step for step, row in rows(never_killed) if "development/perplexity" in row] == [0, 6, 12, 18]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_says_how_to_go_on_and_loses_nothing(command, never_killed, tmp_path, number):
    workdir = tmp_path / "run"
    process = command.start(workdir)
    assert wait_until(process, lambda: 3 in steps_on_disk(workdir))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED, err
    stopped = re.search(rf"stopped after step (\d+) of {STEPS}, saved; the same command goes on from there", out)
    assert stopped, out
    assert "Traceback" not in err
    assert steps_on_disk(workdir)[-1] == int(stopped[1]) < STEPS
    code, out, err = command.run(workdir)
    assert code == 0, err
    assert f"resuming from step {stopped[1]} of {STEPS}" in out
    assert_same_run(workdir, never_killed)


def test_a_terminal_that_is_closed_is_a_polite_stop(command, never_killed, tmp_path):
    workdir = tmp_path / "run"
    ours, its = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    process = command.start(workdir, terminal=its)
    signal.signal(signal.SIGHUP, before)
    os.close(its)
    os.set_blocking(ours, False)

    def saved() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65_536)
        return 3 in steps_on_disk(workdir)

    assert wait_until(process, saved)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == STOPPED
    assert 3 <= steps_on_disk(workdir)[-1] < STEPS
    code, out, err = command.run(workdir)
    assert code == 0, err
    assert "resuming from step" in out
    assert_same_run(workdir, never_killed)


def test_a_run_killed_on_a_machine_that_is_gone_goes_on_from_its_bucket(command, never_killed, tmp_path, monkeypatch):
    bucket = tmp_path / "bucket" / "run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one machine"))
    process = command.start(f"file://{bucket}")
    # A file of a file:// bucket is there before its content is, unlike an object.
    assert wait_until(process, lambda: any(path.read_text() for path in (bucket / "complete").glob("*.json")))
    process.kill()
    process.communicate()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    code, out, err = command.run(f"file://{bucket}")
    assert code == 0, err
    assert re.search(rf"resuming from step \d+ of {STEPS}", out)
    assert_same_run(bucket, never_killed)


def fill(disk: Path) -> None:
    """Takes what space there is, to the last byte."""
    with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk_stops_the_run_with_a_sentence_and_space_lets_it_go_on(command, never_killed, small_disk):
    workdir = small_disk / "run"
    process = command.start(workdir, "--config.tracking.tensorboard=true")
    assert wait_until(process, lambda: 5 in steps_on_disk(workdir))
    while process.poll() is None:  # older checkpoints are deleted, which frees some space
        fill(small_disk)
        time.sleep(0.02)
    out, err = process.communicate()
    assert process.returncode == 2, (out, err)
    assert re.search("^spt-jax train: .* (could not be written to|cannot be written) .*No space left", err, re.M), err
    (small_disk / "filler").unlink()
    code, out, err = command.run(workdir)
    assert code == 0, err
    assert re.search(rf"resuming from step \d+ of {STEPS}", out)
    assert_same_run(workdir, never_killed)


def test_a_workdir_of_another_run_is_refused(command, never_killed):
    before = rows(never_killed)
    code, out, err = command.run(never_killed, "--config.seed=1")
    assert (code, out) == (2, "")
    assert err.startswith("spt-jax train: ")
    assert "holds another run: seed (0 there, 1 here); choose another --workdir" in err
    assert len(err.splitlines()) == 1
    assert rows(never_killed) == before


def test_another_lm_is_refused_with_both_named(command, never_killed):
    lm = short_llama()
    lm.tensors["model.norm.weight"] = lm.tensors["model.norm.weight"] + 1
    other = lm.write_folder(command.folder / "another_lm")
    code, _, err = command.run(never_killed, f"--config.model.source={other}")
    assert code == 2
    told = err.splitlines()[-1]
    assert told.startswith("spt-jax train: ")
    assert "was trained on" in told
    assert str(command.folder / "lm") in told
    assert str(other) in told
    assert "Traceback" not in err
