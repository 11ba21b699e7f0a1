"""The benchmark of a validation set's replies: both sides answer the same, and the last line has what it found."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from llama_files import random_llama

from spt_jax.errors import UserError

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program ``benchmarks/replies.py``, which finds its parts beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("replies")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(num_hidden_layers=1, max_position_embeddings=1024).write_folder(tmp_path_factory.mktemp("lm"))


def test_both_sides_answer_the_same_and_the_last_line_is_json(program, model, capsys):
    sizes = ["--replies=18", "--batches=2", "--batch=4", "--new=5"]
    program.main(program.parse(["--data=builtin:heldout", f"--model={model}", *sizes]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["replies"] == {"ours": 18, "authors": 8}
    assert found["same_replies"] == 8
    assert 2 <= found["calls_of_generate"] <= 8
    speeds = found["replies_per_second"]
    assert speeds["ours"] == pytest.approx(18 / sum(found["seconds"]["ours"]), rel=0.01)
    assert found["ratio"] == pytest.approx(speeds["ours"] / speeds["authors"])
    assert {"cpu", "cores", "versions", "date", "dtype", "threads"} <= set(found)


def test_every_turn_is_in_one_round_and_every_round_has_short_and_long_ones(program):
    contexts = [[0] * length for length in range(1, 41)]
    rounds = program.by_length(contexts, 4, 2)
    assert sorted(turn for turns in rounds for turn in turns) == list(range(40))
    assert all(min(turns) < 8 and max(turns) >= 32 for turns in rounds)
    assert [len(part) for part in program.shares(10, 3)] == [3, 3, 4]


def test_too_few_turns_are_refused(program, model):
    with pytest.raises(UserError, match="5 turns are fewer than --batches=2 of 4"):
        options = ["--data=builtin:heldout", f"--model={model}", "--replies=5", "--batches=2", "--batch=4"]
        program.main(program.parse(options))
