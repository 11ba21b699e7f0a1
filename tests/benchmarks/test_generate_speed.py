"""The benchmark of generation: both sides give the same replies, and it measures nothing otherwise."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TINY = ["--shape=tiny", "--rounds=1"]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program ``benchmarks/generate.py``, which finds its parts beside itself."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another are slow beside other work
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("generate")
    torch.set_num_threads(threads)


def test_both_sides_give_the_same_replies_and_the_last_line_is_json(program, capsys):
    program.main(program.parse(TINY))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["same_rows"] + found["near_ties"] == 8
    assert found["near_ties"] <= 1
    assert set(found["replies_per_second"]) == set(found["rounds"]) == set(program.RUNS)
    speeds = found["replies_per_second"]
    assert found["ratio"] == pytest.approx(speeds["ours"] / speeds["authors"])
    assert found["ratio_single"] == pytest.approx(speeds["ours_single"] / speeds["single"])
    assert {"cpu", "cores", "versions", "date", "dtype", "threads"} <= set(found)


def test_other_replies_stop_the_program_before_any_time_is_measured(program, capsys, monkeypatch):
    right = program.Ours.replies

    def wrong(self, contexts, selected):
        return [[*row[:-1], row[-1] ^ 1] for row in right(self, contexts, selected)]

    monkeypatch.setattr(program.Ours, "replies", wrong)
    with pytest.raises(SystemExit, match="Row 0 differs at token 4"):
        program.main(program.parse(TINY))
    assert "replies/s" not in capsys.readouterr().out


def test_rows_may_part_where_two_tokens_were_nearly_equally_likely(program):
    margins = np.array([[1.0, 1e-6], [1.0, 1.0]])
    assert program.compare([[1, 2], [3, 4]], [[1, 3], [3, 4]], margins) == (1, 1)
    with pytest.raises(SystemExit, match="Row 1 differs at token 1, 5 instead of 4"):
        program.compare([[1, 2], [3, 5]], [[1, 3], [3, 4]], margins)


def test_rows_take_all_prompts_in_turn_and_lengths_around_the_mean(program):
    contexts, selected = program.make_rows(16, 241, 50_272, 4)
    lengths = [len(context) for context in contexts]
    assert sorted(set(selected)) == [0, 1, 2, 3]
    assert np.mean(lengths) == pytest.approx(241, abs=1)
    assert 220 < min(lengths) < max(lengths) <= 256
