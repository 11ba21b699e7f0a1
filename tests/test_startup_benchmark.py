"""The benchmark of the start times functions that exist."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path


def test_every_phase_of_the_start_is_a_function() -> None:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "startup.py"
    spec = importlib.util.spec_from_file_location("startup_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for module, functions in benchmark.PHASES.items():
        for dotted in functions:
            assert callable(functools.reduce(getattr, dotted.split("."), importlib.import_module(module))), dotted
