"""The four losses of Selective Prompt Tuning on plain arrays; nothing here has heard of a model.

Every loss is a sum with weights, so that micro-batches, padding and devices add up to the loss of one big batch: the
weights depend on the data alone and are totalled over the global batch beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CONTRASTIVE_EPSILON = 1e-12


class TargetWeights(NamedTuple):
    """How much each target position counts; padding has weight 0.

    Attributes:
        lm: float32 ``[D, S]``, for every prompt alike; ``1 / (K · tokens)`` makes the LM loss of METHOD 2.
        fusion: float32 ``[D, S]``; ``1 / (U · tokens of the turn)`` makes the fusion loss of METHOD 5.
    """

    lm: jax.Array
    fusion: jax.Array


class TargetLosses(NamedTuple):
    """What the logits at target positions tell.

    Attributes:
        nll: float32 ``[D, S, K]``, negative log likelihood of the target under each prompt, nats. No gradient.
        fusion: float32 ``[D, S]``, cross-entropy of the score-weighted sum of logits, nats. No gradient.
    """

    nll: jax.Array
    fusion: jax.Array


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _chunk_losses(logits: jax.Array, scores: jax.Array, targets: jax.Array) -> TargetLosses:
    """Logits ``[D, C, K, V]``, scores ``[D, C, K]``, targets ``[D, C]``."""
    nll = _cross_entropy(logits, jnp.broadcast_to(targets[..., None], logits.shape[:-1]))
    fused = jnp.einsum("dck,dckv->dcv", scores, logits, precision=jax.lax.Precision.HIGHEST)
    return TargetLosses(nll, _cross_entropy(fused, targets))


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """``[D, S, ...]`` to ``[S / chunk, D, chunk, ...]``."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:]), 1, 0)


