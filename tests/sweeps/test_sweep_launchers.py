"""Workers as jobs: of SLURM through submitit, and of SkyPilot through a stand-in for its command."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_jax.errors import UserError
from spt_jax.sweeps.launchers import (
    STORAGE_VARIABLE,
    SlurmWorker,
    WorkerCommand,
    skypilot_commands,
    skypilot_task,
    start_local,
    start_skypilot,
    start_slurm,
)

URL = "postgresql+psycopg://sweeper:s3cret@db/sweeps"


def noting(folder: Path) -> WorkerCommand:
    """A worker that writes the storage it was told of into a file of its own."""
    program = (
        "import os, sys; open(os.path.join(sys.argv[1], f'{os.getpid()}.seen'), 'w').write(os.environ[sys.argv[2]])"
    )
    return WorkerCommand([sys.executable, "-c", program, str(folder), STORAGE_VARIABLE], URL, "rates")


def seen(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("*.seen")]


def test_local_workers_are_told_the_storage_by_their_environment(tmp_path):
    command = noting(tmp_path)
    workers = start_local(command, 3, tmp_path / "logs")
    assert [worker.wait(30) for worker in workers] == [0, 0, 0]
    assert seen(tmp_path) == [URL] * 3
    assert "s3cret" not in command.shown()


def test_local_workers_have_each_a_gpu_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    program = "import os, sys; open(sys.argv[1] + os.environ['CUDA_VISIBLE_DEVICES'], 'w')"
    command = WorkerCommand([sys.executable, "-c", program, f"{tmp_path}/gpu_"], URL, "rates")
    workers = start_local(command, 2, tmp_path / "logs")
    assert [worker.wait(30) for worker in workers] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("gpu_*")) == ["gpu_2", "gpu_5"]


def test_slurm_workers_run_through_submitit(tmp_path):
    jobs = start_slurm(noting(tmp_path), 2, tmp_path / "slurm", {"timeout_min": 5}, cluster="local")
    assert (tmp_path / "slurm").stat().st_mode & 0o777 == 0o700  # the pickles hold the storage's password
    assert len({job.job_id for job in jobs}) == 2
    for job in jobs:
        job.result()
        job._process.wait(30)
    assert seen(tmp_path) == [URL] * 2


def test_a_slurm_job_that_loses_its_node_is_put_back_in_the_queue(tmp_path):
    worker = SlurmWorker(noting(tmp_path))
    delayed = worker.checkpoint()
    assert delayed.function is worker


SAVING = """
import os, signal, sys, time
os.chdir(sys.argv[1])
def save(number, frame):
    open("saved", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open("running", "w").write(str(os.getpid()))
time.sleep(60)
"""


class Requeued(Exception):
    """What submitit's handler of its signal ends a job with."""


@pytest.fixture
def submitit_listens(tmp_path: Path) -> Iterator[SlurmWorker]:
    """A worker that saves when it is asked to, in a process that handles submitit's signal as submitit does."""
    worker = SlurmWorker(WorkerCommand([sys.executable, "-c", SAVING, str(tmp_path)], URL, "rates"))

    def requeue(number: int, frame: Any) -> None:
        worker.checkpoint().dump(tmp_path / "requeued")
        raise Requeued

    before = signal.signal(signal.SIGUSR2, requeue)
    yield worker
    signal.signal(signal.SIGUSR2, before)


@contextmanager
def when_it_runs(folder: Path, then: Callable[[int], None]) -> Iterator[None]:
    def watch() -> None:
        end = time.monotonic() + 60
        while not (folder / "running").exists() or not (folder / "running").read_text():
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        then(int((folder / "running").read_text()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(70)


def test_before_a_slurm_jobs_time_is_over_its_worker_saves_though_all_its_processes_are_warned(
    tmp_path, submitit_listens
):
    def warn(worker: int) -> None:
        os.kill(worker, signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)

    with when_it_runs(tmp_path, warn), pytest.raises(Requeued):
        submitit_listens()
    assert (tmp_path / "saved").exists()
    again = pickle.loads((tmp_path / "requeued").read_bytes())
    assert again.function.command == submitit_listens.command


def test_a_slurm_job_whose_worker_was_stopped_is_put_back_in_the_queue(tmp_path, submitit_listens):
    with when_it_runs(tmp_path, lambda worker: os.kill(worker, signal.SIGTERM)), pytest.raises(Requeued):
        submitit_listens()
    assert (tmp_path / "saved").exists()


# As a real squeue of Slurm 22.05: the number of an array's one job is that of the array, all of whose jobs it lists.
SQUEUE = """case "$*" in
*--jobs=7_1*) echo {state} ;;
*--jobs=7*) echo RUNNING; echo {state} ;;
esac"""


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("COMPLETING", False)])
def test_the_job_that_has_its_arrays_number_is_put_back_unless_it_was_cancelled(
    tmp_path, submitit_listens, monkeypatch, state, again
):
    stand_in(tmp_path / "bin", "squeue", SQUEUE.format(state=state))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ends = pytest.raises(Requeued) if again else nullcontext()
    with when_it_runs(tmp_path, lambda worker: os.kill(worker, signal.SIGTERM)), ends:
        submitit_listens()
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").exists() == again


@pytest.mark.parametrize(
    ("environment", "platforms"),
    [
        ({}, "none"),
        ({"SLURM_GPUS_ON_NODE": "1"}, "cuda,cpu"),
        ({"SLURM_GPUS_ON_NODE": "1", "JAX_PLATFORMS": "rocm"}, "rocm"),
    ],
)
def test_a_slurm_job_with_gpus_does_not_go_on_with_the_cpu(
    tmp_path, submitit_listens, monkeypatch, environment, platforms
):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    program = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ.get('JAX_PLATFORMS', 'none'))"
    SlurmWorker(WorkerCommand([sys.executable, "-c", program, str(tmp_path / "platforms")], URL, "rates"))()
    assert (tmp_path / "platforms").read_text() == platforms


