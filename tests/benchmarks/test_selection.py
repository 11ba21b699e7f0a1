"""What choosing a prompt could gain is counted as its words say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def program() -> Any:
    """The program ``benchmarks/selection.py``."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "selection.py"
    spec = importlib.util.spec_from_file_location("selection", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_that_was_not_evaluated_is_told(program: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no .*predictions\.jsonl; spt-jax evaluate --workdir="):
        program.read(tmp_path)


def test_the_best_prompt_of_a_first_half_is_measured_on_the_second(program: Any) -> None:
    turns = {
        "dialogue": np.array([0, 0, 1, 1]),
        "tokens": np.array([1, 3, 2, 2]),
        "nll": np.array([[1.0, 2.0], [4.0, 3.0], [2.0, 1.0], [5.0, 2.0]]),
        "selected": np.array([0, 1, 0, 0]),
    }
    found = program.headroom(turns)
    # Dialogue 0 foresees prompt 0 (nll 4 over 3 tokens), dialogue 1 prompt 1 (nll 2 over 2 tokens).
    assert found["second halves, best of the first half"] == pytest.approx(np.exp((4 * 3 + 2 * 2) / 5))
    assert found["second halves, any prompt"] == pytest.approx(np.exp((3.5 * 3 + 3.5 * 2) / 5))
    assert found["retriever"] == pytest.approx(np.exp((1 + 9 + 4 + 10) / 8))
    assert found["best of the turn"] == pytest.approx(np.exp((1 + 9 + 2 + 4) / 8))
    assert found["best of the dialogue"] == pytest.approx(np.exp((2 + 9 + 2 + 4) / 8))
    assert found["agreement with the best of the turn"] == 0.5
