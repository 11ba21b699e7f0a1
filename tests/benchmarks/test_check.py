"""The deterministic costs of training are the committed ones, and the guard sees them move."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def check() -> Any:
    """The program ``benchmarks/check.py``."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import check  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(BENCHMARKS))
    return check


def test_the_costs_of_training_are_the_committed_ones(check: Any) -> None:
    kept = json.loads((BENCHMARKS / "costs.json").read_text(encoding="utf-8"))
    if jax.__version__ not in kept:
        pytest.skip(f"benchmarks/costs.json has no figures for jax {jax.__version__}")
    assert check.drift(check.step_costs() | check.run_costs(), kept[jax.__version__]) == []


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"step_products": 1.02, "reads": 1.0}, "step_products is 1.02, was 1 (+2.00%; allowed: 0.5% either way)"),
        ({"step_products": 0.98, "reads": 1.0}, "step_products is 0.98, was 1 (-2.00%; allowed: 0.5% either way)"),
        ({"step_products": 1.0, "reads": 2.0}, "reads is 2, was 1 (+100.00%; allowed: 0.0% either way)"),
        ({"step_products": 1.0}, "reads is no longer measured"),
        ({"step_products": 1.0, "reads": 1.0, "other": 3.0}, "other is new: 3"),
    ],
)
def test_a_cost_that_moves_is_told_by_name(check: Any, found: dict[str, float], sentence: str) -> None:
    (told,) = check.drift(found, {"step_products": 1.0, "reads": 1.0})
    assert told == sentence


@pytest.mark.parametrize("read", [float, bool, str, jax.device_get, lambda x: x.tolist()])
def test_a_value_that_the_host_waits_for_would_be_seen(check: Any, read: Callable[[jax.Array], Any]) -> None:
    with check.host_reads() as values:
        x = jnp.ones(()) + 1
        x.block_until_ready()
        assert not values
        read(x)
    assert values == [()]


def test_a_call_of_the_host_would_be_seen(check: Any) -> None:
    def program(x: jax.Array, call: bool) -> jax.Array:
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((2,), jnp.float32), x) if call else 2 * x

    texts = [jax.jit(program, static_argnums=1).lower(jnp.ones(2), call).compile().as_text() for call in (True, False)]
    assert [check.host_calls(text) for text in texts] == [1, 0]
