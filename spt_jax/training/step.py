"""The training state and the sharded, donated train step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spt_jax.models.decoder import FrozenTree
from spt_jax.parallel.rules import replicated
from spt_jax.prompting.objective import Losses, Objective, losses_and_gradients
from spt_jax.prompting.selective_lm import ArrayBatch, SelectiveLM, Trainable

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes; the frozen LM is not in it.

    Attributes:
        trainable: The bank and the retriever.
        optimizer: The optimizer's state.
        step: int32 scalar, steps done; also the position in the data.
        skipped: int32 scalar, updates skipped because they were not finite.
        bad_in_a_row: int32 scalar, how many of them came last without a good one between.
    """

    trainable: Trainable
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    bad_in_a_row: jax.Array


def init_state(trainable: Trainable, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, replicated over the mesh."""
    trainable = jax.device_put(trainable, replicated(mesh))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(trainable, optimizer.init(trainable), zero, zero, zero)
    # device_put may alias equal buffers, and a donated buffer must not appear twice.
    return jax.tree.map(lambda x: jax.device_put(jnp.copy(x), replicated(mesh)), state)


def _metrics(losses: Losses, gradients: Trainable, batch: ArrayBatch) -> Metrics:
    tokens = batch["tokens"].size
    metrics = {
        "loss/total": losses.total,
        "loss/lm": losses.lm,
        "loss/selection": losses.selection,
        "loss/contrastive": losses.contrastive,
        "loss/fusion": losses.fusion,
        "perplexity/selected": jnp.exp(losses.selected_nll),
        "gradient_norm/bank": optax.tree.norm(gradients["bank"]),
        "gradient_norm/retriever": optax.tree.norm(gradients["retriever"]),
        "selection_entropy": losses.selection_entropy,
        "turns": batch["turn_mask"].sum(),
        "tokens": batch["lengths"].sum(),
        "padding_share": 1.0 - batch["lengths"].sum() / tokens,
    }
    return metrics | {f"usage/{k}": share for k, share in enumerate(losses.usage)}


def make_train_step(
    model: SelectiveLM,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    micro_batches: int = 1,
) -> Callable[[TrainState, FrozenTree, ArrayBatch], tuple[TrainState, Metrics]]:
    """The compiled step ``(state, frozen tree, batch) -> (state, metrics)``.

    The state is donated; the frozen tree is an argument, so it is neither a constant of the program nor differentiated.
    A step whose loss or gradient is not finite leaves trainable and optimizer state as they were and is counted.

    Args:
        model: The description of bank, retriever and LM.
        objective: Weights and temperatures of the losses.
        optimizer: The gradient transformation.
        mesh: The mesh on which the state is replicated.
        micro_batches: See `losses_and_gradients`.
    """

    def step(state: TrainState, params: FrozenTree, batch: ArrayBatch) -> tuple[TrainState, Metrics]:
        losses, gradients = losses_and_gradients(model, objective, params, state.trainable, batch, micro_batches)
        updates, moved = optimizer.update(gradients, state.optimizer, state.trainable)
        finite = jnp.isfinite(losses.total) & jnp.isfinite(optax.tree.norm(gradients))

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        bad = (~finite).astype(jnp.int32)
        new_state = TrainState(
            trainable=keep(optax.apply_updates(state.trainable, updates), state.trainable),
            optimizer=keep(moved, state.optimizer),
            step=state.step + 1,
            skipped=state.skipped + bad,
            bad_in_a_row=(state.bad_in_a_row + bad) * bad,
        )
        metrics = _metrics(losses, gradients, batch)
        return new_state, metrics | {"skipped": new_state.skipped, "bad_in_a_row": new_state.bad_in_a_row}

    same = replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(same, same))
