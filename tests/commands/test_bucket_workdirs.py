"""A bucket as --workdir: every door does with it what it does with a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import copy_of
from tiny_run import train_arguments, walk

from spt_jax.commands.main import main
from spt_jax.exit_codes import MISTAKE, STOPPED
from spt_jax.storage.bucket import Bucket, open_bucket
from spt_jax.storage.complete_steps import complete_steps, delete_step

LAST = 4


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{uuid.uuid4().hex}/runs/a"


def digests(bucket: Bucket) -> dict[str, str]:
    return json.loads(bucket.read(f"checkpoints/{LAST}/meta/metadata") or b"")["digests"]


def rows(text: str) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in found]


def test_a_run_in_a_bucket_goes_on_from_it_bitwise_without_its_local_folder(trained, cache_home, tmp_path, url, capsys):
    arguments = train_arguments(tmp_path, workdir=Path("unused"))[:-1]
    walk(*arguments, f"--workdir={url}")
    assert f"evaluate with: spt-jax evaluate --workdir={url}" in capsys.readouterr().out
    bucket = open_bucket(url)
    assert set(complete_steps(bucket)) == {0, 2, LAST}
    straight = json.loads((trained / "run" / "checkpoints" / str(LAST) / "meta" / "metadata").read_text())
    assert digests(bucket) == straight["digests"]
    metrics = (trained / "run" / "metrics.jsonl").read_text()
    assert rows((bucket.read("metrics.jsonl") or b"").decode()) == rows(metrics)
    # As it was when step 2 had been copied, on a machine that is no more.
    delete_step(bucket, LAST)
    shutil.rmtree(cache_home / "buckets")
    walk(*arguments, f"--workdir={url}")
    assert f"resuming from step 2 of {LAST}" in capsys.readouterr().out
    assert digests(bucket) == straight["digests"]
    assert rows((bucket.read("metrics.jsonl") or b"").decode()) == rows(metrics)


def test_an_evaluation_of_a_bucket_reads_no_optimizer_and_leaves_its_results_there(trained, cache_home, url, capsys):
    bucket = copy_of(trained / "run", url)
    for name in ("results.json", "predictions.jsonl", "report.html"):
        bucket.delete(name)
    walk("evaluate", f"--workdir={url}")
    assert f"spt-jax chat --workdir={url}" in capsys.readouterr().out
    assert bucket.read("predictions.jsonl") == (trained / "run" / "predictions.jsonl").read_bytes()
    results = json.loads(bucket.read("results.json") or b"")
    assert results["columns"] == json.loads((trained / "run" / "results.json").read_text())["columns"]
    assert not [name for name in bucket.files() if name.startswith("evaluation.partial/")]
    copies = [path.relative_to(cache_home).as_posix() for path in cache_home.rglob("*") if path.is_file()]
    assert [name for name in copies if "/trainable/" in name]
    assert not [name for name in copies if "/optimizer/" in name]
    walk("evaluate", f"--workdir={url}", "--reuse")


@pytest.mark.usefixtures("cache_home")
@pytest.mark.parametrize("checkpoint", ["best", "latest", "0"])
def test_scores_of_a_bucket_are_those_of_the_folder_for_every_choice_of_checkpoint(trained, tmp_path, url, checkpoint):
    bucket = copy_of(trained / "run", url)
    rest = (f"--data={trained / 'test.txt'}", f"--checkpoint={checkpoint}")
    walk("score", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'folder.jsonl'}", *rest)
    walk("score", f"--workdir={url}", f"--out={tmp_path / 'bucket.jsonl'}", *rest)
    assert (tmp_path / "bucket.jsonl").read_bytes() == (tmp_path / "folder.jsonl").read_bytes()
    # What was read before is no reason to read it when the bucket has another.
    if checkpoint == "latest":
        delete_step(bucket, LAST)
        walk("score", f"--workdir={url}", f"--out={tmp_path / 'bucket.jsonl'}", *rest)
        walk("score", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'folder.jsonl'}", *rest[:1], "--checkpoint=2")
        assert (tmp_path / "bucket.jsonl").read_bytes() == (tmp_path / "folder.jsonl").read_bytes()


@pytest.mark.usefixtures("cache_home")
def test_compare_takes_runs_in_buckets_under_the_names_they_were_given(trained, tmp_path, url):
    copy_of(trained / "run", url)
    walk("compare", trained / "run", url, "--samples=100", "--nogroup", f"--out={tmp_path}", f"--baseline={url}")
    assert url in (tmp_path / "comparison.json").read_text()


@pytest.mark.usefixtures("cache_home")
def test_what_is_wrong_with_a_bucket_is_one_sentence(trained, tmp_path, url, capsys):
    arguments = train_arguments(tmp_path, workdir=Path("unused"))[:-1]
    for door in (
        ["evaluate", f"--workdir={url}"],
        ["score", f"--workdir={url}", f"--data={trained / 'test.txt'}", f"--out={tmp_path / 'o.jsonl'}"],
        ["compare", url],
        ["convert", "official", str(tmp_path), "--model=x", f"--workdir={url}"],
        [*arguments, f"--workdir={url}", "--config.data.train=missing.txt"],
        [*arguments, "--workdir=nothing://bucket/run"],
    ):
        assert main([str(argument) for argument in door]) == MISTAKE, door
        told = capsys.readouterr().err
        assert told.startswith("spt-jax ")
        assert len(told.splitlines()) == 1, told
    assert open_bucket(url).files() == {}


@contextlib.contextmanager
def unreachable(monkeypatch) -> Iterator[None]:
    """A network over which nothing is written but the identity of a run."""
    import fsspec

    store = fsspec.filesystem("memory")
    write = store.pipe_file

    def failing(path: str, content: bytes, **options: object) -> None:
        if not path.endswith("run_id"):
            raise OSError("the network is unreachable")
        write(path, content, **options)

    with monkeypatch.context() as patch:
        patch.setattr("spt_jax.storage.bucket.time.sleep", lambda seconds: None)
        patch.setattr(store, "pipe_file", failing)
        yield


@pytest.mark.usefixtures("cache_home")
def test_a_training_whose_bucket_fails_at_the_end_tells_it_and_the_same_command_copies_the_rest(
    tmp_path, url, capsys, monkeypatch
):
    arguments = [*train_arguments(tmp_path, workdir=Path("unused"))[:-1], f"--workdir={url}"]
    with unreachable(monkeypatch):
        assert main([str(argument) for argument in arguments]) == STOPPED
    out = capsys.readouterr().out
    assert f"finished {LAST} steps" in out
    assert "the network is unreachable" in out
    assert "the same command copies them" in out
    walk(*arguments)
    assert set(complete_steps(open_bucket(url))) == {0, 2, LAST}


@pytest.fixture
def unsent(trained, cache_home, url, capsys, monkeypatch) -> Bucket:
    """A bucket's run whose evaluation could not be copied into it."""
    bucket = copy_of(trained / "run", url)
    with unreachable(monkeypatch):
        assert main(["evaluate", f"--workdir={url}", "--limit=1"]) == STOPPED
    assert "the same command copies them" in capsys.readouterr().out
    assert bucket.read("results.json") == (trained / "run" / "results.json").read_bytes()
    return bucket


def test_an_evaluation_that_its_bucket_could_not_take_is_copied_by_the_same_command(unsent, trained, url, monkeypatch):
    walk("score", f"--workdir={url}", f"--data={trained / 'test.txt'}", f"--out={os.devnull}", "--limit=1")
    monkeypatch.setattr("spt_jax.commands.evaluate._measured", None)  # nothing is measured again
    walk("evaluate", f"--workdir={url}", "--limit=1", "--reuse")
    assert json.loads(unsent.read("results.json") or b"")["turns"] == 2
    assert len((unsent.read("predictions.jsonl") or b"").splitlines()) == 2


def test_an_evaluation_that_its_bucket_could_not_take_gives_way_to_a_later_one(unsent, trained, cache_home, url):
    later = json.loads((trained / "run" / "results.json").read_text()) | {"source": "elsewhere"}
    unsent.write("results.json", json.dumps(later).encode())
    walk("score", f"--workdir={url}", f"--data={trained / 'test.txt'}", f"--out={os.devnull}", "--limit=1")
    (here,) = cache_home.rglob("reading/results.json")
    assert here.read_bytes() == unsent.read("results.json")
    assert (here.parent / "predictions.jsonl").read_bytes() == (trained / "run" / "predictions.jsonl").read_bytes()
