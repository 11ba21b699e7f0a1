"""Diagnostics of the selection are what their definitions say."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.evaluation import nearest_tokens as nearest_tokens_module
from spt_jax.evaluation.likelihood import Likelihoods
from spt_jax.evaluation.nearest_tokens import nearest_tokens
from spt_jax.evaluation.selection import (
    SELECTION_DEFINITIONS,
    persona_table,
    retriever_map,
    selection_figures,
)
from spt_jax.models.decoder import embed
from spt_jax.prompting.retriever import RetrieverConfig, cosine_similarity, softplus_score
from spt_jax.prompting.selective_lm import batch_scores, retriever_vectors


def likelihoods(nll, scores, tokens=None, dialogue=None) -> Likelihoods:
    nll = np.asarray(nll, np.float32)
    turns = len(nll)
    return Likelihoods(
        np.zeros(turns, np.int64) if dialogue is None else np.asarray(dialogue),
        np.arange(turns),
        np.ones(turns, np.int64) if tokens is None else np.asarray(tokens),
        nll,
        np.asarray(scores, np.float32),
    )


def test_figures_of_a_selection_worked_out_by_hand():
    found = selection_figures(
        # The first turn selects the best prompt, the second the worst, the third, a tie, the lowest.
        likelihoods([[1, 2, 4], [3, 2, 2.5], [1, 1, 1]], [[2, 1, 0], [5, 0, 0], [0, 0, 0]], tokens=[1, 2, 1]),
        score_temperature=2.0,
    )
    assert set(found) == set(SELECTION_DEFINITIONS)
    assert found["usage_entropy"] == 0.0
    assert found["effective_prompts"] == 1.0
    assert found["regret"] == pytest.approx((0 + 2 * 1 + 0) / 4)
    assert found["regret_of_chance"] == pytest.approx((4 / 3 + 2 * 0.5 + 0) / 4)
    assert found["regret_of_one"] == pytest.approx(min(2 * 1, 1 + 0, 3 + 2 * 0.5) / 4)
    assert found["oracle_agreement"] == pytest.approx(200 / 3)
    first, second = np.exp([1, 0.5, 0]), np.exp([2.5, 0, 0])
    entropies = [-sum(p * math.log(p) for p in x / x.sum()) for x in (first, second)]
    assert found["score_entropy"] == pytest.approx((sum(entropies) + math.log(3)) / 3)


def test_prompts_in_equal_use_count_in_full():
    found = selection_figures(likelihoods(np.zeros((8, 4)), np.tile(np.eye(4), (2, 1))), 1.0)
    assert found["effective_prompts"] == pytest.approx(4.0)
    assert found["usage_entropy"] == pytest.approx(math.log(4))
    assert found["regret"] == 0.0
    assert found["oracle_agreement"] == 25.0  # of equal prompts the lowest is the oracle's


def test_personas_gather_their_dialogues_whatever_the_order_of_their_lines():
    found = persona_table(
        likelihoods([[1, 3], [2, 4], [5, 6], [9, 1]], [[1, 0], [0, 1], [1, 0], [0, 1]], [1, 3, 1, 2], [0, 1, 1, 2]),
        [("i sail", "i run"), ("i run", "i sail"), ("i cook",)],
    )
    assert found.personas == [("i sail", "i run"), ("i cook",)]
    np.testing.assert_allclose(found.nll, [[(1 + 6 + 5) / 5, 9], [(3 + 12 + 6) / 5, 1]])
    np.testing.assert_allclose(found.usage, [[2 / 3, 0], [1 / 3, 1]])
    assert found.turns.tolist() == [3, 1]


def test_the_map_keeps_distances_of_directions_that_lie_in_a_plane():
    angles = np.array([0.1, 0.4, 1.3, 2.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    flat = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    contexts = np.array([3.0, 0.5, 1.0, 7.0])[:, None] * (flat @ rotation[:2])
    prompts = np.array([[0.0, 2.0]]) @ rotation[:2]
    found = retriever_map(contexts, prompts)
    between = np.linalg.norm(found.contexts[:, None] - found.contexts[None], axis=-1)
    np.testing.assert_allclose(between, np.linalg.norm(flat[:, None] - flat[None], axis=-1), atol=1e-12)
    to_prompt = np.linalg.norm(found.contexts - found.prompts, axis=1)
    np.testing.assert_allclose(to_prompt, np.linalg.norm(flat - [0.0, 1.0], axis=1), atol=1e-12)
    assert found.explained.sum() == pytest.approx(1.0)
    assert found.explained[0] >= found.explained[1]


@pytest.mark.parametrize("contexts", [np.ones((1, 3)), np.ones((5, 3)), np.zeros((4, 3))])
def test_a_map_without_differences_is_finite(contexts):
    found = retriever_map(contexts, np.eye(3)[:2])
    assert all(np.isfinite(x).all() for x in found)
    assert found.contexts.shape == (len(contexts), 2)


@pytest.mark.parametrize("kind", ["linear", "transformer"])
def test_vectors_are_what_the_scores_compare(kind):
    model = dataclasses.replace(tiny.MODEL, retriever_config=RetrieverConfig(kind=kind, feed_forward=16))
    trainable, batch = tiny.trainable(model), tiny.packed("dialogue").batch()
    compiled = functools.partial(jax.jit, static_argnums=0)
    contexts, prompts = compiled(retriever_vectors)(model, tiny.params(), trainable, batch)
    scores = softplus_score(cosine_similarity(contexts, prompts))
    np.testing.assert_allclose(scores, compiled(batch_scores)(model, tiny.params(), trainable, batch), rtol=1e-5)


@pytest.fixture(params=[4096, 17])
def _chunks_of(request, monkeypatch):
    """So many tokens at a time; no program that was traced with another number serves, here or later."""
    monkeypatch.setattr(nearest_tokens_module, "_CHUNK", request.param)
    nearest_tokens_module._merged.clear_cache()
    yield
    nearest_tokens_module._merged.clear_cache()


@pytest.mark.usefixtures("_chunks_of")
@pytest.mark.parametrize("last", [None, 40])
def test_nearest_tokens_are_those_of_the_whole_table(last):
    prompts = jax.random.normal(jax.random.key(3), (2, 3, tiny.CONFIG.hidden_size))
    prompts = prompts.at[1, 2].set(7.0 * embed(tiny.CONFIG, tiny.params(), jnp.asarray([5]))[0])
    found = nearest_tokens(tiny.CONFIG, tiny.params(), prompts, count=4, vocab_size=last)
    table = np.asarray(embed(tiny.CONFIG, tiny.params(), jnp.arange(last or tiny.CONFIG.vocab_size)), np.float64)
    virtual = np.asarray(prompts, np.float64)
    cosines = np.einsum("kpm,vm->kpv", virtual, table) / (
        np.linalg.norm(virtual, axis=-1)[..., None] * np.linalg.norm(table, axis=-1)
    )
    np.testing.assert_array_equal(found.ids, np.argsort(-cosines, axis=-1)[..., :4])
    np.testing.assert_allclose(found.cosines, -np.sort(-cosines, axis=-1)[..., :4], rtol=1e-5, atol=1e-6)
    assert found.ids[1, 2, 0] == 5
    assert found.cosines[1, 2, 0] == pytest.approx(1.0)
