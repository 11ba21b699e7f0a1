from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spt_jax.generation.decoding import Decoding
from spt_jax.generation.warpers import MinP, Temperature, TopK, TopP, Typical, Warper

DRAWS = 6000
LOGITS = np.array([2.0, -1.0, 0.5, 1.2, 0.0, -0.3, 1.9, 0.7, -2.0, 0.1], np.float32)
LEAST_P = 1e-4


def draw(decoding: Decoding, logits: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    return np.asarray(decoding.rule([]).choose(rows, jnp.zeros((draws, 1), jnp.int32), jnp.int32(0), keys))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(np.asarray(logits, np.float64) - logits.max())
    return exponentials / exponentials.sum()


def left(distances: np.ndarray, p: np.ndarray, mass: float) -> np.ndarray:
    """What stays of a distribution, in the words of the papers: the nearest tokens until they hold `mass`."""
    kept = np.zeros(len(p), bool)
    for token in sorted(range(len(p)), key=lambda token: distances[token]):
        if p[distances < distances[token]].sum() < mass:
            kept[token] = True
    return np.where(kept, p, 0) / p[kept].sum()


def meant(logits: np.ndarray, decoding: Decoding) -> np.ndarray:
    """The distribution that the options mean, token by token."""
    p = softmax(logits / decoding.temperature)
    if decoding.top_k:
        p = np.where(p >= np.sort(p)[-min(decoding.top_k, len(p))], p, 0)
        p = p / p.sum()
    if decoding.top_p < 1:
        p = left(-p, p, decoding.top_p)
    if decoding.min_p:
        p = np.where(p >= decoding.min_p * p.max(), p, 0)
        p = p / p.sum()
    if decoding.typical_p < 1:
        surprise = -np.log(p, where=p > 0, out=np.full(len(p), -np.inf))
        p = left(np.abs(surprise - (p[p > 0] * surprise[p > 0]).sum()), p, decoding.typical_p)
    return p


def p_value(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    counts = np.bincount(drawn, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0, "a token outside the support was drawn"
    return float(stats.chisquare(counts[possible], probabilities[possible] * len(drawn)).pvalue)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "typical_p": 0.6},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.95, "min_p": 0.15, "typical_p": 0.9},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(options):
    decoding = Decoding(**options)
    found = p_value(draw(decoding, LOGITS), meant(LOGITS, decoding))
    print(f"\nchi-square p = {found:.3f}")
    assert found > LEAST_P


def test_the_chi_square_would_notice_a_wrong_temperature():
    assert p_value(draw(Decoding(1.0), LOGITS), meant(LOGITS, Decoding(1.2))) < LEAST_P


@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.integers(-30, 30), min_size=12, max_size=12),
    warper=st.sampled_from(["top_k", "top_p", "min_p", "typical_p"]),
    share=st.sampled_from([1e-6, 0.1713, 0.313, 0.771, 0.957]),
)
def test_what_is_left_is_what_the_papers_say_ties_together(logits, warper, share):
    row = np.asarray(logits, np.float32) / 10
    value = int(share * 12) + 1 if warper == "top_k" else share
    decoding = Decoding(temperature=1.0, **{warper: value})
    [kept] = decoding.rule([]).warpers
    left_over = np.asarray(jax.jit(kept.warp)(jnp.asarray(row)[None]))[0]
    np.testing.assert_array_equal(np.isfinite(left_over), meant(row, decoding) > 0)
    np.testing.assert_array_equal(left_over[np.isfinite(left_over)], row[np.isfinite(left_over)])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("warper", "theirs", "value"),
    [
        (Temperature(0.6), "TemperatureLogitsWarper", 0.6),
        (TopK(7), "TopKLogitsWarper", 7),
        (TopK(500), "TopKLogitsWarper", 500),
        (TopP(0.35), "TopPLogitsWarper", 0.35),
        (TopP(0.9), "TopPLogitsWarper", 0.9),
        (MinP(0.05), "MinPLogitsWarper", 0.05),
        (Typical(0.2), "TypicalLogitsWarper", 0.2),
        (Typical(0.9), "TypicalLogitsWarper", 0.9),
    ],
    ids=repr,
)
def test_a_warper_does_what_transformers_warper_of_that_name_does(warper: Warper, theirs: str, value: float):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    rows = np.random.default_rng(0).normal(0, 2, (50, 90)).astype(np.float32)
    rows[:, :5] = -np.inf  # what an earlier warper dropped
    expected = getattr(logits_process, theirs)(value)(torch.zeros((50, 1), dtype=torch.long), torch.tensor(rows))
    np.testing.assert_allclose(warper.warp(jnp.asarray(rows)), expected.numpy(), rtol=1e-6)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = np.asarray(jax.random.normal(jax.random.key(0), (40,)))
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert set(draw(Decoding(1.0, **cut), logits, 50)) == {logits.argmax()}


def test_equal_logits_share_their_fate():
    assert set(draw(Decoding(), np.zeros(9, np.float32), 50)) == {0}, "greedy: the lowest id"
    assert set(draw(Decoding(1.0, top_k=3), np.zeros(9, np.float32), 300)) == set(range(9))
    order = np.random.default_rng(1).permutation(10)
    for warper in (TopK(4), TopP(0.7), MinP(0.3), Typical(0.5)):
        shuffled = warper.warp(jnp.asarray(LOGITS[order])[None])
        np.testing.assert_array_equal(shuffled, warper.warp(jnp.asarray(LOGITS)[None])[:, order])


def test_zeros_of_either_sign_are_equal_logits_in_the_compiled_rule():
    """A compiler may leave out an addition of 0, after which -0.0 would lie apart from 0.0."""
    logits = jnp.asarray([[0.0, -0.0, -1.0, -2.0]])
    kept = jax.jit(TopK(1).warp)(logits)
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, False, False]])


def test_a_row_draws_by_its_own_key_whatever_its_neighbours():
    logits = jax.random.normal(jax.random.key(0), (8, 30))
    keys = jax.random.split(jax.random.key(1), 8)
    rule, history = Decoding(1.0, top_k=20, top_p=0.9).rule([]), jnp.zeros((8, 1), jnp.int32)
    together = rule.choose(logits, history, jnp.int32(0), keys)
    for row in range(8):
        one = slice(row, row + 1)
        assert rule.choose(logits[one], history[one], jnp.int32(0), keys[one])[0] == together[row]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}], ids=str)
def test_a_rule_within_a_vocabulary_is_the_rule_on_its_first_logits(options) -> None:
    logits = jnp.broadcast_to(LOGITS, (200, len(LOGITS)))[:, ::-1] + 5.0 * jnp.arange(len(LOGITS))
    arguments = jnp.zeros((200, 1), jnp.int32), jnp.int32(0), jax.random.split(jax.random.key(3), 200)
    decoding = Decoding(**options)
    assert decoding.rule([]).choose(logits, *arguments).max() > 5
    np.testing.assert_array_equal(
        decoding.rule([], 6).choose(logits, *arguments), decoding.rule([]).choose(logits[:, :6], *arguments)
    )
