"""A bucket and its local folder: the one that is further is the run, and neither is lost for the other's sake."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buckets import Network, contents, new_url, write_step

from spt_jax.errors import UserError
from spt_jax.storage.bucket import Bucket, BucketError, open_bucket
from spt_jax.storage.complete_steps import complete_steps, manifest_of, push_step
from spt_jax.storage.staged_run import StagedRun

pytestmark = pytest.mark.usefixtures("cache_home")

NEVER = 3600.0


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """The network between every bucket and its store, from now on."""
    import fsspec

    network = Network(fsspec.filesystem("memory"))
    real = fsspec.url_to_fs
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (network, real(url, **options)[1]))
    return network


def staged(url: str, said: list[str] | None = None, interval: float = NEVER) -> StagedRun:
    return StagedRun(url, (said if said is not None else []).append, interval=interval, waits=())


def begin(folder: Path, *steps: int, text: str = "") -> None:
    """What a training leaves: its configuration, its metrics and checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{step}\n" for step in steps)
    for step in steps:
        write_step(folder, step, text)


def wait_for(seen: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_a_run_whose_local_folder_is_gone_is_found_again_file_by_file():
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0, 10)
        (run.folder / "initial.safetensors").write_bytes(b"initial")
    assert run.complete
    before = contents(run.folder)
    shutil.rmtree(run.folder.parent)
    with staged(url) as run:
        assert contents(run.folder) == before


def test_checkpoints_are_copied_while_the_work_goes_on_their_metrics_before_their_marker(network):
    url = new_url()
    with staged(url, interval=0.01) as run:
        begin(run.folder, 0)
        wait_for(lambda: 0 in complete_steps(open_bucket(url)))
        assert open_bucket(url).read("metrics.jsonl") == b"0\n"
        begin(run.folder, 1)
        wait_for(lambda: 1 in complete_steps(open_bucket(url)))
        assert open_bucket(url).read("metrics.jsonl") == b"0\n1\n"
    written = [name.rpartition("/a/")[2] for request, name in network.requests if request in ("pipe_file", "put_file")]
    for step in (0, 1):
        marker = written.index(f"complete/{step}.json")
        assert "metrics.jsonl" in written[:marker]
        assert {f"checkpoints/{step}/{n}" for n in contents(run.folder / "checkpoints" / str(step))} <= set(
            written[:marker]
        )


def test_what_is_deleted_here_is_deleted_there_but_never_the_last_one():
    url = new_url()
    with staged(url, interval=0.01) as run:
        begin(run.folder, 0, 1, 2)
        wait_for(lambda: set(complete_steps(open_bucket(url))) == {0, 1, 2})
        shutil.rmtree(run.folder / "checkpoints" / "0")
        wait_for(lambda: set(complete_steps(open_bucket(url))) == {1, 2})
        wait_for(lambda: not [name for name in open_bucket(url).files() if name.startswith("checkpoints/0/")])
        shutil.rmtree(run.folder / "checkpoints" / "2")
    assert set(complete_steps(open_bucket(url))) == {1, 2}


def test_a_step_that_is_deleted_here_while_it_is_copied_leaves_nothing_there(network, monkeypatch):
    url = new_url()
    whole = Bucket.upload

    def upload(bucket: Bucket, source: Path, name: str) -> None:
        whole(bucket, source, name)
        if name.startswith("checkpoints/0/"):
            shutil.rmtree(source.parents[len(Path(name).parts) - 3], ignore_errors=True)

    monkeypatch.setattr(Bucket, "upload", upload)
    with staged(url) as run:
        begin(run.folder, 0, 1)
    assert set(complete_steps(open_bucket(url))) == {1}
    assert not [name for name in open_bucket(url).files() if name.startswith("checkpoints/0/")]


def test_a_first_write_that_was_killed_does_not_keep_the_run_from_its_folder(tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    (tmp_path / "bucket" / "run").mkdir(parents=True)
    (tmp_path / "bucket" / "run" / ".run_id.part").write_bytes(b"12")
    with staged(url) as run:
        begin(run.folder, 0)
    assert set(complete_steps(open_bucket(url))) == {0}


def test_a_local_folder_that_somebody_removed_takes_nothing_from_the_bucket():
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0, 1)
    before = open_bucket(url).files()
    with staged(url) as run:
        shutil.rmtree(run.folder)
    assert open_bucket(url).files() == before


def test_a_failing_network_is_told_once_and_ends_nothing_and_its_return_is_told_too(network):
    url, said = new_url(), []
    with staged(url, said, interval=0.01) as run:
        network.budget = 0
        begin(run.folder, 0)
        wait_for(lambda: said)
        failed = len(network.requests)
        wait_for(lambda: len(network.requests) > failed + 10)
        assert len(said) == 1
        assert "cannot be written (the network is unreachable); the work goes on in" in said[0]
        network.budget = None
        wait_for(lambda: len(said) == 2)
        assert said[1] == "the bucket takes copies again; it has everything"
        assert set(complete_steps(open_bucket(url))) == {0}
    assert run.complete


