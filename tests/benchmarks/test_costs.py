"""The benchmarks that count and time parts of a step: what they print adds up."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
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
        # One of them asks for eight devices when it is imported, which these tests have; the rest stays as it was.
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
        yield {name: importlib.import_module(name) for name in ("scaling", "step_parts", "step_means")}


@pytest.mark.first_python
def test_products_grow_as_the_prompts_do_and_a_device_has_its_share(programs, monkeypatch, capsys):
    scaling = programs["scaling"]
    monkeypatch.setattr(scaling, "CURVES", {"prompts": ((1, 2, 4), "1"), "devices": ((1, 2, 4), "-1")})
    full_size = scaling.decoder_of
    small = {"vocab_size": 300, "num_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    monkeypatch.setattr(scaling, "decoder_of", lambda point: dataclasses.replace(full_size(point), **small))
    scaling.main([])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for curve, slope in {"prompts": 1, "devices": -1}.items():
        assert found[curve]["slopes"]["products"] == pytest.approx(slope, abs=0.03)


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
    programs["step_parts"].main(["--shape=tiny", "--rows=1", "--rounds=1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["core_seconds"]
    assert min(found[part] for part in ("step", "blocks", "vocabulary")) > 0
    assert found["blocks"] + found["vocabulary"] + found["rest"] == pytest.approx(found["step"])


def test_each_means_is_one_change_of_the_step_and_all_stand_beside_it(programs, capsys):
    program = programs["step_means"]
    program.main(["--shape=tiny", "--rows=1", "--rounds=1", "--means", "state not donated", "remat full", "bfloat16"])
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["means"]
    assert list(found) == ["as it is", "state not donated", "remat full", "bfloat16"]
    assert all(figures["seconds"] > 0 for figures in found.values())
    memory = {name: figures["memory"] for name, figures in found.items()}
    assert memory["state not donated"] > memory["as it is"] > memory["remat full"]
