"""launch/local.sh: several processes that live, and end, together."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
from stand_ins import REPOSITORY, StandIns, wait_for

SCRIPT = REPOSITORY / "launch" / "local.sh"
TRAIN = ("--", "--config=my config.py", "--workdir=a run")

PROGRAM = """#!/usr/bin/env bash
index="${{!###*,}}"
printf '%s\\n' "$@" "$XLA_FLAGS" >{folder}/arguments.$index
trap 'touch {folder}/asked.$index; exit 75' TERM
trap 'touch {folder}/interrupted.$index' INT
echo "process $index speaks"
touch {folder}/running.$index
{behaviour}
"""


def program(stand_ins: StandIns, behaviour: str) -> None:
    """A stand-in for spt-jax that knows its index, and ends with 75 when it is asked to."""
    stand_ins.program("spt-jax", PROGRAM.format(folder=shlex.quote(str(stand_ins.folder)), behaviour=behaviour))


WAIT = "for _ in $(seq 400); do sleep 0.05; done; exit 9"


def run(stand_ins: StandIns, *options: str) -> subprocess.CompletedProcess[str]:
    return stand_ins.run("local.sh", *options, *TRAIN)


def test_every_process_gets_the_arguments_its_index_and_the_same_port(stand_ins):
    program(stand_ins, "exit 0")
    done = run(stand_ins, "-n", "3", "--devices", "2")
    assert done.returncode == 0, done.stderr
    ports = set()
    for index in range(3):
        arguments = (stand_ins.folder / f"arguments.{index}").read_text().splitlines()
        assert arguments[:3] == ["train", "--config=my config.py", "--workdir=a run"]
        meeting = re.fullmatch(rf"--distributed=127\.0\.0\.1:(\d+),3,{index}", arguments[3])
        assert meeting, arguments
        ports.add(int(meeting[1]))
        assert "--xla_force_host_platform_device_count=2" in arguments[4]
    assert len(ports) == 1
    assert 1024 <= ports.pop() < 65536


def test_evaluate_behind_the_dashes_takes_the_place_of_train(stand_ins):
    program(stand_ins, "exit 0")
    done = stand_ins.run("local.sh", "-n", "2", "--", "evaluate", "--workdir=a run")
    assert done.returncode == 0, done.stderr
    for index in range(2):
        arguments = (stand_ins.folder / f"arguments.{index}").read_text().splitlines()
        assert arguments[:2] == ["evaluate", "--workdir=a run"]
        assert arguments[2].endswith(f",2,{index}")


def test_each_line_begins_with_the_number_of_its_process(stand_ins):
    program(stand_ins, "echo 'and complains' >&2; exit 0")
    done = run(stand_ins, "-n", "2")
    lines = sorted((done.stdout + done.stderr).splitlines())
    assert lines == [
        "[0] and complains",
        "[0] process 0 speaks",
        "[1] and complains",
        "[1] process 1 speaks",
    ]


@pytest.mark.parametrize("code", [2, 7, 137])
def test_one_that_fails_ends_all_with_its_exit_code(stand_ins, code):
    everyone = f"until [ -e {shlex.quote(str(stand_ins.folder))}/running.0 ]; do sleep 0.01; done"
    program(stand_ins, f'if [ "$index" = 1 ]; then {everyone}; sleep 0.2; exit {code}; fi; {WAIT}')
    started = time.monotonic()
    done = run(stand_ins, "-n", "3")
    assert done.returncode == code, done.stdout
    assert time.monotonic() - started < 15
    assert {path.name for path in stand_ins.folder.glob("asked.*")} == {"asked.0", "asked.2"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_asks_every_process_once_and_the_code_is_that_of_a_stop(stand_ins, number):
    program(stand_ins, WAIT)
    with stand_ins.started("local.sh", "-n", "2", *TRAIN) as process:
        for index in range(2):
            wait_for(stand_ins.folder / f"running.{index}")
        time.sleep(0.2)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert {path.name for path in stand_ins.folder.glob("asked.*")} == {"asked.0", "asked.1"}
    assert not list(stand_ins.folder.glob("interrupted.*"))


def test_a_dry_run_prints_one_command_a_process_and_runs_none(stand_ins):
    program(stand_ins, "exit 0")
    done = run(stand_ins, "-n", "2", "--dry-run")
    assert done.returncode == 0
    assert [shlex.split(line)[1:] for line in done.stdout.splitlines()] == [
        ["train", "--config=my config.py", "--workdir=a run", f"--distributed=127.0.0.1:PORT,2,{index}"]
        for index in range(2)
    ]
    assert not list(stand_ins.folder.glob("running.*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-n", "2"), "nothing to train"),
        (("--", "--config=a"), "-n is missing"),
        (("-n", "0", "--", "a"), "-n needs a number of 1 or more, not '0'"),
        (("-n", "two", "--", "a"), "not 'two'"),
        (("-n",), "-n needs a number"),
        (("--devices", "-1"), "--devices needs a number"),
        (("--workers", "2"), "unknown argument '--workers'; allowed: -n COUNT"),
    ],
)
def test_a_wrong_argument_is_one_sentence(stand_ins, arguments, sentence):
    program(stand_ins, "exit 0")
    done = stand_ins.run("local.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("local: ")
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert not list(stand_ins.folder.glob("running.*"))
