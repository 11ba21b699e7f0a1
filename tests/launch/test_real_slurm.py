"""launch/slurm.sbatch and workers of a sweep on a SLURM of one machine, Debian's: what the stand-ins are made after."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_ins import REPOSITORY

from spt_jax.sweeps.launchers import WorkerCommand, start_slurm

pytestmark = pytest.mark.first_python
CONFIGURATION = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# A run of which one task takes longer than the other to save.
TASK = """#!/usr/bin/env bash
echo "task $SLURM_PROCID runs" >>"$NOTES"
trap 'stop=1' TERM
while [ -z "${stop:-}" ]; do sleep 0.1; done
sleep $((3 * (1 - SLURM_PROCID)))
echo "task $SLURM_PROCID saved" >>"$NOTES"
exit 75
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs a command of a SLURM that is up; gives what it says."""
    lacking = [program for program in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(program) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip("no SLURM that root could start here (Debian: apt install slurmctld slurmd slurm-client munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(folder=folder, host=host, control=free_port(), node=free_port())
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munged = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munged],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]

    def run(*command: str, **more: Any) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30, **more)
        return done.stdout.strip()

    with contextlib.ExitStack() as stack:
        for words in daemons:
            with (folder / f"{words[0]}.out").open("w") as said:
                daemon = subprocess.Popen(words, env=environment, stdout=said, stderr=subprocess.STDOUT)
            stack.callback(end, daemon)
            time.sleep(0.5)
        wait_until(lambda: "idle" in run("sinfo", "--noheader", "--format=%T"), "a node is idle")
        yield run
        run("scancel", "--user=root")


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(subprocess.SubprocessError):
            if holds():
                return
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("stop", "again"),
    [
        # What --signal=B:TERM sends before the job's end.
        (("scancel", "--signal=TERM", "--batch"), True),
        (("scancel",), False),
    ],
    ids=["its time is nearly over", "it is cancelled"],
)
def test_every_task_saves_and_the_job_is_queued_again_unless_it_was_cancelled(slurm, tmp_path: Path, stop, again):
    program = tmp_path / ".venv" / "bin" / "spt-jax"
    program.parent.mkdir(parents=True)
    program.write_text(TASK)
    program.chmod(0o755)
    notes, log = tmp_path / "notes", tmp_path / "log"
    asked = ["--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}", f"--export=ALL,NOTES={notes}"]
    job = slurm(
        "sbatch", "--parsable", *asked, str(REPOSITORY / "launch" / "slurm.sbatch"), "--workdir=x", cwd=tmp_path
    )
    wait_until(lambda: notes.exists() and notes.read_text().count("runs") == 2, "both tasks run")
    slurm(*stop, job)
    wait_until(lambda: "the run was stopped and saved" in log.read_text(), "the script says how it ended")
    assert sorted(notes.read_text().splitlines())[1::2] == ["task 0 saved", "task 1 saved"]

    def state() -> str:
        return slurm("scontrol", "show", "job", job)

    wait_until(lambda: ("JobState=PENDING" if again else "JobState=CANCELLED") in state(), "its state is as expected")
    assert f"Restarts={int(again)}" in state()


# A worker that works until another is there, so that both jobs are in the queue, and is stopped then.
WORKER = """
import os, pathlib, sys, time
notes = pathlib.Path(sys.argv[1])
(notes / os.environ["SLURM_JOB_ID"]).touch()
while len(list(notes.iterdir())) < 2:
    time.sleep(0.1)
sys.exit(75)
"""


def test_every_worker_of_a_sweep_that_is_stopped_is_queued_again(slurm, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm("printenv", "SLURM_CONF"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "notes").mkdir()
    command = WorkerCommand([sys.executable, "-c", WORKER, str(tmp_path / "notes")], "sqlite://", "rates")
    jobs = start_slurm(command, 2, tmp_path / "slurm", {"timeout_min": 5})
    try:
        for job in jobs:
            wait_until(lambda job=job: "Restarts=1" in slurm("scontrol", "show", "job", job.job_id), job.job_id)
    finally:
        slurm("scancel", *(job.job_id for job in jobs))
