"""The compiler options of programs with many rows on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from spt_jax.models import cpu_products
from spt_jax.models.cpu_products import options_for_many_rows


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options_for_many_rows.cache_clear()
    yield
    options_for_many_rows.cache_clear()


def compiled(options: dict[str, str]) -> str:
    x = jnp.ones((64, 64))
    return jax.jit(lambda x: jax.nn.relu(x @ x) @ x, compiler_options=options).lower(x).compile().as_text() or ""


def test_products_of_a_program_with_these_options_are_not_ynnpacks():
    if "ynn_fusion" not in compiled({}):
        pytest.skip("this version of XLA gives no product to YNNPACK on this CPU")
    assert "ynn_fusion" not in compiled(options_for_many_rows())


def test_the_users_own_choice_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT")
    assert options_for_many_rows() == {}


def test_a_compiler_that_knows_no_such_choice_is_asked_for_nothing(monkeypatch):
    monkeypatch.setattr(cpu_products, "_YNN_FUSIONS", "xla_cpu_of_another_version")
    assert options_for_many_rows() == {}
