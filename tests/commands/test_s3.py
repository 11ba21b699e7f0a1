"""A run in a bucket that is asked for by S3's own protocol: a server of the test's own answers on the loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from several_processes import start
from tiny_run import train_arguments, walk

from spt_jax.commands.main import main
from spt_jax.exit_codes import MISTAKE
from spt_jax.storage.bucket import open_bucket
from spt_jax.storage.complete_steps import complete_steps, delete_step

pytestmark = pytest.mark.first_python

BUCKET = "my-bucket"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture(autouse=True)
def credentials(server, monkeypatch) -> None:
    """As a user has them; the credentials are anything."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET)


def digests(url: str) -> dict[str, str]:
    return json.loads(open_bucket(url).read("checkpoints/4/meta/metadata") or b"")["digests"]


def test_a_run_is_trained_into_s3_goes_on_from_it_and_is_evaluated_there(trained, cache_home, tmp_path, capsys):
    url = f"s3://{BUCKET}/runs/a"
    arguments = [*train_arguments(tmp_path, workdir=Path("unused"))[:-1], f"--workdir={url}"]
    walk(*arguments)
    assert set(complete_steps(open_bucket(url))) == {0, 2, 4}
    straight = json.loads((trained / "run" / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert digests(url) == straight["digests"]
    delete_step(open_bucket(url), 4)
    shutil.rmtree(cache_home / "buckets")
    capsys.readouterr()
    walk(*arguments)
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    assert digests(url) == straight["digests"]
    walk("evaluate", f"--workdir={url}")
    assert open_bucket(url).read("predictions.jsonl") == (trained / "run" / "predictions.jsonl").read_bytes()


def test_two_processes_train_into_s3_what_one_does(trained, tmp_path):
    arguments = [*train_arguments(tmp_path, workdir=Path("unused"))[:-1], "--config.tracking.tensorboard=False"]
    url = f"s3://{BUCKET}/runs/of_2"
    job = start([*arguments, f"--workdir={url}"], 2, 4, homes=[tmp_path / "first", tmp_path / "second"])
    assert job.wait() == [0, 0], job.err
    assert set(complete_steps(open_bucket(url))) == {0, 2, 4}
    # What one process trains into S3 is bitwise `trained`, as the test above says.
    texts = (trained / "run" / "metrics.jsonl").read_bytes(), open_bucket(url).read("metrics.jsonl") or b""
    figures = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert figures[0][-1]["step"] == 4
    for one, two in zip(*figures, strict=True):
        assert one["step"] == two["step"]
        for name in one.keys() - {"tokens_per_second", "turns_per_second"}:
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5), name


def test_a_bucket_that_does_not_exist_is_one_sentence(cache_home, tmp_path, capsys):
    arguments = [*train_arguments(tmp_path, workdir=Path("unused"))[:-1], "--workdir=s3://no-such-bucket/run"]
    assert main(arguments) == MISTAKE
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("spt-jax train: s3://no-such-bucket/run cannot be written (")
    assert not list(cache_home.glob("buckets/*/run"))
