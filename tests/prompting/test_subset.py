"""Training on m of K prompts a row: what is drawn, what it estimates, and what it saves."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import binomtest

from spt_jax.config import default_config, validate
from spt_jax.errors import UserError
from spt_jax.prompting import objective as objective_module
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.prompting.objective import LM_ALONE, Objective, losses_and_gradients
from spt_jax.prompting.selective_lm import SelectiveLM, mixed_prompts, target_turn_onehot
from spt_jax.prompting.subset import Subset, draw_subset

K, SIZE = 5, 3
# The last two turns of the second row, which are not there, would make prompt 0 its favourite.
SCORES = jax.random.uniform(jax.random.key(3), (3, 4, K)).at[1, 2:, 0].set(9.0)
PRESENT = jnp.asarray([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
DRAWS = 4000


@pytest.fixture(scope="module")
def draws() -> Subset:
    """`DRAWS` subsets of each of three rows."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.jit(jax.vmap(lambda key: draw_subset(SCORES, PRESENT, SIZE, key)))(keys)


def favourites() -> np.ndarray:
    sums = np.einsum("dnk,dn->dk", np.asarray(SCORES, np.float64), np.asarray(PRESENT))
    return sums.argmax(axis=-1)


def test_a_subset_holds_different_prompts_and_the_favourite_first(draws):
    assert draws.prompts is not None
    prompts = np.sort(draws.prompts, axis=-1)
    assert (np.diff(prompts, axis=-1) > 0).all()
    assert prompts.min() == 0
    assert prompts.max() == K - 1
    np.testing.assert_array_equal(draws.prompts[..., 0], np.broadcast_to(favourites(), (DRAWS, 3)))


def test_turns_that_are_not_there_do_not_choose_the_favourite(draws):
    assert SCORES[1].sum(axis=0).argmax() == 0 != favourites()[1]
    assert (draws.prompts[:, 1, 0] == favourites()[1]).all()


def test_every_other_prompt_is_drawn_equally_often(draws):
    chance = (SIZE - 1) / (K - 1)
    for row, favourite in enumerate(favourites()):
        counts = np.bincount(np.asarray(draws.prompts[:, row]).reshape(-1), minlength=K)
        assert counts[favourite] == DRAWS
        for k in set(range(K)) - {int(favourite)}:
            assert binomtest(int(counts[k]), DRAWS, chance).pvalue > 1e-4


def test_weights_are_inverse_chances_and_sum_to_all_prompts(draws):
    expected = [1.0] + [(K - 1) / (SIZE - 1)] * (SIZE - 1)
    np.testing.assert_allclose(draws.inverse_chances, np.broadcast_to(expected, (DRAWS, 3, SIZE)))
    np.testing.assert_allclose(draws.inverse_chances.sum(axis=-1), K)


@pytest.mark.parametrize("size", [0, K])
def test_all_prompts_draw_nothing(size):
    subset = draw_subset(SCORES, PRESENT, size, None)
    assert subset == Subset()
    assert subset.of(SCORES) is SCORES
    assert subset.fusion_scores(SCORES) is SCORES


