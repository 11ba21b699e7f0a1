"""Small trees to save, known by their step, and what a restore must give back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import replicated
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import restore_targets, tree_digest

META = {"lm": {"name": "tiny"}}


def trees(step: int, width: int = 5) -> dict[str, Any]:
    values = np.random.default_rng(step).standard_normal((3, 2, width)).astype(np.float32)
    return {
        "trainable": {"bank": {"prompts": jnp.asarray(values)}},
        # As those of optax: tuples, with members that hold nothing.
        "optimizer": (optax.EmptyState(), {"mu": jnp.asarray(values[0]), "count": jnp.asarray(step, jnp.int32)}),
    }


def targets(width: int = 5, mesh: Any = None) -> dict[str, Any]:
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return {name: restore_targets(tree, replicated(mesh)) for name, tree in trees(0, width).items()}


def save(checkpoints: Checkpoints, step: int, perplexity: float | None = None, width: int = 5) -> None:
    checkpoints.save(step, *trees(step, width).values(), META, perplexity)
    checkpoints.wait()


def fill(folder: Path, perplexities: dict[int, float | None]) -> Path:
    with Checkpoints(folder) as checkpoints:
        for step, perplexity in perplexities.items():
            save(checkpoints, step, perplexity)
    return folder


def assert_restores(checkpoints: Checkpoints, which: str, step: int) -> None:
    restored = checkpoints.restore(which, targets())
    assert restored is not None
    assert restored[0] == step
    assert tree_digest(restored[1]) == tree_digest(trees(step))
    assert restored[2]["step"] == step
    assert restored[2]["lm"] == {"name": "tiny"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def use_up(disk: Path, but: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - but))
    return filler
