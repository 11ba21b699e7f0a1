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
from spt_jax.prompting.adapters import Trainable
from spt_jax.prompting.objective import Losses, Objective, losses_and_gradients
from spt_jax.prompting.selective_lm import ArrayBatch, SelectiveLM

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes; the frozen LM is not in it.

    Attributes:
        trainable: What is learned, such as the bank and the retriever.
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


def init_state(
    trainable: Trainable, optimizer: optax.GradientTransformation, mesh: Mesh, shardings: Any = None
) -> TrainState:
    """The state before the first step.

    Args:
        trainable: The first tree.
        optimizer: The gradient transformation.
        mesh: The mesh.
        shardings: A tree of shardings like `trainable`; None replicates it. The optimizer's moments lie as it does.
    """
    layout = state_shardings(trainable, optimizer, mesh, shardings)

    def first(trainable: Trainable) -> TrainState:
        step, skipped, bad_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        # A donated buffer must not be the caller's.
        copied = jax.tree.map(jnp.copy, trainable)
        return TrainState(copied, optimizer.init(trainable), step, skipped, bad_in_a_row)

    # One program, so that nothing of the state exists twice.
    return jax.jit(first, out_shardings=layout)(jax.device_put(trainable, layout.trainable))


def state_shardings(
    trainable: Trainable, optimizer: optax.GradientTransformation, mesh: Mesh, shardings: Any = None
) -> TrainState:
    """A `TrainState` of shardings: the trainable tree's own, the same for its moments, all else replicated."""
    same = replicated(mesh)
    if shardings is None:
        shardings = jax.tree.map(lambda _: same, trainable)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: same,
    )
    return TrainState(shardings, moments, same, same, same)  # pyright: ignore[reportArgumentType]


@jax.named_scope("metrics")
def _metrics(losses: Losses, gradients: Trainable, batch: ArrayBatch) -> Metrics:
    tokens = batch["tokens"].size
    metrics = {
        "loss/total": losses.total,
        "loss/lm": losses.lm,
        "loss/selection": losses.selection,
        "loss/contrastive": losses.contrastive,
        "loss/fusion": losses.fusion,
        "loss/balance": losses.balance,
        "perplexity/selected": jnp.exp(losses.selected_nll),
        "selection_entropy": losses.selection_entropy,
        "turns": batch["turn_mask"].sum(),
        "tokens": batch["lengths"].sum(),
        "padding_share": 1.0 - batch["lengths"].sum() / tokens,
    }
    norms = {f"gradient_norm/{name}": optax.tree.norm(tree) for name, tree in gradients.items()}
    return metrics | norms | {f"usage/{k}": share for k, share in enumerate(losses.usage)}


def make_train_step(
    model: SelectiveLM,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    micro_batches: int = 1,
    *,
    seed: int = 0,
    total_steps: int = 1,
    shardings: TrainState | None = None,
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
        seed: Of dropout, noise and subsets; with the step's number it decides every draw.
        total_steps: Steps of the whole run, for annealing.
        shardings: Of the state, see `state_shardings`; None replicates it.
    """

    def step(state: TrainState, params: FrozenTree, batch: ArrayBatch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        progress = state.step / total_steps
        losses, gradients = losses_and_gradients(
            model, objective, params, state.trainable, batch, micro_batches, key, progress
        )
        with jax.named_scope("optimizer"):
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
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings or same, same))
