"""Buckets in memory, a network that fails when it is told to, and runs whose checkpoints are a few bytes."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import Any

from spt_jax.storage.bucket import Bucket, open_bucket
from spt_jax.storage.complete_steps import push_step

REQUESTS = ("find", "cat_file", "pipe_file", "get_file", "put_file", "rm_file")


class Unreachable(OSError):
    """What a request raises while the network fails."""


@dataclasses.dataclass
class Network:
    """A filesystem of fsspec whose requests are counted, and fail from one of them on.

    Attributes:
        filesystem: The real one.
        budget: Requests that change something that still succeed; None for all of them.
        failures: Requests, of any kind, that fail before the next one succeeds.
    """

    filesystem: Any
    budget: int | None = None
    failures: int = 0
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.filesystem, name)
        if name not in REQUESTS:
            return method

        def request(*arguments: Any, **options: Any) -> Any:
            self.requests.append((name, str(arguments[-1 if name == "put_file" else 0])))
            if self.failures:
                self.failures -= 1
                raise Unreachable("the network is unreachable")
            if name in ("pipe_file", "put_file", "rm_file") and self.budget is not None:
                if not self.budget:
                    raise Unreachable("the network is unreachable")
                self.budget -= 1
            return method(*arguments, **options)

        return request


def new_url() -> str:
    return f"memory://bucket-{uuid.uuid4().hex}/runs/a"


def copy_of(folder: Path, url: str) -> Bucket:
    """A bucket with a trained run."""
    bucket = open_bucket(url)
    for path in folder.iterdir():
        if path.is_file():
            bucket.write(path.name, path.read_bytes())
    for step in (folder / "checkpoints").iterdir():
        push_step(bucket, int(step.name), step)
    bucket.write("run_id", b"0" * 32)
    return bucket


def networked(url: str, waits: tuple[float, ...] = (), **state: Any) -> tuple[Bucket, Network]:
    """A bucket behind a network."""
    bucket = open_bucket(url, waits)
    network = Network(bucket.filesystem, **state)
    return dataclasses.replace(bucket, filesystem=network), network


def write_step(folder: Path, step: int, text: str = "") -> Path:
    """A finished checkpoint, which appears as Orbax's do: by a rename."""
    place = folder / "checkpoints" / str(step)
    for name in ("meta/metadata", "metrics/metrics", "trainable/d/data", "optimizer/data", "trainable/manifest"):
        path = folder / "checkpoints" / f"{step}.tmp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of step {step} {text}")
    (folder / "checkpoints" / f"{step}.tmp").rename(place)
    return place


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
