"""Whole processes joined over the loopback: they learn what one process learns, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from several_processes import Job, environment, start
from tiny_run import TALK, train_arguments, write_dialogues

from spt_jax.exit_codes import STOPPED
from spt_jax.storage.bucket import open_bucket
from spt_jax.storage.complete_steps import complete_steps
from spt_jax.storage.file_mirror import staging_folder

pytestmark = pytest.mark.first_python

STEPS = 24
RATES = ("tokens_per_second", "turns_per_second")
OPTIONS = (
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=4",
    "--config.train.evaluate_every=12",
    "--config.train.keep_latest=100",
    "--config.optimizer.learning_rate=0.01",
    "--config.data.max_length=256",
    "--config.tracking.tensorboard=False",
    "--heartbeat=20",
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("hosts")
    door, config, _ = train_arguments(folder, workdir=folder / "unused")
    return [door, config, *OPTIONS]


def rows(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in RATES} for line in lines]


def digests(workdir: Path, step: int) -> dict[str, str]:
    """Of the trainable tree and the optimizer's state."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["digests"]


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def train(arguments: list[str], workdir: Path, count: int, devices: int, *more: str) -> Job:
    job = start([*arguments, f"--workdir={workdir}", *more], count, devices)
    assert job.wait() == [0] * count, job.err
    return job


def disturb(job: Job, workdir: Path, at_step: int, do: Callable[[], None]) -> float:
    """Does it as soon as a step is logged; returns when that was."""
    deadline = time.monotonic() + 120
    path = workdir / "metrics.jsonl"
    while time.monotonic() < deadline and all(process.poll() is None for process in job.processes):
        if path.exists() and f'"step": {at_step},' in path.read_text():
            do()
            return time.monotonic()
        time.sleep(0.02)
    job.kill()
    raise AssertionError(f"step {at_step} was never logged: {[process.communicate() for process in job.processes]}")


def largest_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Of any figure of any step, relative to the size of the figure or 1."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    return max(
        abs(row[name] - other[name]) / max(1.0, abs(other[name]))
        for row, other in zip(found, expected, strict=True)
        for name in row
    )


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory) -> tuple[Path, Job]:
    """An undisturbed run of two processes of two devices."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, train(arguments, workdir, 2, 2)


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> Path:
    """The same run of one process of four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(arguments, workdir, 1, 4)
    return workdir


def test_two_processes_learn_what_one_learns(two, alone):
    workdir, _ = two
    assert largest_difference(rows(workdir), rows(alone)) <= 1e-5
    assert [row["step"] for row in rows(workdir) if "loss/total" in row] == list(range(1, STEPS + 1))


def test_four_processes_of_two_devices_learn_what_one_learns(arguments, alone, tmp_path):
    train(arguments, tmp_path / "run", 4, 2)
    assert largest_difference(rows(tmp_path / "run"), rows(alone)) <= 1e-5


def test_files_are_written_once_and_the_first_process_alone_speaks(two, alone):
    workdir, job = two
    assert {path.name for path in workdir.iterdir()} == {path.name for path in alone.iterdir()}
    assert steps_saved(workdir) == steps_saved(alone)
    assert "finished 24 steps" in job.out[0]
    assert "development perplexity" in job.err[0]
    assert job.said(1) == ""


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_others_with_a_sentence_and_the_job_goes_on_bitwise(arguments, two, tmp_path, victim):
    undisturbed, _ = two
    workdir = tmp_path / "run"
    job = start([*arguments, f"--workdir={workdir}"], 2, 2)
    killed = disturb(job, workdir, 7, job.processes[victim].kill)
    codes = job.wait()
    assert time.monotonic() - killed < 60
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [1]
    left = job.err[1 - victim]
    assert left.count(f"process {victim} of 2 (") == 1
    assert "is gone" in left
    assert "Traceback" not in left
    assert steps_saved(workdir) and max(steps_saved(workdir)) < STEPS
    train(arguments, workdir, 2, 2)
    assert rows(workdir) == rows(undisturbed)
    assert digests(workdir, STEPS) == digests(undisturbed, STEPS)