def test_fusion_scores_keep_the_sum_over_all_prompts_and_their_order():
    subset = draw_subset(SCORES, PRESENT, SIZE, jax.random.key(2))
    scaled, mine = subset.fusion_scores(SCORES), subset.of(SCORES)
    np.testing.assert_allclose(scaled.sum(axis=-1), SCORES.sum(axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(scaled, axis=-1), np.argsort(mine, axis=-1))
    gradient = jax.grad(lambda scores: jnp.sum(subset.fusion_scores(scores) ** 2))(jnp.zeros_like(SCORES))
    assert np.isfinite(gradient).all()


MODEL = dataclasses.replace(tiny.MODEL, adapter=SoftPrompts(4, 4, stddev=0.5))
TWO_OF_FOUR = dataclasses.replace(LM_ALONE, prompts_per_step=2)


def flat_gradient(gradients) -> np.ndarray:
    return np.asarray(gradients["bank"]["prompts"], np.float64).reshape(-1)


@pytest.fixture(scope="module")
def whole():
    """The LM loss under all prompts and its gradient with respect to the bank."""
    losses, gradients = tiny.STEP(
        MODEL, LM_ALONE, tiny.params(), tiny.trainable(MODEL), tiny.packed("dialogue").batch()
    )
    return losses, flat_gradient(gradients)


def test_the_mean_over_all_subsets_is_the_full_loss_and_the_full_gradient(monkeypatch, whole):
    """Rows add up, so that drawing the j-th of the others in every row, for each j, is every case once."""
    batch, trainable = tiny.packed("dialogue").batch(), tiny.trainable(MODEL)
    favourite = np.einsum("dnk,dn->dk", whole[0].scores, batch["turn_mask"]).argmax(axis=-1)
    others = np.stack([[k for k in range(4) if k != f] for f in favourite])

    @jax.jit
    def under(prompts):
        subset = Subset(prompts, jnp.broadcast_to(jnp.asarray([1.0, 3.0]), prompts.shape))
        monkeypatch.setattr(objective_module, "draw_subset", lambda *_: subset)
        return losses_and_gradients(MODEL, TWO_OF_FOUR, tiny.params(), trainable, batch)

    found = [under(jnp.asarray(np.stack([favourite, others[:, j]], axis=1))) for j in range(3)]
    assert np.mean([losses.total for losses, _ in found]) == pytest.approx(float(whole[0].total), rel=1e-5)
    mean = np.mean([flat_gradient(gradients) for _, gradients in found], axis=0)
    assert tiny.relative_difference(mean, whole[1]) <= 2e-5
    assert tiny.relative_difference(flat_gradient(found[0][1]), whole[1]) > 1e-2


@pytest.mark.parametrize("fusion", [0.0, 0.9], ids=["gradients", "fusion"])
def test_what_is_learned_of_a_subset_is_what_a_bank_of_its_prompts_learns(monkeypatch, fusion):
    """But for the contrastive loss, of all prompts, and the sum of the scores with which logits are mixed."""
    pair, batch, tree = jnp.asarray([2, 0]), tiny.packed("dialogue").batch(), tiny.trainable(MODEL)
    objective = Objective(0.7, 0.4 if fusion else 0.0, fusion, gold_temperature=0.8, score_temperature=0.6)
    rows = len(batch["tokens"])
    subset = Subset(jnp.broadcast_to(pair, (rows, 2)), jnp.full((rows, 2), 2.0))

    def run(model, objective, tree):
        return jax.jit(lambda tree: losses_and_gradients(model, objective, tiny.params(), tree, batch))(tree)

    with monkeypatch.context() as fixed:
        fixed.setattr(objective_module, "draw_subset", lambda *_: subset)
        found, gradients = run(MODEL, dataclasses.replace(objective, prompts_per_step=2), tree)
    everything, _ = tiny.STEP(MODEL, objective, tiny.params(), tree, batch, 1)
    small = tree | {"bank": {"prompts": tree["bank"]["prompts"][pair]}}
    mine = subset.of(found.scores)
    mixed = mock.Mock(return_value=mine * (found.scores.sum(-1, keepdims=True) / mine.sum(-1, keepdims=True)))
    monkeypatch.setattr(Subset, "fusion_scores", mixed)
    expected, theirs = run(dataclasses.replace(MODEL, adapter=SoftPrompts(2, 4)), objective, small)
    mixed.assert_called_once()
    for name in ("lm", "selection", "fusion", "nll"):
        assert tiny.relative_difference(getattr(found, name), getattr(expected, name)) <= 1e-5, name
    assert float(found.selection) > 1e-4
    if fusion:
        assert float(found.contrastive) == pytest.approx(float(everything.contrastive), rel=1e-6)
        assert float(found.fusion) > 1.0 and abs(float(found.fusion) - float(everything.fusion)) > 1e-3
    else:
        bank = np.asarray(gradients["bank"]["prompts"])
        assert (bank[[1, 3]] == 0).all()
        assert tiny.relative_difference(bank[pair], theirs["bank"]["prompts"]) <= 1e-5
        assert tiny.relative_difference(gradients["retriever"], theirs["retriever"]) <= 1e-5


def test_random_subsets_estimate_the_full_loss_without_bias(whole):
    batch, losses = tiny.packed("dialogue").batch(), whole[0]
    keys = jax.random.split(jax.random.key(1), DRAWS)
    drawn = jax.vmap(lambda key: draw_subset(losses.scores, batch["turn_mask"], 2, key))(keys)
    tokens = np.asarray(target_turn_onehot(batch).sum(axis=1))
    per_prompt = np.einsum("dnk,dn->dk", losses.nll, tokens) / (tokens.sum() * 4)
    assert per_prompt.sum() == pytest.approx(float(losses.lm), rel=1e-5)
    chosen = np.take_along_axis(np.broadcast_to(per_prompt, (DRAWS, *per_prompt.shape)), np.asarray(drawn.prompts), 2)
    estimates = (chosen * drawn.inverse_chances).sum(axis=(1, 2))
    error = estimates.std(ddof=1) / np.sqrt(DRAWS)
    assert 0 < abs(estimates.mean() - float(losses.lm)) < 4 * error


@pytest.mark.campaign
def test_random_steps_estimate_the_full_loss_and_gradient_without_bias_and_repeat_themselves(whole):
    batch, trainable = tiny.packed("dialogue").batch(), tiny.trainable(MODEL)
    found = [
        tiny.STEP(MODEL, TWO_OF_FOUR, tiny.params(), trainable, batch, 1, jax.random.key(seed)) for seed in range(80)
    ]
    again = tiny.STEP(MODEL, TWO_OF_FOUR, tiny.params(), trainable, batch, 1, jax.random.key(7))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, found[7]))
    directions = np.random.default_rng(0).standard_normal((4, whole[1].size))
    samples = np.stack([[float(losses.total), *(directions @ flat_gradient(g))] for losses, g in found])
    expected = np.array([float(whole[0].total), *(directions @ whole[1])])
    errors = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert (errors > 0).all()
    assert (np.abs(samples.mean(axis=0) - expected) < 4 * errors).all()


