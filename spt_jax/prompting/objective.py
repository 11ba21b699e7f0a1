"""The total loss of a global batch and its gradients (METHOD 6 and "Micro-batches").

The retriever needs no LM, so it runs once a step on the whole global batch; micro-batches give the turns' likelihoods
and the gradients of the LM and fusion terms with respect to bank and scores; selection and contrastive losses are taken
over all turns; one vector-Jacobian product carries the gradients of the scores through the retriever.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spt_jax.models.decoder import FrozenTree, vocabulary_head, vocabulary_logits
from spt_jax.prompting.losses import TargetWeights, contrastive_loss, selection_loss, weighted_target_losses
from spt_jax.prompting.retriever import select
from spt_jax.prompting.selective_lm import (
    ArrayBatch,
    SelectiveLM,
    Trainable,
    at_targets,
    batch_context_means,
    logits_chunk,
    retriever_scores,
    target_hidden,
    target_turn_onehot,
    turn_means,
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights and temperatures of ``L_LM + λ_sel L_sel + λ_con L_con + λ_fus L_fus``.

    Attributes:
        selection_weight: λ_sel.
        contrastive_weight: λ_con.
        fusion_weight: λ_fus.
        gold_temperature: τ_gold, of the LM's verdict.
        score_temperature: τ_sim, of the retriever's scores.
        pairs: ``"across"`` leaves pairs within one dialogue out of the contrastive loss, ``"all"`` keeps them.
    """

    selection_weight: float = 0.4
    contrastive_weight: float = 0.4
    fusion_weight: float = 1.0
    gold_temperature: float = 1.0
    score_temperature: float = 1.0
    pairs: str = "across"


class Losses(NamedTuple):
    """The terms of one global batch, unweighted, and what the selection did.

    Attributes:
        total: The weighted sum that is differentiated.
        lm: L_LM, nats a token.
        selection: L_sel, nats.
        contrastive: L_con.
        fusion: L_fus, nats a token.
        nll: float32 ``[D, N, K]``, of every turn under every prompt.
        scores: float32 ``[D, N, K]``.
        usage: float32 ``[K]``, share of turns whose highest score is prompt k's.
        selection_entropy: Mean entropy of ``softmax_k(score / τ_sim)``, nats.
        selected_nll: Mean over tokens of the selected prompt's nll, nats.
    """

    total: jax.Array
    lm: jax.Array
    selection: jax.Array
    contrastive: jax.Array
    fusion: jax.Array
    nll: jax.Array
    scores: jax.Array
    usage: jax.Array
    selection_entropy: jax.Array
    selected_nll: jax.Array


def target_weights(batch: ArrayBatch, num_prompts: int) -> TargetWeights:
    """Weights that depend on the data alone: L_LM is a mean over tokens and prompts, L_fus a mean over turns."""
    mask = batch["target_mask"]
    onehot = target_turn_onehot(batch)
    tokens = jnp.maximum(onehot.sum(axis=1), 1.0)
    turns = jnp.maximum(batch["turn_mask"].sum(), 1.0)
    return TargetWeights(
        lm=mask / (jnp.maximum(mask.sum(), 1.0) * num_prompts),
        fusion=jnp.einsum("dsn,dn->ds", onehot, 1.0 / tokens, precision=jax.lax.Precision.HIGHEST) / turns,
    )


def contrastive_pairs(batch: ArrayBatch, pairs: str) -> jax.Array:
    """Which pairs of turns count in the contrastive loss: bool ``[D·N, D·N]``."""
    slots = batch["turn_mask"].shape[1]
    present = batch["turn_mask"].reshape(-1) > 0
    allowed = present[:, None] & present[None, :]
    if pairs == "all":
        return allowed
    dialogues = jnp.repeat(batch["dialogue_ids"], slots)
    return allowed & (dialogues[:, None] != dialogues[None, :])


