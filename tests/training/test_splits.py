"""What a run learns from, is chosen by and is measured on: cut from one file, whatever its seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spt_jax.config import default_config
from spt_jax.data.dialogue import persona_key
from spt_jax.training.experiment import Splits, read_splits

COUNT = 30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Dialogues of a turn each; every third persona has two."""
    lines = []
    for number in range(COUNT):
        lines += [f"1 your persona: i have {number - (number % 3 == 1)} dogs.", f"2 hi {number}\thello {number}"]
    path = tmp_path / "talk.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def splits(file: Path, seed: int = 0, **data: Any) -> Splits:
    config = default_config()
    config.seed = seed
    config.data.update({"train": str(file), "test": "", "development": "", "test_dialogues": 5} | data)
    return read_splits(config)


def queries(dialogues: list[Any]) -> list[str]:
    return [dialogue.turns[0].query for dialogue in dialogues]


def test_the_three_parts_share_no_persona_and_are_the_whole_file(file):
    found = splits(file, development_dialogues=4)
    parts = (found.train, found.development, found.test)
    assert (len(found.development), len(found.test)) == (4, 5)
    assert sorted(query for part in parts for query in queries(part)) == sorted(f"hi {i}" for i in range(COUNT))
    personas = [{persona_key(dialogue.persona) for dialogue in part} for part in parts]
    assert sum(map(len, personas)) == len(set.union(*personas)) == 20


@pytest.mark.parametrize("seed", [1, 7])
def test_every_seed_is_measured_on_the_same_dialogues(file, seed):
    first, other = splits(file, development_dialogues=4), splits(file, seed, development_dialogues=4)
    assert first == other


def test_the_test_does_not_depend_on_the_size_of_the_development_split(file):
    assert splits(file, development_dialogues=2).test == splits(file, development_dialogues=9).test


def test_the_limit_comes_before_the_fraction_which_the_seed_draws(file):
    whole = queries(splits(file, development_dialogues=4).train)
    drawn = [queries(splits(file, seed, development_dialogues=4, limit=6, fraction=0.5).train) for seed in range(6)]
    assert all(len(part) == 3 and set(part) <= set(whole[:6]) for part in drawn)
    assert len({tuple(part) for part in drawn}) > 1
