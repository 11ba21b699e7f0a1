"""launch/local.sh with the command itself: its processes meet and train together."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from several_processes import SECONDS, environment
from tiny_run import train_arguments

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.mark.first_python
def test_two_processes_of_the_script_meet_and_train_one_run(tmp_path):
    command = tmp_path / "bin" / "spt-jax"
    command.parent.mkdir()
    command.write_text(f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -m spt_jax "$@"\n')
    command.chmod(0o755)
    _, *arguments = train_arguments(tmp_path, workdir=tmp_path / "run", prompts=2)
    short = ("--config.train.steps=2", "--config.data.max_length=256", "--config.tracking.tensorboard=false")
    variables = environment(1)
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch" / "local.sh"), "-n", "2", "--", *arguments, *short],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=variables | {"PATH": f"{command.parent}:{variables['PATH']}"},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "on 2 cpu device(s)" in done.stdout
    (finished,) = [line for line in done.stdout.splitlines() if "finished 2 steps" in line]
    assert finished.startswith("[0] ")
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
