"""A save that fails is one sentence, and the checkpoint before it stays usable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from checkpoint_trees import assert_restores, names, save, use_up

from spt_jax.errors import UserError
from spt_jax.training.checkpoint import SMALL_FILES_BYTES, Checkpoints


def test_a_save_that_fails_is_one_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 5.0)

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UserError) as told:
            save(checkpoints, 2, 4.0)
    assert "No space left on device" in str(told.value)
    assert "the last good one is step 1" in str(told.value)
    assert "\n" not in str(told.value)
    checkpoints.close()
    with Checkpoints(tmp_path) as again:
        assert_restores(again, "latest", 1)


@pytest.mark.parametrize(
    ("left", "width"),
    [(100_000, 5), (SMALL_FILES_BYTES, 100_000), (SMALL_FILES_BYTES + 1_000_000, 100_000)],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_space(small_disk, capfd, left, width):
    folder = small_disk / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1, 5.0)
        filler = use_up(small_disk, left)
        with pytest.raises(UserError) as told:
            save(checkpoints, 2, 4.0, width=width)
        with pytest.raises(UserError):
            save(checkpoints, 3, 4.0, width=width)
    sentence = str(told.value)
    assert "could not be written" in sentence
    assert "(No space left on device); the last good one is step 1. Free some space" in sentence
    assert "\n" not in sentence
    assert capfd.readouterr().err == ""
    filler.unlink()
    with Checkpoints(folder) as checkpoints:
        assert_restores(checkpoints, "latest", 1)
        save(checkpoints, 2, 4.0)
        assert_restores(checkpoints, "latest", 2)
    assert names(folder) == {"1", "2"}


DURING_A_SAVE = """
import jax.numpy as jnp, pathlib, sys
from checkpoint_trees import save, use_up
from spt_jax.training.checkpoint import Checkpoints

disk = pathlib.Path(sys.argv[1])
Checkpoints._check_space = lambda self, trees: None
with Checkpoints(disk / "checkpoints") as checkpoints:
    save(checkpoints, 1, 5.0)
    use_up(disk, 20_000)
    save(checkpoints, 2, 4.0, width=100_000)
"""


def test_a_disk_that_fills_up_during_a_save_leaves_the_checkpoint_before_it(small_disk):
    # In a process of its own: Orbax's threads have their say for a while after the save has failed.
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", DURING_A_SAVE, str(small_disk)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "UserError: a checkpoint could not be written" in done.stderr
    assert "the last good one is step 1" in done.stderr
    folder = small_disk / "checkpoints"
    (small_disk / "filler").unlink()
    with Checkpoints(folder) as checkpoints:
        assert_restores(checkpoints, "latest", 1)
        save(checkpoints, 2, 4.0)
        assert_restores(checkpoints, "latest", 2)
    assert names(folder) == {"1", "2"}
