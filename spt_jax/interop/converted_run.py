"""A working directory around a trainable tree that was trained elsewhere: what the doors open like a run of our own."""

from __future__ import annotations

from pathlib import Path

import jax

from spt_jax.errors import UserError
from spt_jax.interop.whole_folder import check_new_folder, new_folder
from spt_jax.prompting.adapters import Trainable
from spt_jax.training.absolute_paths import absolute_paths
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import tree_shapes
from spt_jax.training.experiment import Experiment
from spt_jax.training.initial import initial_trainable
from spt_jax.training.loop import save
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state
from spt_jax.training.workdir import CHECKPOINT_FOLDER, claim_workdir, write_initial


def check_fits(where: str, trainable: Trainable, experiment: Experiment) -> None:
    """Refuses a tree that is not the one the experiment's model trains.

    Args:
        where: Where the tree is from, for the message.
        trainable: The tree.
        experiment: The run that it shall belong to.

    Raises:
        UserError: Names the first leaf that differs, with both shapes.
    """
    found = tree_shapes(trainable)
    wanted = tree_shapes(jax.eval_shape(lambda: experiment.model.init(jax.random.key(0))))
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{where} gives {name} of shape {found.get(name)}, but before {experiment.lm.identity.name} the "
                f"configuration needs {wanted.get(name)}"
            )


def write_converted_run(workdir: Path, experiment: Experiment, trainable: Trainable) -> None:
    """Writes ``config.json`` and a checkpoint of step 0 with a fresh optimizer; the folder appears whole or not at all.

    ``initial.safetensors`` holds a bank and a retriever as the configuration would have begun.

    Args:
        workdir: New or empty.
        experiment: Configuration, mesh and LM of the run.
        trainable: The tree, float32; see `check_fits`.

    Raises:
        UserError: The folder holds something, or cannot be written.
    """
    config, lm = experiment.config, experiment.lm
    check_new_folder(workdir, "--workdir")
    absolute_paths(config)
    initial = initial_trainable(config, experiment.model, lm.params, lm.tokenizer)
    state = init_state(trainable, make_optimizer(config.optimizer, max(1, config.train.steps)), experiment.mesh)
    meta = {"lm": lm.identity.to_dict(), "tokenizer": lm.tokenizer.fingerprint}
    with new_folder(workdir) as folder:
        claim_workdir(folder, config, lm.identity, lm.tokenizer.fingerprint, {})
        write_initial(folder, initial)
        with Checkpoints(folder / CHECKPOINT_FOLDER) as checkpoints:
            save(checkpoints, state, meta, None)
            checkpoints.wait()
