"""A checkpoint is named by its step's number, as Orbax writes it."""

from __future__ import annotations

import pytest

from spt_jax.step_names import names_a_step


@pytest.mark.parametrize("name", ["0", "7", "1200", "123456789012345678"])
def test_a_number_as_orbax_writes_it_names_a_step(name: str) -> None:
    assert names_a_step(name)


@pytest.mark.parametrize("name", ["", "007", "-2", "+1", "1.5", " 1", "1_000", "²", "٢", "best", "9" * 5000])
def test_what_only_looks_like_a_number_names_none(name: str) -> None:
    assert not names_a_step(name)