def lowered(num_prompts: int, size: int) -> Any:
    model = SelectiveLM(tiny.CONFIG, SoftPrompts(num_prompts, 4), tiny.MODEL.retriever_config, max_logit_rows=10**6)
    objective = dataclasses.replace(Objective(), prompts_per_step=size)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    batch = tiny.packed("dialogue").batch()
    return tiny.STEP.lower(model, objective, tiny.params(), tree, batch, 1, jax.random.key(0))


def test_two_of_eight_prompts_cost_what_two_cost():
    flops = {sizes: lowered(*sizes).cost_analysis()["flops"] for sizes in ((8, 2), (2, 0), (8, 0))}
    assert flops[8, 2] == pytest.approx(flops[2, 0], rel=0.03)
    assert flops[8, 2] < 0.3 * flops[8, 0]


def test_all_of_the_prompts_are_the_same_program_as_no_subset():
    assert lowered(3, 3).as_text() == lowered(3, 0).as_text()


@pytest.mark.parametrize(("num_prompts", "size"), [(4, 1), (4, 5), (1, 2)])
def test_a_size_that_estimates_nothing_is_refused(num_prompts, size):
    config = default_config()
    config.bank.num_prompts, config.objective.prompts_per_step = num_prompts, size
    with pytest.raises(
        UserError, match=rf"prompts_per_step is {size}; allowed: 0 for all, or 2 up to .*\({num_prompts}\)"
    ):
        validate(config)


@pytest.mark.parametrize(("num_prompts", "size"), [(4, 0), (4, 2), (4, 4), (1, 1), (1, 0)])
def test_a_size_of_two_or_more_is_allowed(num_prompts, size):
    config = default_config()
    config.bank.num_prompts, config.objective.prompts_per_step = num_prompts, size
    validate(config)


def test_no_sum_over_scores_is_rounded_to_bfloat16():
    unpaired = Objective(contrastive_weight=0.0)
    summed = {
        "subset": lambda s: draw_subset(s, PRESENT, SIZE, jax.random.key(0)),
        "mixture": lambda s: mixed_prompts(jnp.ones((K, 2, 3)), s[0], 1.0),
        "usage": lambda s: objective_module._over_turns(unpaired, s, s, {"turn_mask": PRESENT}, Subset(), None),
    }
    for name, compute in summed.items():
        program = jax.jit(compute).lower(SCORES).as_text()
        products = [line for line in program.splitlines() if "dot_general" in line]
        assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products), name
