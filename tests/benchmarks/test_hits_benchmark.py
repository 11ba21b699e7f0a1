"""The benchmark of hits@1 runs, compares both sides and ends with a line of JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_files import random_llama

from spt_jax.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program ``benchmarks/hits.py``."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("hits_benchmark", FOLDER / "hits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hits_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return random_llama(**sizes, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024).write_folder(
        tmp_path / "lm"
    )


def write_talk(path: Path, candidates: list[str]) -> Path:
    turn = {"query": "hi", "response": "hello there"}
    turns = [turn | ({"candidates": candidates} if candidates else {}) for _ in range(3)]
    path.write_text("".join(json.dumps({"persona": [f"i am {n}"], "turns": turns}) + "\n" for n in range(2)))
    return path


def test_both_sides_agree_and_the_last_line_is_json(program: Any, model: Path, tmp_path: Path, capsys) -> None:
    data = write_talk(tmp_path / "talk.jsonl", ["bye", "hello there", "what do you mean ?"])
    program.main(program.parse([f"--data={data}", f"--model={model}", "--rounds=2", "--batch=4", "--dialogues=2"]))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["candidates"], told["turns"], told["dialogues"]) == (18, 6, 2)
    assert told["ratio"] > 0 and told["difference"] < 1e-4
    assert {side: len(found) for side, found in told["seconds"].items()} == {"shared": 2, "from scratch": 2}


def test_dialogues_without_candidates_are_refused(program: Any, model: Path, tmp_path: Path) -> None:
    data = write_talk(tmp_path / "talk.jsonl", [])
    with pytest.raises(UserError, match="has no turn with candidates"):
        program.main(program.parse([f"--data={data}", f"--model={model}"]))