def under_open_mpi(arguments: list[str], workdir: Path) -> Job:
    """Two processes of two devices, which find each other by what Open MPI tells them."""
    mpirun = ["mpirun", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    patient = ["--mca", "odls_base_sigkill_timeout", "8"]  # seconds; else one for what is to be saved
    command = [*mpirun, *patient, "-n", "2", sys.executable, "-m", "spt_jax", *arguments, f"--workdir={workdir}"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Job([subprocess.Popen(command, text=True, env=environment(2), **pipes)])


def test_a_job_of_open_mpi_is_stopped_saves_goes_on_and_learns_what_one_process_learns(arguments, alone, tmp_path):
    if "(Open MPI) 4." not in subprocess.getoutput("mpirun --version"):
        pytest.skip("no Open MPI 4 here (Debian: apt install openmpi-bin)")
    workdir = tmp_path / "run"
    job = under_open_mpi([*arguments, "--config.train.steps=5000"], workdir)
    disturb(job, workdir, STEPS + 1, job.processes[0].terminate)
    assert job.wait() != [0]  # Open MPI has a code of its own
    assert "saved; the same command goes on from there" in job.out[0]
    saved = max(steps_saved(workdir))
    assert STEPS <= saved < 5000
    begun = [row for row in rows(workdir) if row["step"] <= STEPS]
    assert largest_difference(begun, rows(alone)) <= 1e-5
    job = under_open_mpi([*arguments, f"--config.train.steps={saved + 2}"], workdir)
    assert job.wait() == [0], job.err
    assert f"resuming from step {saved} of {saved + 2}" in job.out[0]


def test_sigterm_to_one_process_saves_and_stops_all_and_one_process_goes_on(arguments, alone, tmp_path):
    workdir = tmp_path / "run"
    job = start([*arguments, f"--workdir={workdir}"], 2, 2)
    disturb(job, workdir, 5, lambda: job.processes[1].send_signal(signal.SIGTERM))
    assert job.wait() == [STOPPED, STOPPED], job.err
    (stopped,) = [line for line in job.out[0].splitlines() if line.startswith("stopped after step")]
    step = int(stopped.split()[3])
    assert 5 < step < STEPS
    assert max(steps_saved(workdir)) == step == max(row["step"] for row in rows(workdir))
    train(arguments, workdir, 1, 4)
    assert largest_difference(rows(workdir), rows(alone)) <= 1e-5


def test_bad_input_on_one_host_ends_all_with_one_sentence(arguments, tmp_path):
    broken = tmp_path / "broken.txt"
    broken.write_text("1 your persona: i break things.\n2 hi\t \n", encoding="utf-8")
    started = time.monotonic()
    each = [[], [f"--config.data.train={broken}"]]
    job = start([*arguments, f"--workdir={tmp_path / 'run'}"], 2, 2, each=each)
    assert job.wait() == [2, 2], job.err
    assert time.monotonic() - started < 60
    said = "".join(job.err)
    assert said.count("broken.txt:2: the response is empty") == 1, said
    assert "spt-jax train: on process 1 of 2 (" in job.err[0]
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_hosts_that_share_no_folder_learn_the_same_and_go_on_from_that_of_the_first(arguments, two, tmp_path):
    undisturbed, _ = two
    each = [[f"--workdir={tmp_path / host / 'run'}"] for host in ("first", "second")]
    job = start(arguments, 2, 2, each=each)
    disturb(job, tmp_path / "first" / "run", 7, job.processes[1].kill)
    assert job.wait() == [1, -signal.SIGKILL]
    again = start(arguments, 2, 2, each=each)
    assert again.wait() == [0, 0], again.err
    assert "resuming from step" in again.out[0]
    assert rows(tmp_path / "first" / "run") == rows(undisturbed)
    assert digests(tmp_path / "first" / "run", STEPS) == digests(undisturbed, STEPS)
    assert not (tmp_path / "second").exists()


def test_a_run_of_two_in_a_bucket_goes_on_from_it_on_other_hosts(arguments, two, tmp_path):
    undisturbed, _ = two
    url = f"file://{tmp_path / 'bucket' / 'run'}"
    homes = [tmp_path / host for host in ("first", "second", "third", "fourth")]
    job = start([*arguments, f"--workdir={url}"], 2, 2, homes=homes[:2])
    folder = homes[0] / "spt_jax" / "buckets" / staging_folder(url).name / "run"
    disturb(job, folder, 9, lambda: job.processes[0].send_signal(signal.SIGTERM))
    assert job.wait() == [STOPPED, STOPPED], job.err
    newest = max(complete_steps(open_bucket(url)))
    assert 9 < newest < STEPS
    again = start([*arguments, f"--workdir={url}"], 2, 2, homes=homes[2:])
    assert again.wait() == [0, 0], again.err
    assert f"resuming from step {newest} of {STEPS}" in again.out[0]
    bucket = tmp_path / "bucket" / "run"
    assert rows(bucket) == rows(undisturbed)
    assert digests(bucket, STEPS) == digests(undisturbed, STEPS)
    assert not list(homes[1].glob("spt_jax/buckets")) and not list(homes[3].glob("spt_jax/buckets"))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--config.optimizer.learning_rate=0.02",), "optimizer.learning_rate (0.01 there, 0.02 here)"),
        (("--config.data.development={other}",), "the development dialogues ("),
        (("--config.data.test={other}",), "the test dialogues ("),
        (("--config.bank.init_file={bank}",), "what is learned, before the first step (bank.init_file) ("),
    ],
    ids=["options", "dialogues", "test", "bank"],
)
def test_a_process_that_was_given_another_run_ends_all_with_what_differs(arguments, tmp_path, other, named):
    own = write_dialogues(tmp_path / "own.txt", TALK[:2])
    places = {"other": write_dialogues(tmp_path / "other.txt", TALK[1:3]), "bank": tmp_path / "other.npy"}
    for number, name in enumerate(("own.npy", "other.npy")):
        np.save(tmp_path / name, np.full((3, 4, 16), number))
    other = [flag.format(**places) for flag in other]
    workdir = tmp_path / "run"
    given = [*arguments, f"--workdir={workdir}", f"--config.data.development={own}"]
    given += ["--config.bank.init=file", f"--config.bank.init_file={tmp_path / 'own.npy'}"]
    job = start(given, 2, 2, each=[[], other])
    assert job.wait() == [2, 2], job.err
    said = "".join(job.err)
    assert said.count(f"differs from what the first was given: {named}") == 1, said
    assert "spt-jax train: on process 1 of 2 (" in job.err[0]
    assert "Traceback" not in said
    assert not workdir.exists()


