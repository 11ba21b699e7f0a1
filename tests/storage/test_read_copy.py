"""A copy to read a run in a bucket by, while its training goes on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from buckets import new_url, write_step

from spt_jax.storage import read_copy
from spt_jax.storage.bucket import open_bucket
from spt_jax.storage.complete_steps import complete_steps, delete_step, push_step
from spt_jax.storage.read_copy import ReadCopy


def test_a_step_that_the_training_deletes_meanwhile_is_not_missed(tmp_path, cache_home, monkeypatch):
    url = new_url()
    bucket = open_bucket(url)
    bucket.write("config.json", b"{}")
    for step in (1, 2):
        push_step(bucket, step, write_step(tmp_path, step))
    listed = [complete_steps(bucket)]
    delete_step(bucket, 1)
    monkeypatch.setattr(
        read_copy, "complete_steps", lambda *arguments: listed.pop() if listed else complete_steps(*arguments)
    )
    copy = ReadCopy(url)
    copy.pull(lambda place: [1, 2])
    assert [path.name for path in sorted((copy.folder / "checkpoints").iterdir())] == ["2"]
    assert (copy.folder / "checkpoints" / "2" / "trainable").is_dir()


def test_two_commands_fetch_a_step_once(tmp_path, cache_home, monkeypatch):
    url = new_url()
    bucket = open_bucket(url)
    bucket.write("config.json", b"{}")
    push_step(bucket, 1, write_step(tmp_path, 1))
    pull, pulled = read_copy.pull_step, []

    def slowly(*arguments):
        pulled.append(arguments[1])
        time.sleep(0.2)
        pull(*arguments)

    monkeypatch.setattr(read_copy, "pull_step", slowly)
    copies = [ReadCopy(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda copy: copy.pull(lambda place: [1]), copies))
    assert pulled == [1, 1]  # its small files, and its arrays
    assert (copies[0].folder / "checkpoints" / "1" / "trainable").is_dir()


PART = "evaluation.partial/groundwork/after_training.replies.jsonl"


@pytest.mark.parametrize("pushed_first", [True, False])
@pytest.mark.parametrize("killed", ["in the middle", "before its last copy"])
def test_what_an_evaluation_had_found_leaves_the_bucket_when_it_ends(cache_home, killed, pushed_first):
    """Killed once, it is started again and ends before a further copy is made, or was killed when it had ended."""
    url = new_url()
    bucket = open_bucket(url)
    bucket.write("config.json", b"{}")
    bucket.write("results.json", b"old")
    first = ReadCopy(url)
    first.pull()
    copies = first.copied_back(interval=60.0)
    (first.folder / PART).parent.mkdir(parents=True)
    (first.folder / PART).write_text("a")
    if pushed_first:
        copies._round(last=False)
        assert bucket.read(PART) == b"a"
    else:
        bucket.write(PART, b"a")  # by a copy that was cut off behind it

    def end() -> None:
        (first.folder / "results.json").write_text("new")
        (first.folder / PART).parent.rename(first.folder / "ended")
        (first.folder / ".evaluation").mkdir()
        (first.folder / "ended").rename(first.folder / ".evaluation" / "groundwork")
        (first.folder / PART).parents[1].rmdir()

    if killed == "before its last copy":
        end()
    again = ReadCopy(url)
    again.pull()
    with again.copied_back(interval=60.0):
        if killed == "in the middle":
            assert (again.folder / PART).read_text() == "a"
            end()
    assert bucket.read("results.json") == b"new"
    assert [name for name in bucket.files() if "evaluation" in name] == []
    third = ReadCopy(url)
    third.pull()
    assert not (third.folder / PART).exists()
