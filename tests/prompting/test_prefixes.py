"""Laws of prefixes: they are a cache, so a prefix made of a text's keys and values is that text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.errors import UserError
from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig, LayerKind, Rope
from spt_jax.prompting.prefixes import PrefixEncoder, init_prefixes, prefix_cache, prefix_shape

P, T = 5, 9
TOKENS = jax.random.randint(jax.random.key(2), (2, P + T), 0, tiny.CONFIG.vocab_size)
CONFIGS: dict[str, DecoderConfig] = {
    "grouped queries": tiny.CONFIG,
    "a window shorter than the prefix": dataclasses.replace(tiny.CONFIG, layer_kinds=(LayerKind(Rope(), window=4),)),
    "kinds of layers: windows, NoPE, soft caps, norms of keys": dataclasses.replace(
        tiny.CONFIG,
        num_layers=3,
        layer_kinds=(LayerKind(Rope(), window=7), LayerKind(Rope(1e6)), LayerKind(None)),
        layer_pattern=(0, 1, 2),
        attention_softcap=3.0,
        query_key_norm="head",
        remat="full",
    ),
    "learned positions, scores scaled by layer": dataclasses.replace(
        tiny.CONFIG,
        position_embedding="learned",
        position_offset=2,
        layer_kinds=(LayerKind(None),),
        attention_scale_by_layer=True,
        norm="layer",
        qkv_bias=True,
    ),
}


PARAMS = functools.cache(tiny.params)


@functools.partial(jax.jit, static_argnums=0)
def run(config: Any, params: Any, tokens: jax.Array, start: int, valid: jax.Array, cache: KVCache | None) -> Any:
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = decode(config, params, embed(config, params, tokens), positions, valid, cache)
    return vocabulary_logits(config, params, hidden), cache


def prefixes_of(cache: KVCache, length: int) -> jax.Array:
    """The first slots of a cache, as prefixes ``[B, L, 2, P, G, head_dim]``."""
    return jnp.stack([cache.key, cache.value], axis=2)[:, :, :, :length].swapaxes(0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_keys_and_values_of_a_text_as_a_prefix_are_the_text(name):
    config = CONFIGS[name]
    params, valid = PARAMS(config), jnp.ones((2, P + T), bool)
    whole, filled = run(config, params, TOKENS, 0, valid, KVCache.empty(config, 2, P + T))
    cache = prefix_cache(config, prefixes_of(filled, P), P + T + 3)
    behind, after = run(config, params, TOKENS[:, P:], P, valid[:, P:], cache)
    assert tiny.relative_difference(behind, whole[:, P:]) <= 1e-5
    assert int(after.length) == P + T
    np.testing.assert_array_equal(after.valid.sum(axis=1), P + T)
    alone, _ = run(config, params, TOKENS[:, P:], P, valid[:, P:], None)
    assert tiny.relative_difference(alone, whole[:, P:]) > 1e-3, "the prefix must matter"


def test_a_window_counts_the_prefix_and_ends_it():
    """One layer that sees 4 positions: the first 3 tokens see ever less of the prefix, the others nothing of it."""
    config = dataclasses.replace(CONFIGS["a window shorter than the prefix"], num_layers=1)
    params, valid = PARAMS(config), jnp.ones((1, T), bool)

    def under(seed: int) -> np.ndarray:
        cache = prefix_cache(config, init_prefixes(config, jax.random.key(seed), 1, P), P + T)
        return np.asarray(run(config, params, TOKENS[:1, P:], P, valid, cache)[0][0])

    changed = np.abs(under(0) - under(1)).max(axis=-1)
    assert (changed[:3] > 1e-4).all()
    np.testing.assert_array_equal(changed[3:], 0)


def test_free_slots_and_padding_leave_no_trace():
    config, params = tiny.CONFIG, PARAMS(tiny.CONFIG)
    prefixes = init_prefixes(config, jax.random.key(0), 2, P)
    valid = jnp.arange(T) < jnp.array([[T], [4]])
    tight, _ = run(config, params, TOKENS[:, P:], P, valid, prefix_cache(config, prefixes, P + T))
    roomy, _ = run(config, params, TOKENS[:, P:], P, valid, prefix_cache(config, prefixes, P + T + 6))
    alone, _ = run(config, params, TOKENS[1:, P : P + 4], P, valid[1:, :4], prefix_cache(config, prefixes[1:], P + 4))
    assert tiny.relative_difference(np.asarray(roomy)[valid], np.asarray(tight)[valid]) <= 1e-5
    assert tiny.relative_difference(tight[1:, :4], alone) <= 1e-5


def test_a_prefix_of_no_tokens_is_the_lm():
    config, params, valid = tiny.CONFIG, PARAMS(tiny.CONFIG), jnp.ones((2, P + T), bool)
    cache = prefix_cache(config, jnp.zeros(prefix_shape(config, 2, 0)), P + T)
    whole, _ = run(config, params, TOKENS, 0, valid, None)
    assert tiny.relative_difference(run(config, params, TOKENS, 0, valid, cache)[0], whole) <= 1e-5


@pytest.mark.parametrize("name", ["grouped queries", "kinds of layers: windows, NoPE, soft caps, norms of keys"])
def test_gradients_reach_every_key_and_value_and_agree_with_finite_differences(name):
    config = CONFIGS[name]
    params, bank = PARAMS(config), init_prefixes(config, jax.random.key(0), 2, P)
    valid = jnp.ones((4, T), bool)
    tokens = jnp.repeat(TOKENS[:, P:], 2, axis=0)

    @jax.jit
    def loss(bank: jax.Array) -> jax.Array:
        cache = prefix_cache(config, jnp.tile(bank, (2, 1, 1, 1, 1, 1)), P + T)
        logits, _ = run(config, params, tokens, P, valid, cache)
        z = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(z, tokens[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))(bank)
    assert gradient.dtype == jnp.float32
    assert (np.abs(gradient).max(axis=(-1, -2)) > 0).all()
    direction = jax.random.normal(jax.random.key(1), bank.shape)
    slope = float(jnp.vdot(gradient, direction))
    measured = float(loss(bank + 1e-2 * direction) - loss(bank - 1e-2 * direction)) / 2e-2
    assert abs(measured - slope) <= 0.02 * abs(slope)


def test_a_bfloat16_lm_keeps_the_gradient_in_float32():
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    bank = init_prefixes(config, jax.random.key(0), 2, P)
    assert prefix_cache(config, bank, P).key.dtype == jnp.bfloat16
    gradient = jax.grad(lambda b: prefix_cache(config, b, P + 1).value.astype(jnp.float32).sum())(bank)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[:, :, 0], 0)
    np.testing.assert_array_equal(gradient[:, :, 1], 1)


def test_fresh_prefixes_are_standard_normal():
    bank = np.asarray(init_prefixes(tiny.CONFIG, jax.random.key(0), 4, 50))
    assert bank.shape == (4, 2, 2, 50, 2, 8)
    assert bank.dtype == np.float32
    assert abs(bank.mean()) < 0.03
    assert abs(bank.std() - 1) < 0.03


def test_the_encoder_reads_its_output_as_layers_of_keys_and_values():
    config, encoder = tiny.CONFIG, PrefixEncoder(tiny.CONFIG, P, 7, num_prefixes=3)
    params = encoder.init(jax.random.key(0))["params"]
    made = np.asarray(encoder.apply({"params": params}))
    assert made.shape == prefix_shape(config, 3, P)
    inner = np.tanh(np.asarray(params["embedding"]) @ params["lin_in"]["kernel"] + params["lin_in"]["bias"])
    flat = inner @ params["lin_out"]["kernel"] + params["lin_out"]["bias"]
    for layer in range(config.num_layers):
        for which in range(2):
            first = (2 * layer + which) * 16
            expected = flat[..., first : first + 16].reshape(3, P, 2, 8)
            assert tiny.relative_difference(made[:, layer, which], expected) <= 1e-5


@pytest.mark.parametrize(
    "shape", [(2, 3, 2, P, 2, 8), (2, 2, 1, P, 2, 8), (2, 2, 2, P, 4, 8), (2, 2, 2, P, 2, 4), (2, 2, 2, P, 16)]
)
def test_prefixes_of_another_lm_are_refused_with_both_shapes(shape):
    with pytest.raises(UserError) as told:
        prefix_cache(tiny.CONFIG, jnp.zeros(shape), 20)
    assert str(shape) in str(told.value)
    assert "(rows, 2, 2, P, 2, 8)" in str(told.value)


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match="4 slots has no room for a prefix of 5 tokens"):
        prefix_cache(tiny.CONFIG, jnp.zeros(prefix_shape(tiny.CONFIG, 1, P)), P - 1)
