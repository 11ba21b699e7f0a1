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
        lm: float32 ``[D, S, K]``, or ``[D, S, 1]`` for every prompt alike; ``1 / (K · tokens)`` makes the LM loss of
            METHOD 2.
        fusion: float32 ``[D, S]``; ``1 / (U · tokens of the turn)`` makes the fusion loss of METHOD 5.
    """

    lm: jax.Array
    fusion: jax.Array


class TargetLosses(NamedTuple):
    """What the logits at target positions tell.

    Attributes:
        nll: float32 ``[D, S, K]``, negative log likelihood of the target under each prompt, nats. No gradient.
        fusion: float32 ``[D, S]``, cross-entropy of the score-weighted sum of logits, nats; 0 where no scores were
            given. No gradient.
    """

    nll: jax.Array
    fusion: jax.Array


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _chunk_losses(logits: jax.Array, scores: jax.Array | None, targets: jax.Array) -> TargetLosses:
    """Logits ``[D, C, K, V]``, scores ``[D, C, K]``, targets ``[D, C]``."""
    nll = _cross_entropy(logits, jnp.broadcast_to(targets[..., None], logits.shape[:-1]))
    if scores is None:
        return TargetLosses(nll, jnp.zeros(targets.shape, jnp.float32))
    fused = jnp.einsum("dck,dckv->dcv", scores, logits, precision=jax.lax.Precision.HIGHEST)
    return TargetLosses(nll, _cross_entropy(fused, targets))


def chunk_size(rows: int, num_prompts: int, positions: int, max_logit_rows: int, groups: int = 1) -> int:
    """Target positions of each group of rows whose logits exist at once: ``chunk · K <= max_logit_rows``.

    At least 1, and so that the chunks of all positions are of nearly equal size.
    """
    flat = rows // groups * positions
    most = max(1, min(flat, max_logit_rows // num_prompts))
    return -(-flat // -(-flat // most))


class Chunks(NamedTuple):
    """How target positions are projected: some at a time, those that hold no target not at all.

    Attributes:
        size: Positions of a group at once; see `chunk_size`.
        groups: Into how many groups D is split. Positions are gathered within a group alone, so with as many groups as
            devices share the rows, none of them leaves its device.
    """

    size: int
    groups: int = 1


def _in_chunks(run: Callable[..., Any], arrays: Any, mask: jax.Array, chunks: Chunks) -> Any:
    """``run(arrays)`` in chunks of target positions, the real ones together.

    Args:
        run: Takes a tree like `arrays` with leaves ``[groups, chunk, ...]``; gives a tree of such leaves.
        arrays: A tree of leaves ``[D, S, ...]``.
        mask: ``[D, S]``, above 0 at real targets.
        chunks: See `Chunks`.

    Returns:
        A tree of leaves ``[D, S, ...]``, 0 where the mask is.
    """
    groups, (rows, positions) = chunks.groups, mask.shape
    flat = rows // groups * positions
    count = -(-flat // chunks.size)
    real = mask.reshape(groups, flat) > 0
    order = jnp.argsort(~real, axis=1, stable=True)
    beyond = ((0, 0), (0, count * chunks.size - flat))
    order = jnp.pad(order, beyond, constant_values=flat)
    needed = -(-real.sum(axis=1).max() // chunks.size)

    def taken(x: jax.Array, places: jax.Array) -> jax.Array:
        places = places.reshape(*places.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=0)

    def chunked(x: jax.Array) -> jax.Array:
        x = taken(x.reshape(groups, flat, *x.shape[2:]), order)
        return jnp.moveaxis(x.reshape(groups, count, chunks.size, *x.shape[2:]), 1, 0)

    def unchunked(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(groups, count * chunks.size, *x.shape[3:])
        x = taken(x, jnp.argsort(order, axis=1, stable=True)[:, :flat])
        return jnp.where(real.reshape(groups, flat, *[1] * (x.ndim - 2)), x, 0).reshape(rows, positions, *x.shape[2:])

    def body(_: None, xs: Any) -> tuple[None, Any]:
        number, part = xs
        nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(run, part))
        return None, jax.lax.cond(number < needed, run, lambda _: nothing, part)

    _, made = jax.lax.scan(body, None, (jnp.arange(count), jax.tree.map(chunked, arrays)))
    return jax.tree.map(unchunked, made)


@jax.named_scope("vocabulary")
def target_losses(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    chunks: Chunks,
) -> TargetLosses:
    """LM and fusion losses at every target position, without gradients.

    Args:
        project: The vocabulary projection, ``(head, [..., M]) -> float32 [..., V]``.
        head: Its parameters.
        hidden: ``[D, S, K, M]``, hidden states at the target positions under each prompt.
        scores: float32 ``[D, S, K]``, the scores of each position's turn; None leaves the fusion loss out.
        targets: int ``[D, S]``.
        mask: ``[D, S]``, 0 where there is no target: such positions are not projected, and their losses are 0.
        chunks: Which positions are projected at once; no more than ``groups · size · K · V`` logits exist.

    Returns:
        See `TargetLosses`.
    """
    return _in_chunks(_chunk_of(project, head), (hidden, scores, targets), mask, chunks)


def _chunk_of(project: Callable[[Any, jax.Array], jax.Array], head: Any) -> Callable[[Any], TargetLosses]:
    return lambda xs: _chunk_losses(project(head, xs[0]), *xs[1:])


def _weighted_sum(losses: TargetLosses, weights: TargetWeights) -> jax.Array:
    return jnp.sum(losses.nll * weights.lm) + jnp.sum(losses.fusion * weights.fusion)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def _weighted(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    weights: TargetWeights,
    chunks: Chunks,
) -> tuple[jax.Array, TargetLosses]:
    losses = target_losses(project, head, hidden, scores, targets, mask, chunks)
    return _weighted_sum(losses, weights), losses


def _weighted_forward(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    weights: TargetWeights,
    chunks: Chunks,
) -> tuple[tuple[jax.Array, TargetLosses], tuple[jax.Array, jax.Array | None]]:
    def run(xs: Any) -> tuple[TargetLosses, Any]:
        h, s, t, w = xs

        def loss(h: jax.Array, s: jax.Array | None) -> tuple[jax.Array, TargetLosses]:
            losses = _chunk_of(project, head)((h, s, t))
            return _weighted_sum(losses, w), losses

        gradients, losses = jax.grad(loss, argnums=(0, 1), has_aux=True)(h, s)
        return losses, gradients

    losses, gradients = _in_chunks(run, (hidden, scores, targets, weights), mask, chunks)
    return (_weighted_sum(losses, weights), losses), gradients


def _weighted_backward(
    project: Any, chunks: Chunks, gradients: tuple[jax.Array, Any], cotangents: tuple[jax.Array, TargetLosses]
) -> tuple[Any, ...]:
    del project, chunks
    hidden, scores = gradients
    scores = None if scores is None else scores * cotangents[0]
    return None, (hidden * cotangents[0]).astype(hidden.dtype), scores, None, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


@jax.named_scope("vocabulary")
def weighted_target_losses(
    project: Callable[[Any, jax.Array], jax.Array],
    head: Any,
    hidden: jax.Array,
    scores: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    weights: TargetWeights,
    chunks: Chunks,
    head_trained: bool = False,
) -> tuple[jax.Array, TargetLosses]:
    """``Σ w_lm · nll + Σ w_fus · CE(Σ_k score_k · logits_k)``: METHOD 2 and 5 in one pass over the vocabulary.

    The gradients with respect to `hidden` and `scores` are taken while each chunk's logits exist, so the projection is
    neither stored nor computed again for the backward pass; the projection's own parameters have no gradient then.
    Where they are trained, each chunk's logits are computed again instead.

    Args:
        project: See `target_losses`.
        head: See `target_losses`.
        hidden: ``[D, S, K, M]``; differentiable.
        scores: float32 ``[D, S, K]``; differentiable. None leaves the fusion loss out.
        targets: int ``[D, S]``.
        mask: See `target_losses`; weights are 0 where it is.
        weights: See `TargetWeights`.
        chunks: See `target_losses`.
        head_trained: Whether `head` has a gradient.

    Returns:
        The weighted sum, a scalar, and the losses position by position (`TargetLosses`, no gradient).
    """
    if head_trained:
        recomputed = jax.checkpoint(_chunk_of(project, head))
        losses = _in_chunks(recomputed, (hidden, scores, targets), mask, chunks)
        total = _weighted_sum(losses, weights)
    else:
        weighted: Any = _weighted  # custom_vjp hides the signature from type checkers
        total, losses = weighted(project, head, hidden, scores, targets, mask, weights, chunks)
    return total, jax.lax.stop_gradient(losses)


def selection_target(nll: jax.Array, temperature: float) -> jax.Array:
    """``g_u = softmax_k(-nll_uk / τ_gold)``: what the LM tells the retriever. No gradient. ``[..., K]`` in and out."""
    return jax.lax.stop_gradient(jax.nn.softmax(-nll / temperature, axis=-1))


def noisy_target(target: jax.Array, noise: float, key: jax.Array) -> jax.Array:
    """A distribution ``[..., K]`` with normal noise on each probability, clipped at 0 and renormalised.

    Where nothing is left above 0 the target stays as it was. (The authors' program keeps negative probabilities, whose
    KL is not a number.)
    """
    noisy = jnp.maximum(target + noise * jax.random.normal(key, target.shape), 0.0)
    total = noisy.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, noisy / jnp.where(total > 0, total, 1.0), target)


def selection_loss(
    target: jax.Array, scores: jax.Array, turn_weights: jax.Array, score_temperature: float
) -> jax.Array:
    """``Σ_u w_u KL(g_u || softmax_k(score_uk / τ_sim))`` (METHOD 3).

    Args:
        target: float32 ``[..., K]``, g, without gradient; see `selection_target`.
        scores: float32 ``[..., K]``.
        turn_weights: ``[...]``; ``1 / U`` on turns and 0 on padding makes the mean.
        score_temperature: τ_sim.

    Returns:
        A scalar, nats.
    """
    target = jax.lax.stop_gradient(target)
    log_target = jnp.log(jnp.where(target > 0, target, 1.0))
    log_scores = jax.nn.log_softmax(scores / score_temperature, axis=-1)
    # q - g sums to 0; it takes away the rounding of both softmaxes, which is not small beside a small divergence.
    divergence = jnp.sum(target * (log_target - log_scores) + (jnp.exp(log_scores) - target), axis=-1)
    return jnp.sum(turn_weights * divergence)


def annealed_weights(
    scores: jax.Array,
    present: jax.Array,
    progress: jax.Array,
    scale: float,
    bounds: tuple[float, float],
    over_batch: bool = False,
) -> jax.Array:
    """``w_uk = clip(a (1 - progress) softmax_k(score_uk), min, max)``, weights of the LM loss, without gradient.

    Args:
        scores: float32 ``[D, N, K]``.
        present: ``[D, N]``, 0 where there is no turn.
        progress: Scalar, steps done over all steps.
        scale: a.
        bounds: min and max.
        over_batch: Whether the softmax runs over all turns and prompts at once, as in the authors' program.

    Returns:
        float32 ``[D, N, K]``.
    """
    if over_batch:
        shares = jax.nn.softmax(jnp.where(present[..., None] > 0, scores, -jnp.inf), axis=(0, 1, 2))
    else:
        shares = jax.nn.softmax(scores, axis=-1)
    return jax.lax.stop_gradient(jnp.clip(scale * (1.0 - progress) * shares, *bounds))


def balance_loss(scores: jax.Array, turn_weights: jax.Array, score_temperature: float) -> jax.Array:
    """``K Σ_k f_k q̄_k``: 1 when prompts serve equally many turns, K when one serves all (arXiv 2101.03961, eq. 4).

    Args:
        scores: float32 ``[..., K]``.
        turn_weights: ``[...]``, summing to 1.
        score_temperature: τ_sim.

    Returns:
        A scalar; f, the share of turns whose highest score is each prompt's, has no gradient, q̄, the mean of
        ``softmax_k(score / τ_sim)``, has.
    """
    num_prompts = scores.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(scores, axis=-1), num_prompts)
    weights = turn_weights[..., None]
    share = jnp.sum(weights * chosen, axis=tuple(range(scores.ndim - 1)))
    mean = jnp.sum(weights * jax.nn.softmax(scores / score_temperature, axis=-1), axis=tuple(range(scores.ndim - 1)))
    return num_prompts * jnp.sum(jax.lax.stop_gradient(share) * mean)


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