def test_a_slurm_job_whose_worker_fails_has_failed(tmp_path, submitit_listens):
    with pytest.raises(subprocess.CalledProcessError):
        SlurmWorker(WorkerCommand([sys.executable, "-c", "raise SystemExit(1)"], URL, "rates"))()
    assert not (tmp_path / "requeued").exists()


def submitted(folder: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any]) -> str:
    """What a stand-in for sbatch is given for two workers."""
    stand_in(folder / "bin", "sbatch", 'cat "$1" >> batch; echo Submitted batch job 7')
    stand_in(folder / "bin", "srun", "")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    assert len(start_slurm(noting(folder), 2, folder / "slurm", parameters)) == 2
    return (folder / "batch").read_text()


def test_a_stand_in_sbatch_is_given_the_parameters(tmp_path, monkeypatch):
    parameters = {"timeout_min": 90, "gpus_per_node": 1, "slurm_partition": "gpu"}
    batch = submitted(tmp_path, monkeypatch, parameters)
    for line in ("--time=90", "--gpus-per-node=1", "--partition=gpu", "--job-name=rates", "--array=0-1"):
        assert line in batch
    assert "cpus-per-task" not in batch


@pytest.mark.parametrize(
    ("parameters", "asked", "told"),
    [
        ({"cpus_per_task": 3}, ["--cpus-per-task=3"], ["--cpus-per-task=3"]),
        ({"slurm_cpus_per_task": 3, "cpus_per_task": 2}, ["--cpus-per-task=3"], ["--cpus-per-task=3"]),
        (
            {"cpus_per_task": 3, "slurm_srun_args": ["--cpu-bind=none", "-c", "4"]},
            ["--cpus-per-task=3"],
            ["--cpus-per-task=3", "--cpu-bind=none", "-c", "4"],
        ),
        ({"slurm_srun_args": "--cpu-bind=none -c 4"}, [], ["--cpu-bind=none", "-c", "4"]),
        ({}, [], []),
    ],
    ids=str,
)
def test_srun_is_told_the_cpus_that_the_job_is_asked_for_and_what_the_user_adds(
    tmp_path, monkeypatch, parameters, asked, told
):
    lines = submitted(tmp_path, monkeypatch, parameters).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("#SBATCH --cpus-per-task")] == asked
    words = next(shlex.split(line) for line in lines if line.startswith("srun "))
    assert words[words.index("--error") + 2 : words.index(sys.executable)] == told