def _micro_batches(tree: Any, count: int) -> Any:
    """``[D, ...]`` to ``[count, D / count, ...]``, strided so that every device keeps its share of each micro-batch."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), tree)


def _whole(x: jax.Array) -> jax.Array:
    """The inverse of `_micro_batches`."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def losses_and_gradients(
    model: SelectiveLM,
    objective: Objective,
    params: FrozenTree,
    trainable: Trainable,
    batch: ArrayBatch,
    micro_batches: int = 1,
) -> tuple[Losses, Trainable]:
    """The losses of a global batch and the gradients of their total.

    Args:
        model: The description.
        objective: Weights and temperatures.
        params: The frozen tree; never differentiated.
        trainable: The bank and the retriever.
        batch: A packed batch of D rows, with ``similar`` unless the contrastive weight is 0.
        micro_batches: In how many parts the LM sees the batch, one after the other; divides D. Changes memory alone.

    Returns:
        The losses, and gradients shaped like `trainable`.
    """
    means = batch_context_means(model, params, batch)
    scores, retriever_vjp = jax.vjp(lambda tree: retriever_scores(model, tree, means), trainable)
    weights = target_weights(batch, model.num_prompts)
    weighted = TargetWeights(weights.lm, objective.fusion_weight * weights.fusion)

    def lm_and_fusion(
        prompts: jax.Array, scores: jax.Array, part: ArrayBatch, weights: TargetWeights, weighted: TargetWeights
    ) -> Any:
        hidden = target_hidden(model, params, prompts, part)
        onehot = target_turn_onehot(part)
        rows, positions, num_prompts, _ = hidden.shape
        total, losses = weighted_target_losses(
            lambda head, h: vocabulary_logits(model.decoder, head, h),
            vocabulary_head(params),
            hidden,
            at_targets(scores, onehot),
            part["target_ids"],
            weighted,
            logits_chunk(model, rows, num_prompts, positions),
        )
        lm = jnp.sum(losses.nll * weights.lm[..., None])
        return total, (lm, jnp.sum(losses.fusion * weights.fusion), turn_means(losses.nll, onehot))

    per_row = {name: x for name, x in batch.items() if name != "similar"}
    prompts = trainable["bank"]["prompts"]
    gradient = jax.value_and_grad(lm_and_fusion, argnums=(0, 1), has_aux=True)
    if micro_batches == 1:
        (_, (lm, fusion, nll)), (bank_gradient, score_gradient) = gradient(prompts, scores, per_row, weights, weighted)
    else:

        def body(carry: Any, part: Any) -> Any:
            (_, (lm, fusion, nll)), (bank_gradient, score_gradient) = gradient(prompts, *part)
            carry = jax.tree.map(jnp.add, carry, (lm, fusion, bank_gradient))
            return carry, (nll, score_gradient)

        zero = jnp.zeros((), jnp.float32)
        parts = _micro_batches((scores, per_row, weights, weighted), micro_batches)
        (lm, fusion, bank_gradient), stacked = jax.lax.scan(body, (zero, zero, jnp.zeros_like(prompts)), parts)
        nll, score_gradient = jax.tree.map(_whole, stacked)

    turn_weights = batch["turn_mask"] / jnp.maximum(batch["turn_mask"].sum(), 1.0)

    def selection_and_contrastive(scores: jax.Array) -> Any:
        selection = selection_loss(nll, scores, turn_weights, objective.gold_temperature, objective.score_temperature)
        contrastive = jnp.zeros((), jnp.float32)
        if "similar" in batch:
            flat = scores.reshape(-1, scores.shape[-1])
            contrastive = contrastive_loss(flat, batch["similar"], contrastive_pairs(batch, objective.pairs))
        total = objective.selection_weight * selection + objective.contrastive_weight * contrastive
        return total, (selection, contrastive)

    (over_turns, (selection, contrastive)), more = jax.value_and_grad(selection_and_contrastive, has_aux=True)(scores)
    (gradients,) = retriever_vjp(score_gradient + more)
    gradients["bank"]["prompts"] = gradients["bank"]["prompts"] + bank_gradient

    log_probabilities = jax.nn.log_softmax(scores / objective.score_temperature, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    selected = jax.nn.one_hot(select(scores), scores.shape[-1])
    tokens = target_turn_onehot(batch).sum(axis=1)
    return Losses(
        total=lm + objective.fusion_weight * fusion + over_turns,
        lm=lm,
        selection=selection,
        contrastive=contrastive,
        fusion=fusion,
        nll=nll,
        scores=scores,
        usage=jnp.einsum("dnk,dn->k", selected, turn_weights),
        selection_entropy=jnp.sum(entropy * turn_weights),
        selected_nll=jnp.sum(jnp.sum(nll * selected, axis=-1) * tokens) / jnp.maximum(tokens.sum(), 1.0),
    ), gradients
