"""The undisturbed run that every disturbed one is compared with."""

from __future__ import annotations

import pytest
from campaign import Campaign


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign.prepared(tmp_path_factory.mktemp("faults"))
