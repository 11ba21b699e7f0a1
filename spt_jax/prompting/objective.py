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
from spt_jax.models.dropout import Dropout
from spt_jax.prompting.adapters import Trainable, WholeModel
from spt_jax.prompting.losses import (
    TargetWeights,
    annealed_weights,
    balance_loss,
    contrastive_loss,
    noisy_target,
    selection_loss,
    selection_target,
    weighted_target_losses,
)
from spt_jax.prompting.retriever import select
from spt_jax.prompting.selective_lm import (
    ArrayBatch,
    SelectiveLM,
    at_targets,
    batch_contexts,
    logit_chunks,
    retriever_scores,
    target_hidden,
    target_turn_onehot,
    turn_means,
    vocabulary_gathered,
)
from spt_jax.prompting.subset import Subset, draw_subset


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights and temperatures of ``λ_LM L_LM + λ_sel L_sel + λ_con L_con + λ_fus L_fus``, and what varies them.

    Attributes:
        selection_weight: λ_sel.
        contrastive_weight: λ_con.
        fusion_weight: λ_fus.
        gold_temperature: τ_gold, of the LM's verdict.
        score_temperature: τ_sim, of the retriever's scores.
        pairs: ``"across"`` leaves pairs within one dialogue out of the contrastive loss, ``"all"`` keeps them.
        lm_weight: λ_LM, 1 in the paper; 0 switches the loss off.
        gold_noise: Standard deviation of noise on the LM's verdict; see `noisy_target`.
        annealing: a of `annealed_weights`; 0 leaves the LM loss's weights at 1.
        annealing_bounds: Their lowest and highest value.
        balance_weight: Of `balance_loss`; 0 is off.
        prompts_per_step: m < K prompts a row is seen under (`draw_subset`); 0 for all.
    """

    selection_weight: float = 0.4
    contrastive_weight: float = 0.4
    fusion_weight: float = 1.0
    gold_temperature: float = 1.0
    score_temperature: float = 1.0
    pairs: str = "across"
    lm_weight: float = 1.0
    gold_noise: float = 0.0
    annealing: float = 0.0
    annealing_bounds: tuple[float, float] = (0.0, 1.0)
    balance_weight: float = 0.0
    prompts_per_step: int = 0


LM_ALONE = Objective(selection_weight=0.0, contrastive_weight=0.0, fusion_weight=0.0)
"""What the rivals learn from."""


class Losses(NamedTuple):
    """The terms of one global batch, unweighted, and what the selection did.

    Attributes:
        total: The weighted sum that is differentiated.
        lm: L_LM, nats a token; annealed where that is asked for.
        selection: L_sel, nats.
        contrastive: L_con.
        fusion: L_fus, nats a token; 0 where its weight is 0, since it is not computed then.
        balance: See `balance_loss`.
        nll: float32 ``[D, N, K]``, of every turn under every prompt (of the row's m with a subset).
        scores: float32 ``[D, N, K]``.
        usage: float32 ``[K]``, share of turns whose highest score is prompt k's.
        selection_entropy: Mean entropy of ``softmax_k(score / τ_sim)``, nats.
        selected_nll: Mean over tokens of the selected prompt's nll, nats; of a subset, the best scored in it.
    """

    total: jax.Array
    lm: jax.Array
    selection: jax.Array
    contrastive: jax.Array
    fusion: jax.Array
    balance: jax.Array
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
        lm=(mask / (jnp.maximum(mask.sum(), 1.0) * num_prompts))[..., None],
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
    key: jax.Array | None = None,
    progress: jax.Array | float = 0.0,
) -> tuple[Losses, Trainable]:
    """The losses of a global batch and the gradients of their total.

    Args:
        model: The description.
        objective: Weights and temperatures.
        params: The frozen tree; never differentiated.
        trainable: What is learned.
        batch: A packed batch of D rows, with ``similar`` unless the contrastive weight is 0.
        micro_batches: In how many parts the LM sees the batch, one after the other; divides D. Changes memory alone.
        key: Of dropout, noise and subsets; may be None where the model and the objective have none of them.
        progress: Steps done over all steps, for annealing.

    Returns:
        The losses, and gradients shaped like `trainable`.

    Raises:
        ValueError: The contrastive loss has a weight, and the batch no ``similar``.
    """
    params = vocabulary_gathered(model, params)
    lm_key, adapter_key, retriever_key, noise_key, subset_key = [None] * 5 if key is None else jax.random.split(key, 5)
    scores, retriever_vjp = _scores(model, params, trainable, batch, retriever_key)
    subset = draw_subset(scores, batch["turn_mask"], objective.prompts_per_step, subset_key)
    fused, fused_vjp = jax.vjp(subset.fusion_scores, scores)
    weights = _weights(model, objective, scores, batch, subset, progress)
    adapter_tree = {name: tree for name, tree in trainable.items() if name != "retriever"}

    def lm_and_fusion(adapter_tree: Trainable, fused: jax.Array, part: _Part) -> Any:
        keys = [None if k is None else jax.random.fold_in(k, part.number) for k in (lm_key, adapter_key)]
        dropout = Dropout(keys[0], model.dropout) if keys[0] is not None and model.dropout else None
        conditions = model.adapter.conditions(model.decoder, params, adapter_tree, keys[1])
        weights_trained = isinstance(model.adapter, WholeModel)
        if weights_trained:
            conditions = conditions._replace(params=vocabulary_gathered(model, conditions.params))
        # In a loop over layers the gradient gains nothing by a last layer of its own, and takes more memory.
        whole_rows = weights_trained or not model.decoder.unrolled
        hidden = target_hidden(model, conditions, part.batch, part.subset, dropout, whole_rows)
        onehot = target_turn_onehot(part.batch)
        rows, positions, num_prompts, _ = hidden.shape
        scaled = TargetWeights(objective.lm_weight * part.weights.lm, objective.fusion_weight * part.weights.fusion)
        total, losses = weighted_target_losses(
            lambda head, h: vocabulary_logits(model.decoder, head, h),
            vocabulary_head(conditions.params),
            hidden,
            at_targets(fused, onehot) if objective.fusion_weight else None,
            part.batch["target_ids"],
            part.batch["target_mask"],
            scaled,
            logit_chunks(model, rows, num_prompts, positions),
            head_trained=weights_trained,
        )
        lm = jnp.sum(losses.nll * part.weights.lm)
        return total, (lm, jnp.sum(losses.fusion * part.weights.fusion), turn_means(losses.nll, onehot))

    per_row = {name: x for name, x in batch.items() if name != "similar"}
    gradient = jax.value_and_grad(lm_and_fusion, argnums=(0, 1), has_aux=True)
    if micro_batches == 1:
        whole = _Part(jnp.zeros((), jnp.int32), per_row, weights, subset.prompts)
        (_, (lm, fusion, nll)), (adapter_gradient, fused_gradient) = gradient(adapter_tree, fused, whole)
    else:

        def body(carry: Any, part: Any) -> Any:
            (_, (lm, fusion, nll)), (adapter_gradient, fused_gradient) = gradient(adapter_tree, *part)
            carry = jax.tree.map(jnp.add, carry, (lm, fusion, adapter_gradient))
            return carry, (nll, fused_gradient)

        zero = jnp.zeros((), jnp.float32)
        split = _micro_batches((fused, per_row, weights, subset.prompts), micro_batches)
        parts = (split[0], _Part(jnp.arange(micro_batches), *split[1:]))
        first = (zero, zero, jax.tree.map(jnp.zeros_like, adapter_tree))
        (lm, fusion, adapter_gradient), stacked = jax.lax.scan(body, first, parts)
        nll, fused_gradient = jax.tree.map(_whole, stacked)

    over_turns, terms, score_gradient = _over_turns(objective, nll, scores, batch, subset, noise_key)
    (through_fusion,) = fused_vjp(fused_gradient)
    gradients = retriever_vjp(through_fusion + score_gradient)
    gradients = {
        name: tree if name == "retriever" else jax.tree.map(jnp.add, tree, adapter_gradient[name])
        for name, tree in gradients.items()
    }

    selected = jax.nn.one_hot(select(subset.of(scores)), nll.shape[-1])
    tokens = target_turn_onehot(batch).sum(axis=1)
    return Losses(
        total=objective.lm_weight * lm + objective.fusion_weight * fusion + over_turns,
        lm=lm,
        fusion=fusion,
        nll=nll,
        scores=scores,
        selected_nll=jnp.sum(jnp.sum(nll * selected, axis=-1) * tokens) / jnp.maximum(tokens.sum(), 1.0),
        **terms,
    ), gradients


class _Part(NamedTuple):
    """A part of the batch that the LM sees at once."""

    number: jax.Array
    batch: ArrayBatch
    weights: TargetWeights
    subset: jax.Array | None


def _scores(
    model: SelectiveLM, params: FrozenTree, trainable: Trainable, batch: ArrayBatch, key: jax.Array | None
) -> tuple[jax.Array, Any]:
    """The scores ``[D, N, K]`` and what carries their gradient into a tree like `trainable`."""
    if model.retriever_config is None:
        ones = jnp.ones((*batch["turn_mask"].shape, 1), jnp.float32)
        return ones, lambda _: jax.tree.map(jnp.zeros_like, trainable)
    contexts = batch_contexts(model, params, batch)
    dropout_key = key if model.retriever_config.dropout else None
    scores, vjp = jax.vjp(lambda tree: retriever_scores(model, tree, contexts, dropout_key), trainable)
    return scores, lambda cotangent: vjp(cotangent)[0]


def _weights(
    model: SelectiveLM,
    objective: Objective,
    scores: jax.Array,
    batch: ArrayBatch,
    subset: Subset,
    progress: jax.Array | float,
) -> TargetWeights:
    """`target_weights`, annealed, and divided by the chance with which a subset holds each of its prompts."""
    weights = target_weights(batch, model.num_prompts)
    lm = weights.lm
    if objective.annealing:
        annealed = annealed_weights(
            scores,
            batch["turn_mask"],
            jnp.asarray(progress, jnp.float32),
            objective.annealing,
            objective.annealing_bounds,
            over_batch=model.official,
        )
        lm = lm * at_targets(subset.of(annealed), target_turn_onehot(batch))
    if subset.inverse_chances is not None:
        lm = lm * subset.inverse_chances[:, None]
    return TargetWeights(lm, weights.fusion)


@jax.named_scope("turn_losses")
def _over_turns(
    objective: Objective,
    nll: jax.Array,
    scores: jax.Array,
    batch: ArrayBatch,
    subset: Subset,
    noise_key: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """The terms over turns: their weighted sum, each of them with what the selection did, and the scores' gradient."""
    turn_weights = batch["turn_mask"] / jnp.maximum(batch["turn_mask"].sum(), 1.0)
    target = selection_target(nll, objective.gold_temperature)
    if objective.gold_noise:
        assert noise_key is not None, "noise needs a key"
        target = noisy_target(target, objective.gold_noise, noise_key)

    if "similar" not in batch and objective.contrastive_weight:
        raise ValueError(
            "the batch has no 'similar', of which the contrastive loss is made: give the loader pair_texts, or the "
            "objective contrastive_weight = 0"
        )

    def terms(scores: jax.Array) -> Any:
        selection = selection_loss(target, subset.of(scores), turn_weights, objective.score_temperature)
        contrastive = jnp.zeros((), jnp.float32)
        if "similar" in batch:
            flat = scores.reshape(-1, scores.shape[-1])
            contrastive = contrastive_loss(flat, batch["similar"], contrastive_pairs(batch, objective.pairs))
        balance = balance_loss(scores, turn_weights, objective.score_temperature)
        total = objective.selection_weight * selection + objective.contrastive_weight * contrastive
        if objective.balance_weight:
            total = total + objective.balance_weight * balance
        return total, {"selection": selection, "contrastive": contrastive, "balance": balance}

    (total, named), gradient = jax.value_and_grad(terms, has_aux=True)(scores)
    log_probabilities = jax.nn.log_softmax(scores / objective.score_temperature, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    selected = jax.nn.one_hot(select(scores), scores.shape[-1])
    named |= {
        "usage": jnp.einsum("dnk,dn->k", selected, turn_weights, precision=jax.lax.Precision.HIGHEST),
        "selection_entropy": jnp.sum(entropy * turn_weights),
    }
    return total, named, gradient
