"""What quantised kernels cost on real text: nats a token on SmolLM2, and on a decoder trained here in full precision.

SmolLM2's package is GGUF's Q4_1, whose grid int4 shares; the decoder trained here has never seen a grid.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.sources import read_dialogues
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import quantize_params, random_params
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.models.quantized import tree_bytes
from spt_jax.models.random_lm import byte_tokenizer

pytestmark = pytest.mark.first_python

TRAIN, VALID = "train_self_original_no_cands.first10000turns", "valid_self_original_no_cands"
ALLOWED = {"int8": 0.01, "int4": 0.15}
"""Nats a token, beside float32."""


def texts(shared_dir: Path, name: str, count: int) -> list[str]:
    """Whole dialogues in METHOD's template, in the order of the file."""
    dialogues = read_dialogues(str(shared_dir / f"data/convai2/{name}.txt")).dialogues[:count]
    return [
        f"given persona: {' '.join(dialogue.persona)}; context: "
        + " ".join(f"Q: {turn.query} R: {turn.response}" for turn in dialogue.turns)
        for dialogue in dialogues
    ]


def token_nll(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """float32 ``[B, T - 1]``, nats; padding carries figures that nobody reads."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decode(config, params, embed(config, params, tokens), positions, positions >= 0)
    logits = vocabulary_logits(config, params, hidden[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


jitted_nll = jax.jit(token_nll, static_argnums=0)


def all_nll(config: DecoderConfig, params: Any, rows: list[list[int]], width: int) -> np.ndarray:
    """Every token's, five rows at a time."""
    found = []
    for start in range(0, len(rows), 5):
        part = [row[:width] for row in rows[start : start + 5]]
        tokens = np.zeros((len(part), width), np.int32)
        for place, row in enumerate(part):
            tokens[place, : len(row)] = row
        nll = np.asarray(jitted_nll(config, params, tokens))
        found += [nll[place, : len(row) - 1] for place, row in enumerate(part)]
    return np.concatenate(found)


def check(config: DecoderConfig, params: Any, rows: list[list[int]], width: int) -> None:
    exact = all_nll(config, params, rows, width)
    print(f"\nfloat32: {exact.mean():.4f} nats over {exact.size} tokens, {tree_bytes(params):,} bytes")
    for kind, allowed in ALLOWED.items():
        quantised = dataclasses.replace(config, quantization=kind)
        stored = quantize_params(quantised, params)
        nll = all_nll(quantised, stored, rows, width)
        print(
            f"{kind}: {nll.mean() - exact.mean():+.4f} nats, a token moves by {np.abs(nll - exact).mean():.4f} "
            f"(at most {np.abs(nll - exact).max():.3f}), {tree_bytes(stored):,} bytes, "
            f"blocks {tree_bytes(stored['layers']):,} of {tree_bytes(params['layers']):,}"
        )
        assert abs(nll.mean() - exact.mean()) <= allowed
        assert np.abs(nll - exact).max() > 1e-3, "nothing was quantised"


@pytest.fixture(scope="module")
def lm(smollm2_source: str) -> LanguageModel:
    return load_lm(smollm2_source)


@pytest.mark.smollm2
@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.campaign)])
def test_quantised_smollm2_is_as_likely_as_float32(count: int, lm: LanguageModel, shared_dir: Path) -> None:
    assert lm.tokenizer.bos_id is not None
    rows = [[lm.tokenizer.bos_id, *row] for row in lm.tokenizer.encode(texts(shared_dir, VALID, count))]
    check(lm.config, lm.params, rows, max(map(len, rows)))


@pytest.mark.smollm2
@pytest.mark.parametrize("kind", ALLOWED)
def test_smollm2_loaded_quantised_is_smollm2_quantised(kind: str, lm: LanguageModel, smollm2_source: str) -> None:
    loaded = load_lm(smollm2_source, quantization=kind)
    assert loaded.identity == lm.identity
    expected = quantize_params(loaded.config, lm.params)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), loaded.params, expected)
    assert all(jax.tree.leaves(same))


SMALL = DecoderConfig(
    vocab_size=259,
    hidden_size=128,
    intermediate_size=384,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
WIDTH = 128


def trained(shared_dir: Path, steps: int) -> Any:
    """Every parameter of `SMALL` trained on the bytes of real dialogues, from a fixed seed."""
    rows = byte_tokenizer().encode(texts(shared_dir, TRAIN, 400))
    stream = np.concatenate([np.asarray([0, *row], np.int32) for row in rows])
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10 + 1, steps))
    params = random_params(SMALL, jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(lambda p: token_nll(SMALL, p, tokens).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, random = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(0, len(stream) - WIDTH, 8)
        params, state, loss = step(params, state, np.stack([stream[start : start + WIDTH] for start in starts]))
        jax.block_until_ready(loss)
    return params


@pytest.mark.parametrize("steps", [40, pytest.param(600, marks=pytest.mark.campaign)])
def test_quantised_decoder_trained_in_float32_is_as_likely(steps: int, shared_dir: Path) -> None:
    params = trained(shared_dir, steps)
    rows = [[0, *row] for row in byte_tokenizer().encode(texts(shared_dir, VALID, 20))]
    exact = all_nll(SMALL, params, rows, WIDTH).mean()
    assert exact < (3.6 if steps < 600 else 2.0), "it has learned nothing that quantisation could harm"
    check(SMALL, params, rows, WIDTH)
