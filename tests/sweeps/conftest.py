"""A sweep that nothing disturbed, and connections that end with their test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from stand_in_sweep import OPENED, work, write_sweep

from spt_jax.sweeps.locked import holder_here
from spt_jax.sweeps.worker import Workplace


@pytest.fixture(autouse=True)
def _connections_closed() -> Iterator[None]:
    yield
    for storage in OPENED:
        storage.engine.dispose()
    OPENED.clear()


@pytest.fixture(autouse=True)
def _no_run_left(tmp_path: Path) -> Iterator[None]:
    """A run outlives a worker that was killed, and is no child of the test: its lock tells where it is."""
    yield
    for lock in tmp_path.glob("**/seed_*.lock"):
        if holder := holder_here(lock):
            with suppress(ProcessLookupError):
                os.kill(holder, signal.SIGKILL)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A grid that one worker ran without a disturbance."""
    return work(write_sweep(tmp_path_factory.mktemp("undisturbed") / "sweep.py"))
