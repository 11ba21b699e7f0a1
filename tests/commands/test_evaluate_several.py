"""Several processes that evaluate as one: they find what one finds, one writes it, and what was found is not lost."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import copy_of
from several_processes import start
from tiny_run import TALK, train_arguments

pytestmark = pytest.mark.first_python

FLAGS = ("--metrics=default,hits", "--replies=0", "--heartbeat=20")
FIGURES = {"perplexity", "perplexity_per_word", "oracle_perplexity", "hits_1", "hits_turns", "f1", "usage"}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> Path:
    """The dialogues with the replies of all others as candidates."""
    path = tmp_path_factory.mktemp("candidates") / "test.jsonl"
    responses = [response for _, turns in TALK for _, response in turns]
    with path.open("w", encoding="utf-8") as file:
        for persona, turns in TALK:
            told = [
                {"query": q, "response": r, "candidates": [*[x for x in responses if x != r][:5], r]} for q, r in turns
            ]
            file.write(json.dumps({"persona": [persona], "turns": told}) + "\n")
    return path


def trained(folder: Path, *options: str) -> Path:
    door, config, _ = train_arguments(folder, workdir=folder / "unused")
    workdir = folder / "run"
    job = start([door, config, f"--workdir={workdir}", "--config.tracking.tensorboard=False", *options], 1, 4)
    assert job.wait() == [0], job.err
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("evaluated"))


def found(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (workdir / "predictions.jsonl").read_text().splitlines()
    return json.loads((workdir / "results.json").read_text()), [json.loads(line) for line in lines]


def evaluated(workdir: Path, folder: Path, count: int, devices: int, *flags: str):
    """A copy of the run, and what was said by those who evaluated it."""
    here = folder / f"by_{count}"
    shutil.copytree(workdir, here)
    job = start(["evaluate", f"--workdir={here}", *FLAGS, *flags], count, devices)
    assert job.wait() == [0] * count, job.err
    return here, job


@pytest.fixture(scope="module")
def greedy(workdir, candidates, tmp_path_factory):
    """What `evaluated` gives of two processes and of one, in batches of four."""
    flags = (f"--data={candidates}", "--batch=4")
    return [evaluated(workdir, tmp_path_factory.mktemp("greedy"), *how, *flags) for how in ((2, 2), (1, 4))]


def assert_same(here: Path, alone: Path) -> None:
    results, predictions = found(here)
    expected, wanted = found(alone)
    assert results["columns"].keys() == expected["columns"].keys()
    for name, column in expected["columns"].items():
        assert results["columns"][name].keys() == column.keys()
        for figure, value in column.items():
            other = results["columns"][name][figure]
            assert (other is None) == (value is None), (name, figure)
            assert value is None or np.allclose(other, value, rtol=1e-5, atol=1e-6), (name, figure)
    for row, other in zip(predictions, wanted, strict=True):
        numbers = {name: (row.pop(name), other.pop(name)) for name in ("scores", "nll")}
        assert row == other
        assert all(np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in numbers.values())
    assert results["samples"] == expected["samples"]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--beams=3", "--length_penalty=0.5", "--stop=e"), marks=pytest.mark.campaign),
        pytest.param(("--temperature=0.9", "--top_k=20", "--stop=e"), marks=pytest.mark.campaign),
    ],
    ids=["greedy", "beams", "drawn"],
)
def test_two_processes_find_what_one_finds_and_the_first_alone_speaks(request, workdir, candidates, tmp_path, flags):
    if flags:
        both = [evaluated(workdir, tmp_path, *how, f"--data={candidates}", *flags) for how in ((2, 2), (1, 4))]
    else:
        both = request.getfixturevalue("greedy")
    (here, job), (alone, _) = both
    assert_same(here, alone)
    assert {path.name for path in here.iterdir()} == {path.name for path in alone.iterdir()}
    assert "report: " in job.out[0]
    assert job.said(1) == ""
    results, _ = found(here)
    assert results["columns"]["after training"].keys() >= FIGURES
    assert results["columns"]["after training"]["hits_turns"] == sum(len(turns) for _, turns in TALK)


def test_an_evaluation_of_two_killed_on_one_host_goes_on_and_finds_the_same(workdir, candidates, greedy, tmp_path):
    here = tmp_path / "by_2"
    shutil.copytree(workdir, here)
    arguments = ["evaluate", f"--workdir={here}", *FLAGS, f"--data={candidates}", "--batch=4"]
    job = start(arguments, 2, 2)
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and not list(here.glob("evaluation.partial/*/*.replies.jsonl")):
            assert all(process.poll() is None for process in job.processes)
            time.sleep(0.01)
        job.processes[1].kill()
        codes = job.wait()
    finally:
        job.kill()
    assert codes == [1, -signal.SIGKILL], job.err
    assert "process 1 of 2 (" in job.err[0] and "Traceback" not in job.err[0]
    assert not (here / "results.json").exists()
    again = start(arguments, 2, 2)
    assert again.wait() == [0, 0], again.err
    assert "going on where an evaluation was stopped" in again.out[0]
    assert not (here / "evaluation.partial").exists()
    _, (alone, _) = greedy
    assert_same(here, alone)


def test_two_evaluate_a_run_in_a_bucket_which_the_first_alone_reads_and_writes(workdir, candidates, tmp_path):
    alone, _ = evaluated(workdir, tmp_path, 1, 4, f"--data={candidates}", "--limit=4")
    bucket, homes = tmp_path / "bucket", [tmp_path / "first", tmp_path / "second"]
    copy_of(workdir, f"file://{bucket}")
    arguments = ["evaluate", f"--workdir=file://{bucket}", *FLAGS, f"--data={candidates}", "--limit=4"]
    job = start(arguments, 2, 2, homes=homes)
    assert job.wait() == [0, 0], job.err
    assert job.said(1) == ""
    assert_same(bucket, alone)
    # An object store has no folders; the disk that stands for one here may keep empty ones.
    assert not [path for path in bucket.glob("evaluation.partial/**/*") if path.is_file()]
    assert list(homes[0].glob("spt_jax/buckets")) and not list(homes[1].glob("spt_jax/buckets"))


def test_results_that_are_there_are_shown_once_and_other_dialogues_on_one_host_are_refused(
    candidates, greedy, tmp_path
):
    (there, _), _ = greedy
    here = shutil.copytree(there, tmp_path / "run")
    arguments = ["evaluate", f"--workdir={here}", *FLAGS, "--batch=4"]
    shown = start([*arguments, f"--data={candidates}", "--reuse"], 2, 2)
    assert shown.wait() == [0, 0], shown.err
    assert "turns scored" in shown.out[0] and "evaluating" not in shown.err[0]
    other = tmp_path / "other.jsonl"
    other.write_text(candidates.read_text().replace("cats", "dogs"))
    refused = start(arguments, 2, 2, each=[[f"--data={candidates}"], [f"--data={other}"]])
    assert refused.wait() == [2, 2]
    assert "was asked for another evaluation than the first" in "".join(refused.err)
    assert "Traceback" not in "".join(refused.err)


@pytest.mark.campaign
@pytest.mark.parametrize("mesh", [("--config.mesh.data=1", "--config.mesh.tensor=4"), ("--config.mesh.fsdp=4",)])
def test_weights_spread_over_hosts_answer_as_on_one(candidates, tmp_path, mesh):
    workdir = trained(tmp_path, *mesh)
    for flags in ((), ("--beams=3",)):
        folder = tmp_path / f"with_{len(flags)}"
        here, _ = evaluated(workdir, folder, 4, 1, f"--data={candidates}", *flags)
        alone, _ = evaluated(workdir, folder, 1, 4, f"--data={candidates}", *flags)
        assert_same(here, alone)
