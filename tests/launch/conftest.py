from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[StandIns]:
    """None yet; at the end none may have been called in a way that the test did not foresee."""
    (tmp_path / "commands").mkdir()
    commands = StandIns(tmp_path / "commands")
    yield commands
    assert commands.unexpected() == []
