"""Attention is the softmax over what the mask shows, in blocks or at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.attention import QUERY_BLOCK, attention, causal_mask

DIM, SCALE = 8, 0.3
LONG = 4 * QUERY_BLOCK + 5


def plain(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray, softcap: float | None) -> np.ndarray:
    """Attention head by head in float64."""
    out = np.zeros(query.shape)
    repeats = query.shape[2] // key.shape[2]
    for head in range(query.shape[2]):
        q, k, v = query[:, :, head], key[:, :, head // repeats], value[:, :, head // repeats]
        products = np.einsum("btd,bcd->btc", q, k) * SCALE
        products = products if softcap is None else softcap * np.tanh(products / softcap)
        weights = np.where(mask[:, 0], np.exp(products - products.max(axis=-1, keepdims=True)), 0.0)
        out[:, :, head] = np.einsum("btc,bcd->btd", weights / weights.sum(axis=-1, keepdims=True).clip(1e-300), v)
    return out


def row(length: int, heads: int, groups: int, padding: str) -> tuple[list[Any], Any, np.ndarray]:
    """Queries, keys and values of two rows of unequal length; their mask within a window of 150; the real places."""
    rng = np.random.default_rng(length)
    arrays = [rng.standard_normal((2, length, count, DIM)) for count in (heads, groups, groups)]
    real = np.arange(length) < np.array([[length], [max(1, length - 9)]])
    positions = np.tile(np.arange(length), (2, 1))
    if padding == "left":
        real = real[:, ::-1]
        positions = np.maximum(positions - (~real).sum(axis=1, keepdims=True), 0)
    places = jnp.asarray(positions)
    return arrays, np.asarray(causal_mask(places, places, jnp.asarray(real), 150)), real


def in_float32(arrays: list[Any]) -> list[Any]:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("length", [1, QUERY_BLOCK, 2 * QUERY_BLOCK, LONG])
def test_attention_in_blocks_is_attention(length, heads, groups, padding, softcap):
    arrays, mask, real = row(length, heads, groups, padding)
    wanted = plain(*arrays, mask, softcap)
    for ordered in (False, True):
        ours = attention(*in_float32(arrays), mask, scale=SCALE, softcap=softcap, ordered=ordered)
        np.testing.assert_allclose(np.asarray(ours)[real], wanted[real], rtol=2e-5, atol=2e-6)
        assert np.isfinite(ours).all()


def of_softmax(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    """Attention as a formula that jax differentiates by itself."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    products = jnp.einsum("bthd,bchd->bhtc", query, key) * SCALE
    products = products if softcap is None else softcap * jnp.tanh(products / softcap)
    weights = jax.nn.softmax(jnp.where(mask, products, -1e30), axis=-1)
    return jnp.einsum("bhtc,bchd->bthd", weights, value)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradients_are_those_of_the_softmax(padding, softcap, ordered):
    arrays, mask, real = row(LONG, 6, 2, padding)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape) * real[..., None, None])

    def ours(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(attention(*qkv, mask, scale=SCALE, softcap=softcap, ordered=ordered) * cotangent)

    def wanted(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(of_softmax(*qkv, mask, softcap) * cotangent)

    found, true = (jax.grad(f, argnums=(0, 1, 2))(*in_float32(arrays)) for f in (ours, wanted))
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_no_weights_are_kept_for_the_gradient():
    arrays, mask, _ = row(LONG, 4, 4, "right")
    kept = jax.eval_shape(lambda q, k, v: jax.vjp(lambda *x: attention(*x, mask), q, k, v)[1], *in_float32(arrays))
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= max(mask.size, arrays[0].size)


def test_in_bfloat16_the_softmax_is_float32():
    arrays, mask, real = row(LONG, 4, 2, "right")
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    ours = attention(*low, mask, scale=SCALE, ordered=True)
    assert ours.dtype == jnp.bfloat16
    wanted = plain(*(np.asarray(x, np.float64) for x in low), mask, None)
    np.testing.assert_allclose(np.asarray(ours, np.float64)[real], wanted[real], rtol=0, atol=2e-2)


def test_blocks_leave_out_what_the_mask_hides():
    arrays, mask, _ = row(LONG, 4, 4, "right")

    def flops(ordered: bool) -> float:
        compiled = jax.jit(lambda *qkv: attention(*qkv, mask, ordered=ordered)).lower(*in_float32(arrays)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(True) < 0.68 * flops(False)


def test_no_mask_means_causal():
    arrays, _, _ = row(LONG, 6, 2, "right")
    mask = np.tril(np.ones((LONG, LONG), bool))[None, None]
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal(arrays[0].shape), jnp.float32)

    def of(mask: Any) -> Any:
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, mask, scale=SCALE, ordered=True), *in_float32(arrays))
        return out, *vjp(cotangent)

    for found, wanted in zip(of(None), of(jnp.asarray(mask)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("heads", "groups", "dim"), [(9, 3, 64), (8, 8, 80), (8, 8, 128)])
def test_cudnn_attention_is_xlas(heads, groups, dim):
    if jax.devices()[0].platform != "gpu":
        pytest.skip("needs an NVIDIA GPU: JAX_PLATFORMS=cuda pytest tests/models/test_attention.py -k cudnn")
    keys = jax.random.split(jax.random.key(dim), 4)
    counts = (heads, groups, groups, heads)
    q, k, v, cotangent = (
        jax.random.normal(key, (4, 288, n, dim), jnp.bfloat16) for key, n in zip(keys, counts, strict=True)
    )

    def of(kernel: str) -> Any:
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, None, kernel=kernel), q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *vjp(cotangent))]

    differences = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(of("cudnn"), of("xla"), strict=True)]
    print(differences)
    assert np.max(differences) <= 2e-2
