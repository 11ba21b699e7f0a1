"""A run in a bucket that is asked for by Google Cloud Storage's own protocol: an emulator answers on the loopback.

The commands are processes of their own, as gcsfs reads some of its settings only when it is imported.
"""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server
from several_processes import free_port, start
from tiny_run import train_arguments

from spt_jax.exit_codes import MISTAKE

pytestmark = pytest.mark.first_python

BUCKET = "my-bucket"
MARKERS = {f"runs/a/complete/{step}.json" for step in (0, 2, 4)}


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    """The address of a server of the protocol, with an empty bucket."""
    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def denying() -> Iterator[str]:
    """The address of a server that lets nobody in."""

    class Denying(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            message = "Anonymous caller does not have storage.objects.list access to the bucket."
            answer = json.dumps({"error": {"code": 401, "message": message}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denying) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def settings(monkeypatch) -> None:
    """Those of gcsfs for an emulator, which needs no credentials and knows no gRPC."""
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


class Objects:
    """What lies in the bucket, asked of the emulator without gcsfs."""

    def __init__(self, address: str) -> None:
        self._address = f"{address}/storage/v1/b/{BUCKET}/o"

    def names(self) -> set[str]:
        return {item["name"] for item in json.loads(self._ask("")).get("items", ())}

    def read(self, name: str) -> bytes:
        return self._ask(f"/{urllib.parse.quote(name, safe='')}?alt=media")

    def delete(self, name: str) -> None:
        self._ask(f"/{urllib.parse.quote(name, safe='')}", method="DELETE")

    def _ask(self, rest: str, method: str = "GET") -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self._address + rest, method=method)) as answer:
            return answer.read()


def run(*arguments: str) -> str:
    """What one door printed, which must succeed; what is missing in a new bucket is no news for its user."""
    job = start(arguments, 1, 8)
    assert job.wait() == [0], job.err
    assert "Traceback" not in job.err[0] and "not found" not in job.err[0], job.err
    return job.out[0]


def refused(*arguments: str) -> str:
    """The one sentence with which a door ends."""
    job = start(arguments, 1, 8)
    assert job.wait() == [MISTAKE], job.err
    lines = job.err[0].splitlines()
    assert len(lines) == 1, job.err
    return lines[0]


def test_a_run_is_trained_into_gs_goes_on_from_it_and_is_evaluated_there(
    trained, emulator, cache_home, tmp_path, monkeypatch
):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    objects = Objects(emulator)
    url = f"gs://{BUCKET}/runs/a"
    arguments = [*train_arguments(tmp_path, workdir=Path("unused"))[:-1], f"--workdir={url}"]
    run(*arguments)
    assert {name for name in objects.names() if "/complete/" in name} == MARKERS
    last = "runs/a/checkpoints/4/meta/metadata"
    straight = json.loads((trained / "run" / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert json.loads(objects.read(last))["digests"] == straight["digests"]

    # The last step was cut off while it was copied, and the machine is gone.
    objects.delete("runs/a/complete/4.json")
    objects.delete(last)
    shutil.rmtree(cache_home / "buckets")
    assert "resuming from step 2 of 4" in run(*arguments)
    assert json.loads(objects.read(last))["digests"] == straight["digests"]

    shutil.rmtree(cache_home / "buckets")
    run("evaluate", f"--workdir={url}")
    assert objects.read("runs/a/predictions.jsonl") == (trained / "run" / "predictions.jsonl").read_bytes()


def test_a_bucket_that_does_not_exist_is_one_sentence(emulator, cache_home, tmp_path, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    url = "gs://no-such-bucket/run"
    told = refused(*train_arguments(tmp_path, workdir=Path("unused"))[:-1], f"--workdir={url}")
    assert told.startswith(f"spt-jax train: {url} cannot be written (not found: ")
    assert "no-such-bucket" in told.removeprefix(f"spt-jax train: {url}")
    assert not list(cache_home.glob("buckets/*/run"))


def test_who_may_not_read_a_bucket_is_told_so_at_once_and_without_stack_traces(denying, cache_home, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", denying)
    told = refused("evaluate", f"--workdir=gs://{BUCKET}/run")
    assert told.startswith(f"spt-jax evaluate: gs://{BUCKET}/run cannot be read (Anonymous caller does not have")
