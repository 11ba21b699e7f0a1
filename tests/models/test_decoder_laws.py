"""Laws of the decoder that need no other implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, embed, random_params, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig, LayerKind, Rope, RopeScaling

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    layer_kinds=(LayerKind(Rope(scaling=RopeScaling("llama3", 8.0, 16, 1.0, 4.0))),),
    qkv_bias=True,
)
PARAMS = random_params(CONFIG, jax.random.key(0))
PROMPTS = 0.5 * np.random.default_rng(1).normal(size=(4, 3, 48)).astype(np.float32)  # [K, P, M]


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, embeddings, positions, valid, cache=None):
    return decode(config, params, embeddings, positions, valid, cache)


def rows(lengths: list[int], seed: int = 2) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, CONFIG.vocab_size, length) for length in lengths]


def behind(prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[P+T, M]: a soft prompt before its text."""
    return np.concatenate([prompt, np.asarray(embed(CONFIG, PARAMS, jnp.asarray(tokens)))])


def padded(embeddings: list[np.ndarray], width: int, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of embeddings [T, M] on one side of a batch filled with noise, with positions and validity."""
    batch = np.random.default_rng(3).normal(size=(len(embeddings), width, CONFIG.hidden_size)).astype(np.float32)
    positions = np.zeros((len(embeddings), width), np.int32)
    valid = np.zeros((len(embeddings), width), bool)
    for i, row in enumerate(embeddings):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch[i, place], positions[i, place], valid[i, place] = row, np.arange(len(row)), True
    return batch, positions, valid


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [14, 19, 32])
def test_outputs_do_not_change_with_amount_or_side_of_padding(side: str, width: int) -> None:
    texts = [behind(PROMPTS[i], tokens) for i, tokens in enumerate(rows([11, 5, 8]))]
    hidden, _ = run(CONFIG, PARAMS, *padded(texts, width, side))
    for i, row in enumerate(texts):
        alone, _ = run(CONFIG, PARAMS, *padded([row], len(row), "right"))
        found = hidden[i, : len(row)] if side == "right" else hidden[i, width - len(row) :]
        np.testing.assert_allclose(found, alone[0], atol=2e-5)


def test_outputs_do_depend_on_every_earlier_token() -> None:
    row = behind(PROMPTS[0], rows([9])[0])
    base, _ = run(CONFIG, PARAMS, *padded([row], len(row), "right"))
    for position in range(len(row)):
        changed = row.copy()
        changed[position] += 1.0
        hidden, _ = run(CONFIG, PARAMS, *padded([changed], len(row), "right"))
        difference = np.abs(np.asarray(hidden - base))[0].max(axis=-1)
        assert np.all(difference[:position] == 0), "a token changed what comes before it"
        assert np.all(difference[position:] > 1e-6), "a token left what comes after it unchanged"


def test_cached_decode_equals_full_forward_with_every_soft_prompt() -> None:
    contexts, replies = rows([10, 4, 7]), rows([5, 5, 5], seed=4)
    pairs = [(d, k) for d in range(3) for k in range(4)]  # K innermost
    full = [behind(PROMPTS[k], np.concatenate([contexts[d], replies[d]])) for d, k in pairs]
    expected, _ = run(CONFIG, PARAMS, *padded(full, 20, "right"))

    prefill = [behind(PROMPTS[k], contexts[d]) for d, k in pairs]
    cache = KVCache.empty(CONFIG, len(pairs), 13 + 5)
    hidden, cache = run(CONFIG, PARAMS, *padded(prefill, 13, "right"), cache)
    for i, row in enumerate(prefill):
        np.testing.assert_allclose(hidden[i, : len(row)], expected[i, : len(row)], atol=2e-5)
    for step in range(5):
        tokens = jnp.asarray([[replies[d][step]] for d, _ in pairs])
        positions = jnp.asarray([[len(row) + step] for row in prefill])
        hidden, cache = run(CONFIG, PARAMS, embed(CONFIG, PARAMS, tokens), positions, positions >= 0, cache)
        for i, row in enumerate(prefill):
            np.testing.assert_allclose(hidden[i, 0], expected[i, len(row) + step], atol=2e-5)


def test_soft_prompts_change_the_text_behind_them() -> None:
    tokens = rows([6])[0]
    hidden, _ = run(CONFIG, PARAMS, *padded([behind(prompt, tokens) for prompt in PROMPTS], 9, "right"))
    assert all(np.abs(np.asarray(hidden[0, 3:] - hidden[k, 3:])).max() > 0.01 for k in (1, 2, 3))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_neither_values_nor_gradients(remat: str) -> None:
    batch, positions, valid = padded([behind(PROMPTS[i], t) for i, t in enumerate(rows([11, 5]))], 14, "right")

    def loss(config: DecoderConfig, embeddings: jax.Array) -> jax.Array:
        hidden, _ = decode(config, PARAMS, embeddings, positions, valid)
        return jnp.sum(jnp.where(valid[..., None], jnp.sin(vocabulary_logits(config, PARAMS, hidden)), 0.0))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, gradient = value_and_grad(CONFIG, batch)
    again, regradient = value_and_grad(dataclasses.replace(CONFIG, remat=remat), batch)
    np.testing.assert_allclose(again, value, atol=1e-4)  # a sum of 1,500 sines
    np.testing.assert_allclose(regradient, gradient, atol=1e-5 * float(np.abs(gradient).max()))
    assert np.all(np.asarray(gradient)[~valid] == 0), "padding took part in the loss"
    assert np.all(np.abs(np.asarray(gradient)[valid]).max(-1) > 0)


def test_bfloat16_runs_near_float32_with_float32_logits() -> None:
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    batch, positions, valid = padded([behind(PROMPTS[0], rows([11])[0])], 14, "right")
    expected, _ = run(CONFIG, PARAMS, batch, positions, valid)
    cache = KVCache.empty(half, 1, 14)
    assert cache.key.dtype == jnp.bfloat16
    for hidden in (run(half, params, batch, positions, valid)[0], run(half, params, batch, positions, valid, cache)[0]):
        assert hidden.dtype == jnp.bfloat16
        logits = vocabulary_logits(half, params, hidden)
        assert logits.dtype == jnp.float32
        assert np.abs(np.asarray(hidden, np.float32) - np.asarray(expected)).max() < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"remat": "some"}, "none, full, dots"),
    ],
)
def test_a_bad_field_is_refused_with_what_is_allowed(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)
