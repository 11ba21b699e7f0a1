"""What varies the objective: annealing, noise, the balance of selection, terms switched off, a trained head."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.losses import (
    Chunks,
    TargetWeights,
    annealed_weights,
    balance_loss,
    chunk_size,
    noisy_target,
    target_losses,
    weighted_target_losses,
)
from spt_jax.prompting.objective import Objective, losses_and_gradients
from spt_jax.prompting.retriever import cosine_similarity, softplus_score
from spt_jax.prompting.selective_lm import batch_scores, score_turns
from spt_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.first_python

SCORES = jax.random.normal(jax.random.key(0), (3, 4, 5))
PRESENT = jnp.asarray([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_annealed_weights_follow_their_equation_within_their_bounds(progress, over_batch):
    found = annealed_weights(SCORES, PRESENT, jnp.float32(progress), 3.0, (0.05, 0.9), over_batch)
    scores = np.asarray(SCORES, np.float64)
    if over_batch:
        exponentials = np.exp(scores) * np.asarray(PRESENT)[..., None]
        shares = exponentials / exponentials.sum()
    else:
        shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.clip(3.0 * (1 - progress) * shares, 0.05, 0.9), rtol=2e-6)


def test_annealed_weights_end_at_their_lowest_value_and_carry_no_gradient():
    at_the_end = annealed_weights(SCORES, PRESENT, jnp.float32(1.0), 3.0, (0.25, 0.9))
    np.testing.assert_array_equal(at_the_end, np.full(SCORES.shape, 0.25, np.float32))
    gradient = jax.grad(lambda x: jnp.sum(annealed_weights(x, PRESENT, jnp.float32(0.1), 3.0, (0.0, 9.0)) ** 2))(SCORES)
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize(("over_batch", "sums"), [(False, 12.0), (True, 1.0)])
def test_annealed_weights_share_out_one_a_turn_or_one_a_batch(over_batch, sums):
    shares = annealed_weights(SCORES, PRESENT, jnp.float32(0.0), 1.0, (0.0, 1.0), over_batch)
    assert float(shares.sum()) == pytest.approx(sums, rel=1e-5)


NOISED = jax.jit(lambda target, noise, seed: noisy_target(target, noise, jax.random.key(seed)))


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.lists(st.floats(-60, 60), min_size=4, max_size=4), min_size=3, max_size=3),
    noise=st.floats(0, 100, width=32),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_noisy_target_is_a_distribution(logits, noise, seed):
    target = jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    noisy = np.asarray(NOISED(target, noise, seed))
    assert (noisy >= 0).all()
    np.testing.assert_allclose(noisy.sum(axis=-1), 1.0, rtol=1e-5)
    if noise == 0:
        np.testing.assert_allclose(noisy, target, rtol=1e-5)


def test_where_noise_leaves_nothing_the_target_stays():
    target = jnp.full((4000, 2), 0.5)
    noisy = np.asarray(noisy_target(target, 1e3, jax.random.key(0)))
    kept = (noisy == 0.5).all(axis=-1)
    assert kept.mean() == pytest.approx(0.25, abs=0.03)  # both draws far below 0
    assert np.isin(noisy[~kept].max(axis=-1), 1.0).mean() > 0.4


OBJECTIVE = Objective(0.7, 0.4, 0.9, gold_noise=0.3, annealing=2.0, annealing_bounds=(0.05, 1.5), balance_weight=0.2)


@functools.cache
def noisy_step():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    step = make_train_step(tiny.MODEL, OBJECTIVE, optax.sgd(0.1), mesh, seed=3, total_steps=4)
    batch = tiny.packed("dialogue", tiny.DIALOGUES[2:]).batch()

    def metrics(number: int):
        state = init_state(tiny.trainable(), optax.sgd(0.1), mesh)
        _, found = step(dataclasses.replace(state, step=jnp.int32(number)), tiny.params(), batch)
        return {name: float(value) for name, value in found.items()}

    return metrics


def test_noise_is_a_function_of_seed_and_step():
    metrics = noisy_step()
    first, again, second = metrics(0), metrics(0), metrics(1)
    assert first == again
    assert abs(first["loss/selection"] - second["loss/selection"]) > 1e-3
    assert first["loss/fusion"] == second["loss/fusion"]


def test_annealing_lowers_the_lm_loss_with_the_steps_done_down_to_its_bound():
    metrics = noisy_step()
    lm = [metrics(step)["loss/lm"] for step in (0, 2, 4)]
    assert lm[0] > 1.5 * lm[1] > 2 * lm[2] > 0
    batch = tiny.packed("dialogue", tiny.DIALOGUES[2:]).batch()
    plain = jax.jit(score_turns, static_argnums=0)(tiny.MODEL, tiny.params(), tiny.trainable(), batch)
    mean = float((plain.nll.mean(axis=-1) * plain.tokens).sum() / plain.tokens.sum())
    assert lm[2] == pytest.approx(0.05 * mean, rel=1e-5)


def test_the_total_is_linear_in_the_weights_and_the_lm_loss_can_be_off_or_alone():
    batch = tiny.packed("dialogue", tiny.DIALOGUES[2:]).batch()

    @jax.jit
    def at(lm, selection, contrastive):
        objective = Objective(selection, contrastive, fusion_weight=0.0, lm_weight=lm)
        return losses_and_gradients(tiny.MODEL, objective, tiny.params(), tiny.trainable(), batch)

    both, alone, off = at(1.0, 0.7, 0.4), at(1.0, 0.0, 0.0), at(0.0, 0.7, 0.4)
    assert float(both[0].total) == pytest.approx(float(alone[0].total + off[0].total), rel=1e-6)
    assert tiny.relative_difference(jax.tree.map(jnp.add, alone[1], off[1]), both[1]) <= 1e-5
    assert float(alone[0].total) == float(alone[0].lm) == float(off[0].lm)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(alone[1]["retriever"]))
    # Without the LM's loss the bank learns through its side of the cosine alone, which sees the mean of its tokens.
    bank = np.asarray(off[1]["bank"]["prompts"])
    np.testing.assert_allclose(bank, np.broadcast_to(bank[:, :1], bank.shape), atol=1e-7 * np.abs(bank).max() + 1e-9)


def test_the_balance_enters_the_total_and_the_retrievers_gradient_by_its_weight():
    batch = tiny.packed("dialogue", tiny.DIALOGUES[2:]).batch()
    tree = tiny.trainable()

    def at(weight: float) -> Any:
        return tiny.STEP(tiny.MODEL, Objective(0.7, 0.4, 0.0, balance_weight=weight), tiny.params(), tree, batch)

    def balance(tree: Any) -> jax.Array:
        scores = batch_scores(tiny.MODEL, tiny.params(), tree, batch)
        return balance_loss(scores, batch["turn_mask"] / batch["turn_mask"].sum(), 1.0)

    (with_it, gradient), (without, plain) = at(5.0), at(0.0)
    value, expected = jax.value_and_grad(balance)(tree)
    assert float(with_it.balance) == pytest.approx(float(value), rel=1e-5)
    assert float(with_it.total - without.total) == pytest.approx(5 * float(value), rel=1e-5)
    difference = jax.tree.map(lambda a, b: (a - b) / 5, gradient["retriever"], plain["retriever"])
    assert tiny.relative_difference(difference, expected["retriever"]) <= 1e-3
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected["retriever"])) > 1e-4


def flops(fusion_weight: float) -> float:
    objective = Objective(0.4, 0.4, fusion_weight)
    model = dataclasses.replace(tiny.MODEL, max_logit_rows=10**6)
    batch = tiny.packed("dialogue").batch()
    cost: Any = tiny.STEP.lower(model, objective, tiny.params(), tiny.trainable(), batch).cost_analysis()
    return cost["flops"]


def test_without_a_weight_the_fusion_loss_is_not_computed():
    batch = tiny.packed("dialogue").batch()
    logits = batch["target_ids"].size * tiny.MODEL.num_prompts * tiny.CONFIG.vocab_size
    # Mixing the K logits and the two products of its gradient take two operations a logit each.
    assert flops(1.0) - flops(0.0) > 5 * logits


V, M, D, S, PROMPTS = 11, 6, 2, 8, 3
MASK = jnp.asarray([[1, 0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0]], jnp.float32)


def arrays():
    keys = jax.random.split(jax.random.key(4), 6)
    head = jax.random.normal(keys[0], (M, V))
    hidden = jax.random.normal(keys[1], (D, S, PROMPTS, M))
    scores = jax.random.uniform(keys[2], (D, S, PROMPTS))
    targets = jax.random.randint(keys[3], (D, S), 0, V)
    lm, fusion = jax.random.uniform(keys[4], (D, S, PROMPTS)), jax.random.uniform(keys[5], (D, S))
    return head, hidden, scores, targets, TargetWeights(lm * MASK[..., None], fusion * MASK)


def project(head, hidden):
    return jnp.einsum("...m,mv->...v", hidden, head)


def plain_total(head, hidden, scores, targets, weights):
    """All logits at once, differentiated by jax alone."""
    logits = project(head, hidden)
    lm = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None, None], axis=-1)[..., 0]
    fused = jax.nn.log_softmax(jnp.einsum("dsk,dskv->dsv", scores, logits))
    fusion = -jnp.take_along_axis(fused, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(lm * weights.lm) + jnp.sum(fusion * weights.fusion)


@pytest.mark.parametrize("head_trained", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("chunk", [1, 3, 4, 8])
def test_gradients_in_chunks_equal_plain_differentiation_of_all_logits(chunk, groups, head_trained):
    head, hidden, scores, targets, weights = arrays()
    chunks = Chunks(chunk, groups)
    # What stands at padding is nobody's business, whatever it is.
    dirty = jnp.where(MASK[..., None, None] > 0, hidden, jnp.nan)

    def total(head, hidden, scores):
        return weighted_target_losses(project, head, hidden, scores, targets, MASK, weights, chunks, head_trained)

    over = (0, 1, 2) if head_trained else (1, 2)
    given = hidden if head_trained else dirty
    (value, losses), gradients = jax.value_and_grad(total, argnums=over, has_aux=True)(head, given, scores)
    plain = jax.jit(jax.value_and_grad(plain_total, argnums=over))
    expected, theirs = plain(head, hidden, scores, targets, weights)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert tiny.relative_difference(gradients, theirs) <= 1e-5
    alone = target_losses(project, head, given, scores, targets, MASK, chunks)
    assert tiny.relative_difference(losses, alone) <= 1e-6
    assert not np.asarray(alone.nll)[np.asarray(MASK) == 0].any()
    assert np.asarray(alone.nll)[np.asarray(MASK) > 0].all()


@pytest.mark.parametrize(("chunk", "groups", "calls"), [(1, 1, 5), (2, 1, 3), (16, 1, 1), (1, 2, 4), (3, 2, 2)])
def test_chunks_without_a_target_are_not_projected(chunk, groups, calls):
    head, hidden, scores, targets, _ = arrays()
    seen = []

    def counted(head, hidden):
        jax.debug.callback(lambda: seen.append(1))
        return project(head, hidden)

    jax.block_until_ready(target_losses(counted, head, hidden, scores, targets, MASK, Chunks(chunk, groups)))
    jax.effects_barrier()
    assert len(seen) == calls


@pytest.mark.parametrize(
    ("rows", "most", "groups", "size"),
    [(8, 512, 1, 128), (8, 512, 4, 128), (8, 1, 1, 1), (8, 10**6, 1, 1024), (3, 512, 1, 128)],
)
def test_a_device_holds_no_more_logits_than_allowed_however_many_there_are(rows, most, groups, size):
    assert chunk_size(rows, 4, 128, most, groups) == size


@pytest.mark.parametrize("head_trained", [False, True])
def test_leaving_fusion_out_gives_the_gradients_of_fusion_with_a_weight_of_zero(head_trained):
    head, hidden, scores, targets, weights = arrays()
    unweighted = weights._replace(fusion=jnp.zeros_like(weights.fusion))

    def total(hidden, scores):
        args = (targets, MASK, unweighted, Chunks(4), head_trained)
        return weighted_target_losses(project, head, hidden, scores, *args)[0]

    with_fusion = jax.value_and_grad(total)(hidden, scores)
    without = jax.value_and_grad(total)(hidden, None)
    assert tiny.relative_difference(without, with_fusion) <= 1e-6


def test_balance_is_one_when_prompts_serve_alike_and_their_number_when_one_serves_all():
    weights = jnp.full(4, 0.25)
    assert float(balance_loss(10.0 * jnp.eye(4), weights, 0.1)) == pytest.approx(1.0, rel=1e-6)
    collapsed = jnp.zeros((4, 4)).at[:, 2].set(10.0)
    assert float(balance_loss(collapsed, weights, 0.1)) == pytest.approx(4.0, rel=1e-6)


def test_the_balances_gradient_pushes_the_overused_prompt_down_and_counts_real_turns_alone():
    scores = jnp.asarray([[[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.7, 0.2], [0.0, 0.0, 9.0]]])
    weights = jnp.asarray([[1 / 3, 1 / 3, 1 / 3, 0.0]])
    gradient = np.asarray(jax.grad(balance_loss)(scores, weights, 1.0))[0]
    assert (gradient[:3, 0] > 0).all()
    assert (gradient[:3, 2] < 0).all()
    assert not gradient[3].any()
    np.testing.assert_allclose(gradient.sum(axis=-1), 0.0, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_balance_keeps_selection_from_collapsing_in_a_toy_training(seed):
    """Contexts share a direction, which makes one prompt everyone's; what a prompt is used for it gets better at."""
    contexts = jax.random.normal(jax.random.key(seed), (40, 6)) + 3.0
    weights = jnp.full(40, 1 / 40)

    def trained(balance: float) -> np.ndarray:
        def total(prompts):
            scores = softplus_score(cosine_similarity(contexts, prompts))
            used = jax.lax.stop_gradient(jax.nn.one_hot(scores.argmax(axis=-1), 4))
            reinforced = -jnp.mean(jnp.sum(used * jax.nn.log_softmax(scores / 0.1), axis=-1))
            return reinforced + balance * balance_loss(scores, weights, 0.1)

        prompts = jax.random.normal(jax.random.key(seed + 100), (4, 6))
        gradient = jax.jit(jax.grad(total))
        for _ in range(30):
            prompts = prompts - 0.2 * gradient(prompts)
        chosen = np.asarray(cosine_similarity(contexts, prompts)).argmax(axis=-1)
        return np.bincount(chosen, minlength=4) / len(chosen)

    def entropy(usage: np.ndarray) -> float:
        return float(-(usage[usage > 0] * np.log(usage[usage > 0])).sum())

    collapsed, balanced = trained(0.0), trained(2.0)
    assert collapsed.max() > 0.95
    assert entropy(balanced) > entropy(collapsed) + 0.8
