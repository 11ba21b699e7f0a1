"""A run's seed, length and micro-batches reach the step, the schedule and the loop."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from tiny_run import write_dialogues, write_llama

from spt_jax.config import default_config
from spt_jax.training import run_training as module


class Reached(Exception):
    """Everything is prepared; nothing needs to be compiled."""


@pytest.mark.parametrize(("steps", "epochs"), [(3, 1), (0, 2)])
def test_what_a_configuration_says_of_a_run_reaches_what_it_is_said_of(tmp_path: Path, steps: int, epochs: int) -> None:
    config = default_config()
    config.model.source = str(write_llama(tmp_path / "model"))
    config.data.train = str(write_dialogues(tmp_path / "talk.txt"))
    config.mesh.data, config.mesh.tensor = 4, 2
    config.data.batch, config.data.max_length = 8, 700
    config.data.development_dialogues, config.data.test_dialogues = 2, 1
    config.seed, config.optimizer.micro_batches = 5, 2
    config.train.steps, config.train.epochs = steps, epochs
    with (
        mock.patch.object(module, "make_train_step", wraps=module.make_train_step) as made,
        mock.patch.object(module, "make_optimizer", wraps=module.make_optimizer) as optimizer,
        mock.patch.object(module, "train", side_effect=Reached) as loop,
        pytest.raises(Reached),
    ):
        module.run_training(config, tmp_path / "run", lambda *_: [])
    per_epoch = loop.call_args.args[3].__self__.steps_per_epoch
    assert per_epoch == 2  # nine dialogues in batches of eight
    total = steps or epochs * per_epoch
    assert (made.call_args.args[4], made.call_args.kwargs["seed"]) == (2, 5)
    assert made.call_args.kwargs["total_steps"] == optimizer.call_args.args[1] == total
    assert loop.call_args.kwargs["options"].total_steps == total
