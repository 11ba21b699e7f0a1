"""A bucket's requests: tried again while there is hope, told in a sentence when there is none."""

from __future__ import annotations

import errno
import socket
import sys

import pytest
from buckets import networked, new_url
from fsspec.registry import _registry

from spt_jax.commands.failures import sentence_of
from spt_jax.errors import UserError
from spt_jax.exit_codes import FAILED, MISTAKE
from spt_jax.storage.bucket import BucketError, is_bucket_url, open_bucket
from spt_jax.storage.file_mirror import files_at_root


def test_urls_are_buckets_and_everything_else_is_a_folder():
    assert all(map(is_bucket_url, ("gs://b/run", "s3://b/run", "memory://b/run", "file:///tmp/run")))
    assert not any(map(is_bucket_url, ("runs/a", "/runs/a", "C:/runs", "a:b", "", "runs//a", "./gs:/b")))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_what_is_written_is_read_and_listed_and_what_is_deleted_is_not(scheme, tmp_path):
    bucket = open_bucket(new_url() if scheme == "memory" else f"file://{tmp_path}/a b/run")
    assert bucket.files() == {}
    assert bucket.read("config.json") is None
    bucket.write("config.json", b"{}")
    (tmp_path / "source").write_bytes(b"12345")
    bucket.upload(tmp_path / "source", "checkpoints/1/data")
    assert bucket.files() == {"config.json": 2, "checkpoints/1/data": 5}
    bucket.download("checkpoints/1/data", tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_bytes() == b"12345"
    bucket.delete("config.json")
    bucket.delete("never there")
    assert bucket.files() == {"checkpoints/1/data": 5}


def test_a_file_that_was_written_in_part_into_a_folder_does_not_take_the_place_of_the_whole_one(tmp_path, monkeypatch):
    bucket = open_bucket(f"file://{tmp_path}/run", waits=())
    bucket.write("metrics.jsonl", b"1\n")
    (tmp_path / "source").write_bytes(b"1\n2\n3\n")

    def cut(*arguments: object) -> None:
        with open(str(arguments[-1]), "wb") as file:
            file.write(b"1\n2")
        raise OSError("killed")

    monkeypatch.setattr(bucket.filesystem, "put_file", cut)
    monkeypatch.setattr(bucket.filesystem, "pipe_file", lambda path, _: cut(path))
    for attempt in (
        lambda: bucket.write("metrics.jsonl", b"1\n2\n3\n"),
        lambda: bucket.upload(tmp_path / "source", "metrics.jsonl"),
    ):
        with pytest.raises(BucketError, match="killed"):
            attempt()
    assert bucket.read("metrics.jsonl") == b"1\n"
    assert files_at_root(bucket.files()) == ["metrics.jsonl"]


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code}")
        self.code = code


class ClientConnectorCertificateError(OSError):
    """As aiohttp has it."""


class EndpointConnectionError(Exception):
    """As botocore has it."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionRefusedError("refused"), FAILED),
        (TimeoutError(), FAILED),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), FAILED),
        (socket.gaierror("Temporary failure in name resolution"), FAILED),
        (HttpError(503), FAILED),
        (HttpError(429), FAILED),
        (EndpointConnectionError("could not connect"), FAILED),
        (HttpError(401), MISTAKE),
        (ClientConnectorCertificateError("self-signed certificate"), MISTAKE),
        (PermissionError("denied"), MISTAKE),
        (FileNotFoundError("no bucket"), MISTAKE),
        (ValueError("a bucket's name has no spaces"), MISTAKE),
    ],
)
def test_a_store_that_may_answer_later_is_worth_another_start_and_a_mistake_is_not(error, code, monkeypatch):
    bucket = open_bucket(new_url(), waits=())

    def find(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(bucket.filesystem, "find", find)
    if isinstance(error, FileNotFoundError):  # an empty bucket, where a folder is listed
        monkeypatch.setattr(bucket.filesystem, "cat_file", find)
        monkeypatch.setattr(bucket.filesystem, "pipe_file", find)
    with pytest.raises(BucketError) as told:
        bucket.write("a", b"") if isinstance(error, FileNotFoundError) else bucket.files()
    assert sentence_of(told.value) == (str(told.value), code)


def test_a_request_that_fails_is_tried_again():
    bucket, network = networked(new_url(), waits=(0.0, 0.0), failures=2)
    bucket.write("a", b"1")
    assert [name for name, _ in network.requests] == ["pipe_file"] * 3
    assert bucket.read("a") == b"1"


def test_after_the_last_attempt_the_failure_is_one_sentence_with_the_url():
    url = new_url()
    bucket, network = networked(url, waits=(0.0, 0.0), failures=3)
    with pytest.raises(BucketError, match=rf"^{url} cannot be read \(the network is unreachable\)$"):
        bucket.files()
    assert len(network.requests) == 3


def test_waits_grow_between_attempts(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("spt_jax.storage.bucket.time.sleep", slept.append)
    bucket, _ = networked(new_url(), waits=(1.0, 2.0, 4.0), failures=9)
    with pytest.raises(BucketError):
        bucket.write("a", b"1")
    assert slept == [1.0, 2.0, 4.0]


def test_no_permission_is_not_tried_again(monkeypatch):
    bucket, network = networked(new_url(), waits=(0.0, 0.0))

    def refuse(*_: object) -> None:
        raise PermissionError("403: no access to this bucket")

    monkeypatch.setattr(network.filesystem, "pipe_file", refuse)
    with pytest.raises(BucketError, match=r"cannot be written \(403: no access"):
        bucket.write("a", b"1")
    assert len(network.requests) == 1


def test_a_local_file_that_vanished_is_no_failure_of_the_network(tmp_path):
    bucket, network = networked(new_url(), waits=(0.0,))
    with pytest.raises(FileNotFoundError):
        bucket.upload(tmp_path / "gone", "a")
    assert network.requests == []


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, scheme, raising=False)  # one that was used before is kept there
    with pytest.raises(UserError, match=rf"--workdir={scheme}://b/run: .*{package}.*pip install 'spt_jax\[buckets\]'"):
        open_bucket(f"{scheme}://b/run")


@pytest.mark.parametrize("url", ["bucket://a/b", "gss://a/b"])
def test_an_unknown_scheme_is_refused_with_what_is_allowed(url):
    with pytest.raises(UserError, match=rf"--workdir={url}: .*; allowed: a folder, gs://"):
        open_bucket(url)


def test_a_url_without_a_folder_is_refused():
    with pytest.raises(UserError, match="names no folder; write gs://BUCKET/FOLDER"):
        open_bucket("gs://")
