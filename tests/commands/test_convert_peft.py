"""The door `spt-jax convert peft`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import walk

from spt_jax.commands.main import main
from spt_jax.commands.restored import open_run
from spt_jax.errors import UserError
from spt_jax.prompting.peft_prompts import from_peft


def test_a_trained_run_becomes_a_folder_of_adapters_with_its_figures(trained, tmp_path, capsys):
    walk("convert", "peft", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'exports' / 'a'}")
    out = tmp_path / "exports" / "a"
    assert f"3 PEFT adapters (prompt_0 … prompt_2) of step 2 in {out}" in capsys.readouterr().out
    run = open_run(str(trained / "run"))
    bank = np.asarray(run.trainable["bank"]["prompts"])
    np.testing.assert_array_equal(from_peft(str(out), bank.shape, run.config.model.source), bank)
    assert json.loads((out / "spt_config.json").read_text())["lm"] == run.lm.identity.to_dict()
    card = (out / "README.md").read_text()
    assert "## Figures" in card
    assert "step 2" in card
    names = {file.name for file in out.iterdir()}
    assert names == {"prompt_0", "prompt_1", "prompt_2", "retriever.safetensors", "spt_config.json", "README.md"}


def test_another_step_goes_out_without_the_figures_of_the_best(trained, tmp_path):
    for step in (2, 4):
        walk("convert", "peft", f"--workdir={trained / 'run'}", f"--out={tmp_path / str(step)}", f"--checkpoint={step}")
    assert "## Figures" not in (tmp_path / "4" / "README.md").read_text()
    best, last = (load_file(tmp_path / str(step) / "retriever.safetensors")["bank/prompts"] for step in (2, 4))
    assert np.abs(best - last).max() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out={out}"], "--workdir is missing"),
        (["--workdir={run}"], "--out is missing"),
        (["--workdir={run}", "--out={out}", "--private"], "--private goes with --push"),
        (["--workdir={run}", "--out={out}", "--push=a/b/c"], "not the name of a repository"),
        (["--workdir={run}", "--out={out}", "--push=me/a"], "HF_HUB_OFFLINE"),
        (["--workdir={run}", "--out={out}", "--checkpoint=first"], "allowed: best, latest or a step"),
        (["--workdir={run}/no", "--out={out}"], "not the working directory of a run"),
        (["--workdir={run}", "--out={run}"], "not empty"),
        (["--workdir={run}", "--out={run}/config.json"], "is a file"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments, words, trained, tmp_path, capsys):
    out = tmp_path / "out"
    given = [argument.format(run=trained / "run", out=out) for argument in arguments]
    assert main(["convert", "peft", *given]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_push_that_is_refused_leaves_the_folder(trained, tmp_path, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise UserError("the hub is closed")

    monkeypatch.setattr("spt_jax.interop.hub_upload.check_upload", lambda repo: None)
    monkeypatch.setattr("spt_jax.interop.hub_upload.upload_folder", refuse)
    arguments = [f"--workdir={trained / 'run'}", f"--out={tmp_path / 'out'}", "--push=me/a"]
    assert main(["convert", "peft", *arguments]) == 2
    assert "the hub is closed" in capsys.readouterr().err
    assert (tmp_path / "out" / "prompt_0").is_dir()
