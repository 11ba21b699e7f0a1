"""Diagnostics of a run are complete, and the report shows them."""

from __future__ import annotations

import json

import pytest
import tiny
from test_report import EVIL, Walker
from tiny_experiment import experiment

from spt_jax.evaluation.diagnostics import diagnose
from spt_jax.evaluation.likelihood import score_rows
from spt_jax.evaluation.report_diagnostics import diagnostics_section
from spt_jax.evaluation.selection import selection_figures
from spt_jax.training.experiment import pack_dialogues


def diagnosed(prompts: int = 3, **options):
    setting = experiment(prompts, **options)
    trainable = tiny.trainable(setting.model)
    rows = pack_dialogues(setting.config, tiny.DIALOGUES, setting.lm.tokenizer).rows
    likelihoods = score_rows(
        setting.model, setting.lm.params, trainable, rows, mesh=setting.mesh, batch_size=2, pad_id=0
    )
    personas = [dialogue.persona for dialogue in tiny.DIALOGUES]
    return diagnose(setting, trainable, rows, likelihoods, personas), likelihoods


@pytest.mark.parametrize("batch", [1, 3])
def test_every_turn_is_on_the_map_once_in_the_colour_of_its_prompt(batch):
    found, likelihoods = diagnosed(batch=batch)
    wanted = {
        (int(d), int(t)): int(k)
        for d, t, k in zip(likelihoods.dialogue, likelihoods.turn, likelihoods.selected, strict=True)
    }
    points = found["map"]["contexts"]
    assert len(points) == len(wanted)
    assert {(d, t): k for _, _, k, d, t in points} == wanted
    assert len(found["map"]["prompts"]) == 3


def test_diagnostics_are_json_and_complete():
    found, likelihoods = diagnosed()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["figures"] == selection_figures(likelihoods, 1.0)
    assert sum(persona["turns"] for persona in found["personas"]) == len(likelihoods.turn)
    assert found["personas"] == sorted(found["personas"], key=lambda persona: -persona["turns"])
    assert [len(virtual) for virtual in found["nearest_tokens"]] == [4, 4, 4]
    assert all(len(near) == 5 for virtual in found["nearest_tokens"] for near in virtual)
    assert all(near[0][1] >= near[-1][1] for virtual in found["nearest_tokens"] for near in virtual)


def test_of_one_prompt_the_nearest_tokens_are_all_there_is_to_tell():
    found = diagnosed(prompts=1)[0]
    assert [*found] == ["nearest_tokens"]
    assert [len(virtual) for virtual in found["nearest_tokens"]] == [4]
    (text,) = diagnostics_section(found)
    assert "Nearest vocabulary tokens of each virtual token" in text
    assert "selection" not in text
    assert diagnostics_section({}) == []


def test_the_report_shows_every_part_and_no_text_as_markup():
    found, likelihoods = diagnosed()
    found["personas"][0]["lines"] = [EVIL]
    found["nearest_tokens"][0][0][0][0] = EVIL
    walker = Walker("".join(diagnostics_section(found)))
    assert walker.problems == []
    assert walker.count("script") == walker.count("img") == 0
    assert walker.text.count(EVIL) >= 2
    assert walker.count("polygon") == 3
    dots = [attributes for name, attributes in walker.elements if name == "circle" and attributes.get("r") == "2.6"]
    assert len([dot for dot in dots if dot.get("fill-opacity") == "0.55"]) == len(likelihoods.turn)
    assert "Effective number of prompts" in walker.text
    assert f"{found['figures']['effective_prompts']:.3f}" in walker.text


@pytest.mark.parametrize("missing", ["figures", "map", "personas", "nearest_tokens"])
def test_a_part_that_is_absent_is_left_out(missing):
    found, _ = diagnosed()
    walker = Walker("".join(diagnostics_section({name: part for name, part in found.items() if name != missing})))
    assert walker.problems == []
