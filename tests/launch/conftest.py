from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    (tmp_path / "commands").mkdir()
    return StandIns(tmp_path / "commands")
