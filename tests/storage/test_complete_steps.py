"""A checkpoint in a bucket is whole or not there, wherever the copy to it or its removal is cut short."""

from __future__ import annotations

import hashlib
import json

import pytest
from buckets import contents, networked, new_url, write_step
from fsspec.implementations.memory import MemoryFile

from spt_jax.storage.bucket import BucketError, open_bucket
from spt_jax.storage.complete_steps import complete_steps, delete_step, manifest_of, pull_step, push_step


def test_what_is_pulled_is_what_was_pushed(tmp_path):
    bucket = open_bucket(new_url())
    step = write_step(tmp_path, 3)
    push_step(bucket, 3, step)
    found = complete_steps(bucket)
    assert found == {3: manifest_of(step)}
    pull_step(bucket, 3, found[3], tmp_path / "there" / "checkpoints" / "3")
    assert contents(tmp_path / "there" / "checkpoints" / "3") == contents(step)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["checkpoints"]


def test_a_bucket_that_names_files_outside_its_steps_writes_none_of_them(tmp_path):
    bucket = open_bucket(new_url())
    for name in ("../../../evil", "a/../../../../evil", "/evil"):
        content = json.dumps({"files": {name: [4, hashlib.sha256(b"evil").hexdigest()]}}).encode()
        # Object stores do not know what two dots mean, and keep them.
        bucket.filesystem.store[f"{bucket.root}/checkpoints/1/{name}"] = MemoryFile(data=b"evil")
        bucket.write("complete/1.json", content)
        assert complete_steps(bucket) == {}
        assert list(bucket.files()) == ["complete/1.json"]


def requests_of(action) -> int:
    bucket, network = networked(new_url())
    action(bucket)
    return len([name for name, _ in network.requests if name in ("pipe_file", "put_file", "rm_file")])


def test_a_push_cut_short_at_any_request_leaves_the_last_complete_step_and_no_half_one(tmp_path):
    first, second = write_step(tmp_path, 1), write_step(tmp_path, 2)
    count = requests_of(lambda bucket: push_step(bucket, 2, second))
    assert count >= len(contents(second)) + 1
    for budget in range(count):
        url = new_url()
        push_step(open_bucket(url), 1, first)
        bucket, network = networked(url, budget=budget)
        with pytest.raises(BucketError):
            push_step(bucket, 2, second)
        network.budget = None
        assert complete_steps(bucket) == {1: manifest_of(first)}
        push_step(bucket, 2, second)
        assert complete_steps(bucket) == {1: manifest_of(first), 2: manifest_of(second)}


def test_a_removal_cut_short_at_any_request_leaves_no_half_step(tmp_path):
    step = write_step(tmp_path, 1)
    for budget in range(len(contents(step)) + 1):
        url = new_url()
        push_step(open_bucket(url), 1, step)
        bucket, network = networked(url, budget=budget)
        with pytest.raises(BucketError):
            delete_step(bucket, 1)
        network.budget = None
        assert complete_steps(bucket) == ({1: manifest_of(step)} if budget == 0 else {})
        delete_step(bucket, 1)
        assert bucket.files() == {}


def test_a_step_pushed_over_another_of_its_number_is_never_a_mixture(tmp_path):
    old, new = write_step(tmp_path / "a", 5), write_step(tmp_path / "b", 5, "again")
    (old / "trainable" / "stray").write_text("of the old one")
    for budget in range(len(contents(old)) + len(contents(new)) + 2):
        url = new_url()
        push_step(open_bucket(url), 5, old)
        bucket, network = networked(url, budget=budget)
        with pytest.raises(BucketError):
            push_step(bucket, 5, new)
        network.budget = None
        for step, manifest in complete_steps(bucket).items():
            pull_step(bucket, step, manifest, tmp_path / "c" / "checkpoints" / "5")
            assert contents(tmp_path / "c" / "checkpoints" / "5") in (contents(old), contents(new))
    push_step(bucket, 5, new)
    assert set(bucket.files()) == {f"checkpoints/5/{name}" for name in contents(new)} | {"complete/5.json"}


def test_a_step_that_has_grown_stays_complete_while_it_is_pushed_again(tmp_path):
    """As one that is rated after it was copied."""
    step = write_step(tmp_path, 5)
    saved = manifest_of(step)
    (step / "rated").mkdir()
    (step / "rated" / "perplexity").write_text("12.5")
    for budget in range(100):
        url = new_url()
        for name, content in contents(step).items():
            if not name.startswith("rated/"):
                open_bucket(url).write(f"checkpoints/5/{name}", content)
        open_bucket(url).write("complete/5.json", saved.to_json())
        bucket, network = networked(url, budget=budget)
        try:
            push_step(bucket, 5, step)
        except BucketError:
            network.budget = None
            assert complete_steps(bucket)[5] in (saved, manifest_of(step))
        else:
            break
    network.budget = None
    assert budget == 2  # what was added, and the marker
    assert complete_steps(bucket) == {5: manifest_of(step)}


@pytest.mark.parametrize("damage", ["missing", "shorter", "marker cut", "marker empty"])
def test_a_step_with_a_missing_or_shorter_file_or_a_torn_marker_is_not_there(damage, tmp_path):
    bucket = open_bucket(new_url())
    push_step(bucket, 1, write_step(tmp_path, 1))
    name = "complete/1.json" if "marker" in damage else "checkpoints/1/trainable/d/data"
    content = bucket.read(name) or b""
    if damage == "missing":
        bucket.delete(name)
    else:
        bucket.write(name, b"" if damage == "marker empty" else content[: len(content) // 2])
    assert complete_steps(bucket) == {}


def test_a_pull_of_other_bytes_is_refused_and_changes_nothing_here(tmp_path):
    bucket = open_bucket(new_url())
    push_step(bucket, 1, write_step(tmp_path, 1))
    manifest = complete_steps(bucket)[1]
    name = "checkpoints/1/trainable/d/data"
    bucket.write(name, (bucket.read(name) or b"")[::-1])
    target = write_step(tmp_path / "there", 1, "older")
    before = contents(target)
    with pytest.raises(BucketError, match="is not the file that was saved there"):
        pull_step(bucket, 1, manifest, target)
    assert contents(target) == before
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["checkpoints"]


def test_only_the_wanted_files_are_copied(tmp_path):
    bucket, network = networked(new_url())
    push_step(bucket, 1, write_step(tmp_path, 1))
    network.requests.clear()
    wanted = complete_steps(bucket)[1]
    pull_step(bucket, 1, wanted, tmp_path / "c" / "checkpoints" / "1", lambda name: not name.startswith("optimizer/"))
    assert "optimizer/data" not in contents(tmp_path / "c" / "checkpoints" / "1")
    assert not [name for request, name in network.requests if request == "get_file" and "optimizer" in name]