def _unchunked(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def chunk_size(rows: int, num_prompts: int, positions: int, max_logit_rows: int) -> int:
    """The largest divisor of `positions` whose chunk has at most `max_logit_rows` rows of logits (at least 1)."""
    allowed = max(1, max_logit_rows // (rows * num_prompts))
    return max(c for c in range(1, positions + 1) if positions % c == 0 and (c <= allowed or c == 1))


def target_losses(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array,
    targets: jax.Array,
    chunk: int,
) -> TargetLosses:
    """LM and fusion losses at every target position, without gradients.

    Args:
        project: The vocabulary projection, ``(head, [..., M]) -> float32 [..., V]``.
        head: Its parameters.
        hidden: ``[D, S, K, M]``, hidden states at the target positions under each prompt.
        scores: float32 ``[D, S, K]``, the scores of each position's turn.
        targets: int ``[D, S]``.
        chunk: Positions projected at once (`chunk_size`); divides S. No more than ``D · chunk · K · V`` logits exist.

    Returns:
        See `TargetLosses`.
    """

    def body(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, TargetLosses]:
        h, s, t = xs
        return None, _chunk_losses(project(head, h), s, t)

    _, losses = jax.lax.scan(body, None, tuple(_chunked(x, chunk) for x in (hidden, scores, targets)))
    return jax.tree.map(_unchunked, losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _weighted(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array,
    targets: jax.Array,
    weights: TargetWeights,
    chunk: int,
) -> tuple[jax.Array, TargetLosses]:
    losses = target_losses(project, head, hidden, scores, targets, chunk)
    return jnp.sum(losses.nll * weights.lm[..., None]) + jnp.sum(losses.fusion * weights.fusion), losses


def _weighted_forward(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array,
    targets: jax.Array,
    weights: TargetWeights,
    chunk: int,
) -> tuple[tuple[jax.Array, TargetLosses], tuple[jax.Array, jax.Array]]:
    def body(total: jax.Array, xs: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        h, s, t, w = xs

        def loss(h: jax.Array, s: jax.Array) -> tuple[jax.Array, TargetLosses]:
            losses = _chunk_losses(project(head, h), s, t)
            return jnp.sum(losses.nll * w.lm[..., None]) + jnp.sum(losses.fusion * w.fusion), losses

        (value, losses), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(h, s)
        return total + value, (losses, gradients)

    xs = jax.tree.map(functools.partial(_chunked, chunk=chunk), (hidden, scores, targets, weights))
    total, (losses, gradients) = jax.lax.scan(body, jnp.zeros((), jnp.float32), xs)
    return (total, jax.tree.map(_unchunked, losses)), jax.tree.map(_unchunked, gradients)


def _weighted_backward(
    project: Any, chunk: int, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, TargetLosses]
) -> tuple[Any, ...]:
    del project, chunk
    hidden, scores = gradients
    return None, (hidden * cotangents[0]).astype(hidden.dtype), scores * cotangents[0], None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def weighted_target_losses(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array,
    targets: jax.Array,
    weights: TargetWeights,
    chunk: int,
) -> tuple[jax.Array, TargetLosses]:
    """``Σ w_lm · nll + Σ w_fus · CE(Σ_k score_k · logits_k)``: METHOD 2 and 5 in one pass over the vocabulary.

    The gradients with respect to `hidden` and `scores` are taken while each chunk's logits exist, so the projection is
    neither stored nor computed again for the backward pass. The projection's own parameters have no gradient.

    Args:
        project: See `target_losses`.
        head: See `target_losses`.
        hidden: ``[D, S, K, M]``; differentiable.
        scores: float32 ``[D, S, K]``; differentiable.
        targets: int ``[D, S]``.
        weights: See `TargetWeights`.
        chunk: See `target_losses`.

    Returns:
        The weighted sum, a scalar, and the losses position by position (`TargetLosses`, no gradient).
    """
    weighted: Any = _weighted  # custom_vjp hides the signature from type checkers
    total, losses = weighted(project, head, hidden, scores, targets, weights, chunk)
    return total, jax.lax.stop_gradient(losses)


def selection_target(nll: jax.Array, temperature: float) -> jax.Array:
    """``g_u = softmax_k(-nll_uk / τ_gold)``: what the LM tells the retriever. No gradient. ``[..., K]`` in and out."""
    return jax.lax.stop_gradient(jax.nn.softmax(-nll / temperature, axis=-1))


def selection_loss(
    nll: jax.Array, scores: jax.Array, turn_weights: jax.Array, gold_temperature: float, score_temperature: float
) -> jax.Array:
    """``Σ_u w_u KL(g_u || softmax_k(score_uk / τ_sim))`` (METHOD 3).

    Args:
        nll: float32 ``[..., K]``, mean negative log likelihood of each turn under each prompt, nats a token.
        scores: float32 ``[..., K]``.
        turn_weights: ``[...]``; ``1 / U`` on turns and 0 on padding makes the mean.
        gold_temperature: τ_gold.
        score_temperature: τ_sim.

    Returns:
        A scalar, nats.
    """
    gold = selection_target(nll, gold_temperature)
    log_gold = jax.lax.stop_gradient(jax.nn.log_softmax(-nll / gold_temperature, axis=-1))
    divergence = jnp.sum(gold * (log_gold - jax.nn.log_softmax(scores / score_temperature, axis=-1)), axis=-1)
    return jnp.sum(turn_weights * divergence)


def contrastive_loss(scores: jax.Array, similar: jax.Array, pairs: jax.Array) -> jax.Array:
    """Turns of similar personas should select alike, others apart (METHOD 4).

    Args:
        scores: float32 ``[U, K]``.
        similar: bool ``[U, U]``, whether BLEU(text_i, text_j) > Γ with hypothesis i and reference j.
        pairs: bool ``[U, U]``, which pairs count; only ``i < j`` is read.

    Returns:
        The mean over pairs of ``1 - cos`` where similar, ``max(0, cos)`` elsewhere; 0 when there is no pair.
    """
    squared = jnp.sum(scores * scores, axis=-1) + CONTRASTIVE_EPSILON
    products = jnp.einsum("ik,jk->ij", scores, scores, precision=jax.lax.Precision.HIGHEST)
    cosine = products * jax.lax.rsqrt(squared[:, None] * squared[None, :])
    counted = jnp.triu(pairs, k=1).astype(jnp.float32)
    losses = jnp.where(similar, 1.0 - cosine, jnp.maximum(cosine, 0.0))
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1.0)
