"""A store that takes a connection and says nothing is told like one that is away, instead of being waited for."""

from __future__ import annotations

import socket

import pytest

from spt_jax.storage import bucket
from spt_jax.storage.bucket import BucketError, open_bucket


def test_a_store_of_googles_that_says_nothing_has_failed(monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="the extra buckets is not installed")
    monkeypatch.setattr(bucket, "SILENCE", 0.2)
    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", _at_once(gcsfs.retry.asyncio.sleep))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(BucketError, match="cannot be read"):
            open_bucket("gs://silent/run").files()


def _at_once(sleep):
    async def shortly(seconds: float) -> None:
        await sleep(min(seconds, 0.01))

    return shortly
