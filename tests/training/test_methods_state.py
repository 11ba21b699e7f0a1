"""What a run keeps in memory and on disk beside the usual: nothing learned, or a whole LM."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from llama_files import random_llama

from spt_jax.config import default_config
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import replicated
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import restore_targets
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.run_training import run_training

WIDTH, INNER = 24, 40
"""Of the tiny LM here; no other array of the process has the shape of its MLP's kernels."""


def test_a_tree_of_nothing_is_saved_and_restored_as_nothing(tmp_path):
    optimizer = {"state": optax.adamw(1e-3).init({}), "counters": {"step": jnp.int32(0)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {}, optimizer, {"a": 1}, 3.5)
        checkpoints.wait()
    same = replicated(make_mesh())
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore("best", {"trainable": {}, "optimizer": restore_targets(optimizer, same)})
        assert restored is not None
        step, trees, meta = restored
        assert (step, trees["trainable"], meta["a"]) == (0, {}, 1)
        assert int(trees["optimizer"]["counters"]["step"]) == 0
        assert checkpoints.restore("0", {"trainable": {}}) is not None


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_the_retrievers_learning_rate_is_a_multiple_of_the_others(factor):
    config = default_config().optimizer
    config.clip_norm, config.weight_decay = 0.0, 0.1
    trees = {"bank": {"prompts": jnp.ones(3)}, "retriever": {"lin": jnp.ones(3)}}
    gradients = jax.tree.map(lambda x: 0.5 * x, trees)

    def updates(retriever_factor: float) -> Any:
        config.retriever_factor = retriever_factor
        optimizer = make_optimizer(config, 10)
        return optimizer.update(gradients, optimizer.init(trees), trees)[0]

    plain, scaled = updates(1.0), updates(factor)
    np.testing.assert_array_equal(scaled["bank"]["prompts"], plain["bank"]["prompts"])
    np.testing.assert_allclose(scaled["retriever"]["lin"], factor * plain["retriever"]["lin"], rtol=1e-6)


@pytest.fixture
def config(tmp_path) -> Any:
    lm = random_llama(
        hidden_size=WIDTH, intermediate_size=INNER, head_dim=4, num_hidden_layers=1, max_position_embeddings=546
    )
    config = default_config()
    config.model.source = str(lm.write_folder(tmp_path / "lm"))
    config.method.kind = "full"
    config.data.limit, config.data.batch, config.data.max_buckets = 4, 4, 1
    config.data.development_dialogues = config.data.test_dialogues = 1
    config.train.steps = config.train.evaluate_every = 1
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.tracking.tensorboard = False
    return config


class Census:
    """Counts the arrays on the devices that have the shape of the MLP's kernels, when it is asked to evaluate."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.shares: list[float] = []

    def run(self, state: Any, between: Callable[[], None]) -> Iterator[tuple[str, float]]:
        gc.collect()
        alive = [x for x in jax.live_arrays() if x.shape == (1, WIDTH, INNER)]
        self.counts.append(len(alive))
        self.shares += [x.addressable_shards[0].data.size / x.size for x in alive]
        yield "development/perplexity", float(state.step) + 1.0


def rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_lm_is_learned_with_one_copy_of_its_weights_and_two_moments(tmp_path, config):
    def trained(workdir: Path) -> list[int]:
        census = Census()
        run_training(config, workdir, lambda *_: [census], lambda _: None)
        assert set(census.shares) == {0.25}
        return census.counts

    # Two kernels of that shape (gate and up): the weights and AdamW's two moments of each.
    assert trained(tmp_path / "run") == [6, 6]
    first = rows(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    # After a resume too: neither the frozen LM nor a fresh state lies beside the restored one.
    assert trained(tmp_path / "run") == [6]
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in first]
    assert rows(tmp_path / "run")[-2]["loss/total"] == first[-2]["loss/total"]
