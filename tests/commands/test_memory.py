"""Too little memory: what can be recomputed is, and what cannot ends in a sentence."""

from __future__ import annotations

import json

import jax
import pytest
from tiny_run import train_arguments

from spt_jax.commands.main import main
from spt_jax.training import run_training

ONE_STEP = ("--config.train.steps=1", "--config.mesh.data=8", "--config.tracking.tensorboard=False")


@pytest.mark.parametrize(("limit", "policy"), [(1, "full"), (10**12, "none")])
def test_auto_takes_the_policy_that_fits_and_says_so(tmp_path, capsys, monkeypatch, limit, policy):
    monkeypatch.setattr(run_training, "device_memory", lambda _: limit)
    assert main([*train_arguments(tmp_path, workdir=tmp_path / "run"), *ONE_STEP]) == 0
    assert f"model.remat = auto: {policy}, in " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["model"]["remat"] == "auto"


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 75 bytes.\nmore\nlines"),
        MemoryError(),
    ],
    ids=["XLA", "Python"],
)
def test_full_memory_is_one_sentence_that_says_what_helps_and_leaves_no_folder(tmp_path, capsys, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(run_training, "train", full)
    assert main([*train_arguments(tmp_path, workdir=tmp_path / "run"), *ONE_STEP]) == 2
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spt-jax train")]
    assert "out of memory (" in sentence
    assert {"data.batch", "optimizer.micro_batches", "model.remat"} <= set(sentence.replace(",", " ").split())
    assert not (tmp_path / "run").exists()


def test_another_error_of_the_runtime_is_not_hidden(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(run_training, "train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main([*train_arguments(tmp_path, workdir=tmp_path / "run"), *ONE_STEP])
