"""A copy to read a run in a bucket by, while its training goes on."""

from __future__ import annotations

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
