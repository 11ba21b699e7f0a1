"""The benchmarks that count and time parts of a step: what they print adds up."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, ModuleType]]:
    """The programs, which find their parts beside themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        # One of them asks for eight devices, which these tests have.
        patch.setenv("XLA_FLAGS", "")
        yield {name: importlib.import_module(name) for name in ("scaling", "step_parts")}


def test_products_grow_as_the_prompts_do_and_a_device_has_its_share(programs, monkeypatch, capsys):
    scaling = programs["scaling"]
    monkeypatch.setattr(scaling, "CURVES", {"prompts": ((2, 4), "1"), "devices": ((1, 2), "-1")})
    monkeypatch.setattr(scaling.Point, "__init__", _smaller(scaling.Point.__init__))
    scaling.main([])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    few, many = (cost["products"] for cost in found["prompts"]["costs"])
    assert many / few == pytest.approx(2, rel=0.02)
    one, two = (cost["products"] for cost in found["devices"]["costs"])
    assert two / one == pytest.approx(0.5, rel=0.02)


def _smaller(init):
    return lambda self, **given: init(self, **{"width": 64, "layers": 1} | given)


def test_a_slope_is_that_of_the_upper_half(programs):
    values = [1, 2, 4, 8]
    assert programs["scaling"].slope(values, [7.0, 7.0, 4.0**1.5, 8.0**1.5]) == pytest.approx(1.5)


def test_longer_dialogues_are_the_same_dialogue_again_and_again(programs):
    batch = programs["scaling"].draw_batch(2, 300)
    twice = programs["scaling"].longer(batch, 2)
    length, slots = batch["tokens"].shape[1], batch["turn_mask"].shape[1]
    for field, shift in {"target_positions": length, "target_turns": slots, "context_lengths": length}.items():
        np.testing.assert_array_equal(twice[field], np.concatenate([batch[field], batch[field] + shift], axis=1))
    np.testing.assert_array_equal(twice["target_ids"], np.tile(batch["target_ids"], (1, 2)))
    assert twice["similar"].shape == (4 * slots, 4 * slots)


def test_the_parts_of_a_step_and_the_rest_are_the_whole(programs, capsys):
    programs["step_parts"].main(["--shape=tiny", "--rows=2", "--rounds=3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["core_seconds"]
    assert min(found[part] for part in ("step", "blocks", "vocabulary")) > 0
    assert found["blocks"] + found["vocabulary"] + found["rest"] == pytest.approx(found["step"])
