"""The benchmark of the start times functions that exist, and its figures add up."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from spt_jax.training.remat import fitting_remat

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def startup() -> Any:
    """The program ``benchmarks/startup.py``."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import startup  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(BENCHMARKS))
    return startup


def test_every_phase_is_a_function(startup: Any) -> None:
    for module, functions in startup.PHASES.items():
        for dotted in functions:
            assert callable(functools.reduce(getattr, dotted.split("."), importlib.import_module(module))), dotted


def test_the_step_that_ends_a_start_can_still_be_asked_for_its_program(startup: Any) -> None:
    step = jax.jit(lambda x: x + 1)
    watch = startup.Stopwatch()
    patched = startup.Patcher(watch, lambda: None)._ending(lambda: step)()
    assert fitting_remat(lambda _: patched, (1.0,), 10**12) == "none"


def test_phases_are_counted_within_the_phase_that_is_open(startup: Any) -> None:
    watch = startup.Stopwatch()
    inner = watch.timed("inner", lambda: None)
    outer = watch.timed("outer", lambda: [inner() for _ in range(3)])
    watch.begin("all")
    outer()
    inner()
    watch.end_all()
    calls = {path: count for path, (_, _, count) in watch.spent.items()}
    assert calls == {("all",): 1, ("all", "outer"): 1, ("all", "outer", "inner"): 3, ("all", "inner"): 1}
    assert next(iter(watch.spent)) == ("all",)
    assert watch.spent["all",][0] >= watch.spent["all", "outer"][0] >= watch.spent["all", "outer", "inner"][0]


def test_arithmetic_is_what_the_evaluation_and_the_step_take_beside_their_compilation(startup: Any) -> None:
    step, evaluation = f"train/loop/{startup.STEP}", f"train/loop/{startup.EVALUATION}"
    compiled = [[f"{path}/{name}", 1.0, 0.5, 1] for path in (step, evaluation) for name in startup.COMPILED]
    phases = [["train", 99.0, 99.0, 1], [step, 10.0, 8.0, 1], [evaluation, 20.0, 16.0, 1], *compiled]
    assert startup.arithmetic(phases, 1) == 10.0 + 20.0 - 6 * 1.0
    assert startup.arithmetic(phases, 2) == 8.0 + 16.0 - 6 * 0.5