def test_what_could_not_be_copied_at_the_end_is_copied_by_the_next_start(network):
    url, said = new_url(), []
    with staged(url) as run:
        begin(run.folder, 0, 1)
    with staged(url, said) as run:
        network.budget = 3
        begin(run.folder, 2)
        shutil.rmtree(run.folder / "checkpoints" / "0")
    assert not run.complete
    assert "the same command copies them" in said[0]
    network.budget = None
    assert set(complete_steps(open_bucket(url))) == {0, 1}
    before = contents(run.folder)
    with staged(url) as run:
        assert contents(run.folder) == before
    assert run.complete
    assert complete_steps(open_bucket(url)) == {n: manifest_of(run.folder / "checkpoints" / str(n)) for n in (1, 2)}
    assert open_bucket(url).read("metrics.jsonl") == b"0\n1\n2\n"


def test_a_run_that_went_on_elsewhere_is_taken_over(cache_home, monkeypatch, tmp_path):
    url = new_url()
    with staged(url) as here:
        begin(here.folder, 0, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with staged(url) as there:
        begin(there.folder, 2, 3)
        shutil.rmtree(there.folder / "checkpoints" / "0")
        shutil.rmtree(there.folder / "checkpoints" / "1")
        write_step(there.folder, 1, "made again")
    after = contents(there.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home.parent))
    with staged(url) as here:
        assert contents(here.folder) == after


def test_a_local_copy_of_another_run_of_the_same_url_is_thrown_away():
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0, 1, 2)
    bucket = open_bucket(url)
    for name in bucket.files():
        bucket.delete(name)
    with staged(url) as run:
        assert not run.folder.exists()
        begin(run.folder, 0, text="of the new run")
        new = contents(run.folder)
    with staged(url) as run:
        assert contents(run.folder) == new


def test_an_interrupted_copy_is_cleared_away_and_the_complete_step_before_it_is_the_run(network):
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0, 1)
        before = contents(run.folder)
    step = write_step(run.folder, 2)
    network.budget = 4
    with pytest.raises(BucketError):
        push_step(open_bucket(url, ()), 2, step)
    network.budget = None
    assert [name for name in open_bucket(url).files() if name.startswith("checkpoints/2/")]
    shutil.rmtree(run.folder.parent)
    with staged(url) as run:
        assert contents(run.folder) == before
        assert not [name for name in open_bucket(url).files() if name.startswith("checkpoints/2/")]


def test_a_start_that_is_refused_leaves_nothing_behind(cache_home):
    url = new_url()
    with pytest.raises(UserError), staged(url):
        raise UserError("the data cannot be used")
    assert open_bucket(url).files() == {}
    assert not [path for path in cache_home.rglob("*") if path.is_file()]


def test_a_bucket_with_something_else_in_it_is_refused_and_left_alone():
    url = new_url()
    open_bucket(url).write("checkpoints/4/data", b"of another program")
    with pytest.raises(UserError, match="is not empty and holds no run that was trained there"):
        staged(url).__enter__()
    assert open_bucket(url).files() == {"checkpoints/4/data": 18}


def test_a_bucket_that_cannot_be_written_is_told_before_anything_begins(network):
    network.budget = 0
    with pytest.raises(BucketError, match="cannot be written"):
        staged(new_url()).__enter__()


def test_temporary_and_damaged_files_stay_here():
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0)
        (run.folder / ".config.json.x1").write_text("half")
        (run.folder / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
        (run.folder / "checkpoints" / "5.orbax-checkpoint-tmp" / "data").write_text("half")
        (run.folder / "checkpoints" / "4.corrupt").mkdir()
        (run.folder / "checkpoints" / "4.corrupt" / "data").write_text("damaged")
    names = set(open_bucket(url).files())
    assert {name for name in names if not name.startswith(("checkpoints/0/", "complete/"))} == {
        "config.json",
        "metrics.jsonl",
        "run_id",
    }


def test_a_step_that_is_rated_after_it_was_copied_is_copied_again():
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0)
        step = run.folder / "checkpoints" / "0"
        (step / "metrics").rename(run.folder / ".rated")
    assert "checkpoints/0/metrics/metrics" not in open_bucket(url).files()
    with staged(url) as run:
        (run.folder / ".rated").rename(step / "metrics")
    assert complete_steps(open_bucket(url))[0] == manifest_of(step)
    assert "checkpoints/0/metrics/metrics" in open_bucket(url).files()


def test_a_second_start_on_the_same_machine_is_refused_and_changes_nothing():
    url = new_url()
    with staged(url) as run:
        begin(run.folder, 0, 10)
        run._copy(last=True)
        begin(run.folder, 20)
        bucket = open_bucket(url)
        before, there = (run.folder / "metrics.jsonl").read_text(), {name: bucket.read(name) for name in bucket.files()}
        refused = pytest.raises(UserError, match=rf"another process here is training in {url}; wait for it")
        with refused, staged(url):
            pytest.fail("both train")
        assert (run.folder / "metrics.jsonl").read_text() == before == "0\n10\n20\n"
        assert (run.folder / "checkpoints" / "20").is_dir()
        assert {name: bucket.read(name) for name in bucket.files()} == there
    with staged(url) as again:
        assert (again.folder / "metrics.jsonl").read_text() == before
