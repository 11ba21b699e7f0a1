"""The optimizer against closed forms."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.config import default_config
from spt_jax.training.optimizer import learning_rate_schedule, make_optimizer

PEAK = 0.25


def section(**changes: Any) -> Any:
    config = default_config().optimizer
    config.learning_rate = PEAK
    config.clip_norm = 0.0
    for name, value in changes.items():
        config[name] = value
    return config


def rates(total: int, **changes: Any) -> list[float]:
    schedule = learning_rate_schedule(section(**changes), total)
    return [float(schedule(step)) for step in range(total + 3)]


def test_constant_is_constant():
    assert rates(5) == [PEAK] * 8


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_the_warm_up_is_a_line_from_its_first_step_to_the_peak(warmup):
    expected = [PEAK * min(1.0, (step + 1) / warmup) for step in range(11)]
    assert rates(8, warmup_steps=warmup) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (0, 0.1), (4, 0.1), (3, 1.0)])
def test_the_cosine_falls_from_the_peak_after_the_warm_up_to_its_fraction_at_the_end(warmup, final):
    total = 20
    found = rates(total, schedule="cosine", warmup_steps=warmup, final_fraction=final)
    for step in range(warmup, total + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert found[step] == pytest.approx(PEAK * (final + (1 - final) * cosine), rel=1e-5, abs=1e-8)
    assert found[total:] == pytest.approx([PEAK * final] * 3, abs=1e-7)


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak():
    found = rates(4, schedule="cosine", warmup_steps=10)
    assert found[:4] == pytest.approx([PEAK * (step + 1) / 10 for step in range(4)], rel=1e-6)


def tree(scale: float = 1.0) -> Any:
    values = np.linspace(-1, 2, 6, dtype=np.float32).reshape(1, 2, 3)
    return {"bank": {"prompts": jnp.asarray(scale * values)}, "retriever": {"lin": {"kernel": jnp.asarray(values[0])}}}


def moves(gradients: list[Any], start: Any = None, **changes: Any) -> list[Any]:
    """The updates of successive steps."""
    optimizer = make_optimizer(section(**changes), 10)
    position = start if start is not None else tree(0.0)
    state = optimizer.init(position)
    found = []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, position)
        position = jax.tree.map(jnp.add, position, update)
        found.append(jax.device_get(update))
    return found


def test_adamw_takes_the_steps_of_its_definition():
    gradients = [tree(1.0), tree(-3.0), tree(0.5)]
    b1, b2, eps, decay = 0.8, 0.95, 1e-3, 0.1
    position = np.asarray(tree(2.0)["bank"]["prompts"], np.float64)
    found = moves(gradients, tree(2.0), b1=b1, b2=b2, eps=eps, weight_decay=decay)
    first = second = np.zeros_like(position)
    for number, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient["bank"]["prompts"], np.float64)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        step = (first / (1 - b1**number)) / (np.sqrt(second / (1 - b2**number)) + eps)
        expected = -PEAK * (step + decay * position)
        np.testing.assert_allclose(found[number - 1]["bank"]["prompts"], expected, rtol=1e-5, atol=1e-7)
        position = position + expected


@pytest.mark.parametrize("factor", [0.0, 0.05, 3.0])
def test_the_retriever_moves_at_its_own_rate(factor):
    gradients = [tree(1.0), tree(-2.0)]
    plain = moves(gradients, tree(1.0), weight_decay=0.1, warmup_steps=2)
    scaled = moves(gradients, tree(1.0), weight_decay=0.1, warmup_steps=2, retriever_factor=factor)
    np.testing.assert_array_equal(scaled[0]["bank"]["prompts"], plain[0]["bank"]["prompts"])
    first = factor * plain[0]["retriever"]["lin"]["kernel"]
    np.testing.assert_allclose(scaled[0]["retriever"]["lin"]["kernel"], first, rtol=1e-6)
    assert np.abs(plain[0]["retriever"]["lin"]["kernel"]).max() > 0.1


def test_clipping_scales_the_whole_gradient_to_the_norm():
    # A first step of AdamW is the gradient's sign unless ε is large; then it shows the gradient's size.
    gradient = tree(10.0)
    norm = math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(gradient)))
    eps = 1e3
    clipped = moves([gradient], clip_norm=0.5, eps=eps)[0]
    by_hand = moves([jax.tree.map(lambda x: x * 0.5 / norm, gradient)], eps=eps)[0]
    whole = moves([gradient], eps=eps)[0]
    generous = moves([gradient], clip_norm=2 * norm, eps=eps)[0]
    for name in ("bank", "retriever"):
        a, b, c, d = (jax.tree.leaves(x[name])[0] for x in (clipped, by_hand, whole, generous))
        np.testing.assert_allclose(a, b, rtol=1e-5)
        np.testing.assert_array_equal(c, d)
        assert np.abs(c).max() > 5 * np.abs(a).max()


def test_the_state_does_not_depend_on_values_so_it_can_be_restored():
    optimizer = make_optimizer(section(retriever_factor=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=3), 10)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), optimizer.init(tree()))
    _, after = optimizer.update(tree(3.0), optimizer.init(tree()), tree())
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), after)