@pytest.mark.parametrize(
    ("parameters", "cluster", "sentence"),
    [
        ({}, "slurm", "srun"),
        ({"timeout_minutes": 3}, "local", "timeout_minutes"),
        ({}, "slrum", "any executor named slrum"),
    ],
)
def test_what_slurm_cannot_do_is_one_sentence(tmp_path, monkeypatch, parameters, cluster, sentence):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=f"--launcher=slurm: submitit says: .*{sentence}"):
        start_slurm(noting(tmp_path), 1, tmp_path / "slurm", parameters, cluster)


def test_jobs_that_sbatch_refuses_are_one_sentence(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1")
    stand_in(tmp_path / "bin", "srun", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"--launcher=slurm: submitit says: .*invalid partition"):
        start_slurm(noting(tmp_path), 2, tmp_path / "slurm", {"slurm_partition": "gpus"})


def stand_in(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_skypilot_workers_get_the_tasks_machines_and_the_storage_without_showing_it(tmp_path, monkeypatch):
    task = tmp_path / "task.yaml"
    task.write_text(
        "resources:\n  accelerators: H100:1\nsetup: pip install .\nenvs:\n  WORKDIR: null\n  REGION: west\n"
        "run: spt-jax train --config=a.py\n"
    )
    command = WorkerCommand(["python", "launch/sweep.py", "--worker", "--out=/runs/a b"], URL, "rates")
    written = skypilot_task(task, command, tmp_path)
    described = yaml.safe_load(written.read_text())
    assert described["resources"] == {"accelerators": "H100:1"} and described["setup"] == "pip install ."
    assert described["run"].splitlines()[-1] == "python launch/sweep.py --worker '--out=/runs/a b'"
    assert described["envs"] == {"REGION": "west", STORAGE_VARIABLE: None}
    script = f'printf "%s\\n" "$*" >> {tmp_path}/calls; printf "%s\\n" "${STORAGE_VARIABLE}" >> {tmp_path}/storages'
    stand_in(tmp_path / "bin", "sky", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    said: list[str] = []
    start_skypilot(skypilot_commands(written, command, 3), URL, said.append)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [["jobs", "launch"]] * 3
    assert [f"--name rates-{number}" in call for number, call in enumerate(calls)] == [True] * 3
    assert (tmp_path / "storages").read_text().split() == [URL] * 3
    assert "s3cret" not in json.dumps([calls, said, written.read_text()])


def test_a_missing_sky_a_missing_task_and_a_failing_launch_are_sentences(tmp_path, monkeypatch):
    command = WorkerCommand(["python"], URL, "rates")
    with pytest.raises(UserError, match="does not exist; give a SkyPilot task"):
        skypilot_task(tmp_path / "task.yaml", command, tmp_path)
    (tmp_path / "task.yaml").write_text("- a list")
    with pytest.raises(UserError, match="is not a SkyPilot task"):
        skypilot_task(tmp_path / "task.yaml", command, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="needs the command sky"):
        start_skypilot([["sky"]], URL, print)
    stand_in(tmp_path / "bin", "sky", "exit 4")
    with pytest.raises(UserError, match="ended with exit code 4; the workers before it were started"):
        start_skypilot([["sky"]], URL, print)