def test_dialogues_that_changed_since_the_start_end_all_with_one_sentence(arguments, two, tmp_path):
    workdir = shutil.copytree(two[0], tmp_path / "run")
    record = json.loads((workdir / "config.json").read_text())
    record["dialogues"]["development"] = "0" * 64
    (workdir / "config.json").write_text(json.dumps(record))
    job = start([*arguments, f"--workdir={workdir}"], 2, 2)
    assert job.wait() == [2, 2], job.err
    said = "".join(job.err)
    assert said.count("have changed since it was started: those for development (data.train = ") == 1, said
    assert "Traceback" not in said
    assert json.loads((workdir / "config.json").read_text()) == record


@pytest.mark.campaign
@pytest.mark.parametrize(
    "mesh",
    [
        ("--config.mesh.fsdp=4",),
        ("--config.mesh.fsdp=4", "--config.bank.init=clusters"),
        ("--config.mesh.tensor=2",),
        ("--config.mesh.data=1", "--config.mesh.tensor=4"),
        ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.model.quantization=int8"),
        ("--config.mesh.fsdp=4", "--config.method.kind=full"),
        ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.method.kind=lora"),
    ],
    ids=lambda flags: "-".join(flag.rpartition(".")[2] for flag in flags),
)
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_weights_spread_over_hosts_learn_what_one_process_learns(arguments, tmp_path, mesh, count, devices):
    options = [*arguments, *mesh, "--config.train.steps=6", "--config.train.save_every=3"]
    train(options, tmp_path / "alone", 1, 4)
    train(options, tmp_path / "several", count, devices)
    assert largest_difference(rows(tmp_path / "several"), rows(tmp_path / "alone")) <= 1e-5
    shutil.rmtree(tmp_path / "several" / "checkpoints" / "6")
    train(options, tmp_path / "several", 2, 2)  # what any number of processes saved, two restore
    assert largest_difference(rows(tmp_path / "several"), rows(tmp_path / "alone")) <= 1e-5


@pytest.mark.campaign
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_of_four_ends_all(arguments, tmp_path, victim):
    job = start([*arguments, f"--workdir={tmp_path / 'run'}"], 4, 1)
    killed = disturb(job, tmp_path / "run", 7, job.processes[victim].kill)
    codes = job.wait()
    assert time.monotonic() - killed < 60
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [1, 1, 1]
    for index, said in enumerate(job.err):
        assert (f"process {victim} of 4 (" in said) == (index != victim), said
