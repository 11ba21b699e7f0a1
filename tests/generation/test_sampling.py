from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_jax.errors import UserError
from spt_jax.generation.sampling import Greedy, Temperature, Within, sampling_rule

DRAWS = 6000
# 99.99 % quantile of chi-square with 9 degrees of freedom.
CRITICAL = 33.7
LOGITS = np.array([2.0, -1.0, 0.5, 1.2, 0.0, -0.3, 1.9, 0.7, -2.0, 0.1], np.float32)


def frequencies(rule: Temperature, logits: np.ndarray, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    ids = rule.choose(jnp.broadcast_to(logits, (DRAWS, len(logits))), keys)
    return np.bincount(np.asarray(ids), minlength=len(logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    possible = probabilities > 0
    assert counts[~possible].sum() == 0, "a token outside the support was drawn"
    expected = probabilities[possible] * counts.sum()
    return float((((counts[possible] - expected) ** 2) / expected).sum())


def head(logits: np.ndarray, rule: Temperature) -> np.ndarray:
    """The distribution a rule means, token by token."""
    probabilities = softmax(logits / rule.temperature)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if rule.top_k:
        order = order[: rule.top_k]
    total = probabilities[order].sum()
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= rule.top_p:
            break
        kept.append(token)
        mass += probabilities[token] / total
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


@pytest.mark.parametrize(
    "rule",
    [
        Temperature(),
        Temperature(0.5),
        Temperature(2.0),
        Temperature(1.0, top_k=4),
        Temperature(1.0, top_p=0.8),
        Temperature(0.7, top_k=6, top_p=0.9),
    ],
)
def test_frequencies_follow_the_distribution(rule):
    assert chi_square(frequencies(rule, LOGITS), head(LOGITS, rule)) < CRITICAL


def test_the_chi_square_would_notice_a_wrong_temperature():
    assert chi_square(frequencies(Temperature(1.0), LOGITS), head(LOGITS, Temperature(1.2))) > CRITICAL


@settings(max_examples=25, deadline=None)
@given(
    logits=st.lists(st.integers(-30, 30), min_size=12, max_size=12),
    top_k=st.sampled_from([0, 1, 2, 5, 12, 40]),
    top_p=st.sampled_from([1e-6, 0.313, 0.771, 0.957, 1.0]),
)
def test_draws_stay_inside_the_kept_head(logits, top_k, top_p):
    row = np.asarray(logits, np.float32) / 10
    rule = Temperature(1.0, top_k, top_p)
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = set(np.asarray(rule.choose(jnp.broadcast_to(row, (200, 12)), keys)).tolist())
    assert drawn <= set(np.flatnonzero(head(row, rule)).tolist())


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = jax.random.normal(jax.random.key(0), (64, 40))
    keys = jax.random.split(jax.random.key(1), 64)
    greedy = Greedy().choose(logits, keys)
    for rule in (Temperature(1.0, top_k=1), Temperature(1.0, top_p=1e-9), Temperature(1e-4)):
        np.testing.assert_array_equal(rule.choose(logits, keys), greedy)


def test_equal_logits_go_by_the_lowest_id():
    logits = jnp.zeros((50, 9))
    keys = jax.random.split(jax.random.key(1), 50)
    assert set(Greedy().choose(logits, keys).tolist()) == {0}
    assert set(Temperature(1.0, top_k=3).choose(logits, keys).tolist()) == {0, 1, 2}


def test_a_row_draws_by_its_own_key_whatever_its_neighbours():
    logits = jax.random.normal(jax.random.key(0), (8, 30))
    keys = jax.random.split(jax.random.key(1), 8)
    rule = Temperature(1.0, top_k=20, top_p=0.9)
    together = rule.choose(logits, keys)
    for row in range(8):
        assert rule.choose(logits[row : row + 1], keys[row : row + 1])[0] == together[row]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-0.5,), "temperature is -0.5"),
        ((float("nan"),), "temperature is nan"),
        ((float("inf"),), "temperature is inf"),
        ((1.0, -1), "top_k is -1"),
        ((1.0, 0, 0.0), "top_p is 0.0"),
        ((1.0, 0, 1.5), "top_p is 1.5"),
        ((0.0, 5), "temperature is 0"),
        ((0.0, 0, 0.5), "temperature is 0"),
    ],
)
def test_values_outside_their_range_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        sampling_rule(*arguments)


def test_temperature_zero_is_greedy():
    assert sampling_rule(0.0) == Greedy()
    assert sampling_rule(0.7, 5, 0.9) == Temperature(0.7, 5, 0.9)


@pytest.mark.parametrize("rule", [Greedy(), Temperature(1.0), Temperature(0.7, top_k=3)])
def test_a_rule_within_a_vocabulary_is_the_rule_on_its_first_logits(rule) -> None:
    logits = jnp.broadcast_to(LOGITS, (200, len(LOGITS)))[:, ::-1] + 5.0 * jnp.arange(len(LOGITS))
    keys = jax.random.split(jax.random.key(3), 200)
    assert rule.choose(logits, keys).max() > 5
    chosen = Within(rule, 6).choose(logits, keys)
    np.testing.assert_array_equal(chosen, rule.choose(logits[:, :6], keys))
