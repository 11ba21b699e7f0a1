"""A sweep that nothing disturbed, and connections that end with their test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stand_in_sweep import OPENED, work, write_sweep

from spt_jax.sweeps.worker import Workplace


@pytest.fixture(autouse=True)
def _connections_closed() -> Iterator[None]:
    yield
    for storage in OPENED:
        storage.engine.dispose()
    OPENED.clear()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A grid that one worker ran without a disturbance."""
    return work(write_sweep(tmp_path_factory.mktemp("undisturbed") / "sweep.py"))
