from __future__ import annotations

import jax
import numpy as np
import tiny

from spt_jax.prompting.p_tuning import PromptEncoder

P, M, WIDTH = 6, 40, 24
ENCODER = PromptEncoder(P, M, WIDTH)


def test_the_prompt_is_the_mlp_of_each_virtual_token():
    params = ENCODER.init(jax.random.key(0))["params"]
    x = np.asarray(params["embedding"])
    for i in range(3):
        layer = params[f"lin_{i}"]
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = np.maximum(x, 0) if i < 2 else x
    made = ENCODER.apply({"params": params})
    assert made.shape == (1, P, M)
    assert made.dtype == np.float32
    assert tiny.relative_difference(made[0], x) <= 1e-5


def test_parameters_have_their_names_shapes_and_start():
    params = PromptEncoder(200, M, WIDTH).init(jax.random.key(0))["params"]
    assert jax.tree.map(np.shape, params) == {
        "embedding": (200, M),
        "lin_0": {"kernel": (M, WIDTH), "bias": (WIDTH,)},
        "lin_1": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},
        "lin_2": {"kernel": (WIDTH, M), "bias": (M,)},
    }
    assert abs(np.asarray(params["embedding"]).std() - 1) < 0.03
    for name, inputs in {"lin_0": M, "lin_1": WIDTH, "lin_2": WIDTH}.items():
        bound = inputs**-0.5
        assert 0.98 * bound < np.abs(params[name]["kernel"]).max() <= bound
        assert np.abs(params[name]["bias"]).max() <= bound
        assert np.asarray(params[name]["bias"]).any()


def test_virtual_tokens_share_the_mlp_and_every_parameter_learns():
    params = ENCODER.init(jax.random.key(0))["params"]
    permuted = {**params, "embedding": params["embedding"][::-1]}
    ours, reversed_ = (np.asarray(ENCODER.apply({"params": p})) for p in (params, permuted))
    assert tiny.relative_difference(reversed_, ours[:, ::-1]) <= 1e-6
    gradients = jax.grad(lambda p: (ENCODER.apply({"params": p}) ** 2).sum())(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
