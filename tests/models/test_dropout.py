"""The frozen LM's own dropout: where it acts, that its draws are independent, and that None is no program at all."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import moments_apart
from parity import VOCABULARY, random_model, save

from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig, LayerKind
from spt_jax.models.dropout import Dropout
from spt_jax.models.frozen_tree import random_params
from spt_jax.models.loading import load_lm

pytestmark = pytest.mark.first_python

RATE = 0.25
OPT = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    position_embedding="learned",
    layer_kinds=(LayerKind(rope=None),),
    norm="layer",
    final_norm=False,
    gated_mlp=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
ROWS, TOKENS = 6, 5
EMBEDDINGS = np.random.default_rng(0).normal(size=(ROWS, TOKENS, OPT.hidden_size)).astype(np.float32)


def hidden(config: DecoderConfig, params: FrozenTree, embeddings: Any, dropout: Dropout | None = None) -> jax.Array:
    """Hidden states of whole rows without padding."""
    positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
    return decode(config, params, embeddings, positions, positions >= 0, None, dropout)[0]


run = jax.jit(hidden, static_argnums=0)


@functools.cache
def parameters(config: DecoderConfig = OPT) -> FrozenTree:
    """Every parameter random, biases too."""

    def spread(leaf: jax.Array) -> jax.Array:
        return leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(spread, random_params(config, jax.random.key(0)))


def only_ones(config: DecoderConfig) -> FrozenTree:
    """Blocks whose attention and MLP add 1 to every feature, whatever they see."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        names = [step.key for step in path]
        return jnp.ones_like(leaf) if names[-1] == "bias" and names[-2] in ("o_proj", "down_proj") else 0 * leaf

    return jax.tree_util.tree_map_with_path(one, random_params(config, jax.random.key(0)))


@pytest.mark.parametrize(("parallel", "embedding_dropout"), [(None, True), ("two norms", False)])
def test_every_layer_half_row_place_and_feature_has_its_own_draw(parallel, embedding_dropout):
    config = dataclasses.replace(OPT, parallel_residual=parallel, embedding_dropout=embedding_dropout, num_layers=3)
    ones = jnp.ones((32, 24, config.hidden_size))
    found = run(config, only_ones(config), ones, Dropout(jax.random.key(1), RATE))
    draws = 2 * config.num_layers + embedding_dropout
    kept = np.asarray(found - (not embedding_dropout)) * (1 - RATE)
    np.testing.assert_allclose(kept, kept.round(), atol=1e-5)

    counts = np.bincount(kept.round().astype(int).ravel(), minlength=draws + 1)
    chances = np.array([math.comb(draws, n) * (1 - RATE) ** n * RATE ** (draws - n) for n in range(draws + 1)])
    errors = np.sqrt(chances * (1 - chances) * kept.size)
    assert len(counts) == draws + 1 and np.all(np.abs(counts - chances * kept.size) < 5 * errors + 1), counts
    for axis in range(3):  # draws shared along an axis would leave no variation there
        means = kept.mean(axis=axis)
        expected = draws * RATE * (1 - RATE) / kept.shape[axis]
        assert abs(means.var() / expected - 1) < 5 * math.sqrt(2 / means.size), f"draws along axis {axis} depend"


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_the_mean_over_keys_is_the_value_without_dropout(half):
    config = dataclasses.replace(OPT, num_layers=1)
    params = parameters(config)
    other = ("mlp", "down_proj") if half == "attention" else ("attention", "o_proj")
    block = params["layers"][other[0]]
    silent = {**block, other[1]: jax.tree.map(jnp.zeros_like, block[other[1]])}
    params = {**params, "layers": {**params["layers"], other[0]: silent}}  # linear in the half that is left
    clean = np.asarray(run(config, params, EMBEDDINGS[:1]), np.float64)
    table = np.asarray(params["embed_positions"])[:TOKENS]
    added = clean - (EMBEDDINGS[:1] + table)
    copies = np.repeat(EMBEDDINGS[:1], 20_000, axis=0)
    noisy = np.asarray(run(config, params, copies, Dropout(jax.random.key(2), RATE)), np.float64)
    error = np.abs(added) * math.sqrt(RATE / (1 - RATE) / len(copies))
    assert np.all(np.abs(noisy.mean(axis=0) - clean) < 5 * error + 1e-6)
    assert np.abs(added).max() > 0.1
    np.testing.assert_allclose(noisy.std(axis=0), np.abs(added[0]) * math.sqrt(RATE / (1 - RATE)), rtol=0.05, atol=1e-5)


def test_a_rate_near_0_is_near_none_and_0_is_the_program_without():
    clean = np.asarray(run(OPT, parameters(), EMBEDDINGS))
    near = run(OPT, parameters(), EMBEDDINGS, Dropout(jax.random.key(3), 1e-7))
    np.testing.assert_allclose(near, clean, atol=1e-5)
    programs = [
        jax.make_jaxpr(functools.partial(hidden, OPT))(parameters(), EMBEDDINGS, dropout)
        for dropout in (None, Dropout(jax.random.key(3), 0.0), Dropout(jax.random.key(3), RATE))
    ]
    random = ["random_bits" in str(program) for program in programs]
    assert random == [False, False, True]
    assert len(programs[0].in_avals) == len(jax.tree.leaves(parameters())) + 1
    assert len(str(programs[0]).splitlines()) == len(str(programs[1]).splitlines())


def test_the_key_decides():
    first, again, other = (
        np.asarray(run(OPT, parameters(), EMBEDDINGS, Dropout(key, RATE)))
        for key in (jax.random.key(4), jax.random.key(4), jax.random.key(5))
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    eager = hidden(OPT, parameters(), EMBEDDINGS, Dropout(jax.random.key(4), RATE))
    np.testing.assert_allclose(eager, first, atol=1e-5)
    old_style = run(OPT, parameters(), EMBEDDINGS, Dropout(jax.random.PRNGKey(4), RATE))
    np.testing.assert_array_equal(old_style, first)


@functools.partial(jax.jit, static_argnums=0)
def gradient(config: DecoderConfig, params: FrozenTree, embeddings: Any, dropout: Dropout) -> jax.Array:
    weights = jnp.sin(jnp.arange(embeddings.size)).reshape(embeddings.shape)
    return jax.grad(lambda x: jnp.sum(hidden(config, params, x, dropout) * weights))(embeddings)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_meets_the_same_draws(remat):
    dropout = Dropout(jax.random.key(7), RATE)
    kept = np.asarray(gradient(OPT, parameters(), EMBEDDINGS, dropout))
    recomputed = gradient(dataclasses.replace(OPT, remat=remat), parameters(), EMBEDDINGS, dropout)
    np.testing.assert_allclose(recomputed, kept, rtol=1e-5, atol=1e-5)
    other = np.asarray(gradient(OPT, parameters(), EMBEDDINGS, Dropout(jax.random.key(8), RATE)))
    assert np.abs(kept - other).max() > 0.1


def test_rows_on_several_devices_meet_the_same_draws():
    dropout = Dropout(jax.random.key(13), RATE)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    shards = jax.device_put(EMBEDDINGS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    found = run(OPT, parameters(), shards, dropout)
    assert len(found.sharding.device_set) == 2
    np.testing.assert_allclose(found, run(OPT, parameters(), EMBEDDINGS, dropout), atol=1e-5)


@pytest.mark.parametrize("placement", ["both", "sum"])
def test_families_without_dropout_of_their_own_take_it_too(placement):
    config = dataclasses.replace(OPT, norm_placement=placement, dtype="bfloat16")
    found = run(config, parameters(config), EMBEDDINGS, Dropout(jax.random.key(9), RATE))
    assert found.dtype == jnp.bfloat16 and np.isfinite(np.asarray(found, np.float32)).all()
    clean = run(config, parameters(config), EMBEDDINGS)
    assert np.abs(np.asarray(found, np.float32) - np.asarray(clean, np.float32)).max() > 0.1


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(UserError, match=r"dropout rate is .*; allowed: at least 0 and below 1"):
        Dropout(jax.random.key(0), rate)


FAMILIES = {
    "OPT": ("OPTForCausalLM", {"ffn_dim": 96}, {"dropout": 0.1}),
    "OPT, norms after": ("OPTForCausalLM", {"ffn_dim": 96, "do_layer_norm_before": False}, {"dropout": 0.1}),
    "GPT-2": ("GPT2LMHeadModel", {}, {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"intermediate_size": 96}, {"hidden_dropout": 0.1}),
}


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_distribution_of_torchs_training_mode(family, tmp_path: Path, record_property):
    torch = pytest.importorskip("torch")
    architecture, fields, rates = FAMILIES[family]
    model: Any = save(random_model(architecture, {**fields, **rates}), tmp_path)
    lm = load_lm(str(tmp_path))
    assert lm.config.embedding_dropout == (architecture != "OPTForCausalLM")
    tokens = np.repeat(np.random.default_rng(10).integers(3, VOCABULARY, (1, 4)), 2048, axis=0)
    torch.manual_seed(11)
    with torch.no_grad():
        expected = model.train()(torch.tensor(tokens), use_cache=False).logits[:, -1].double().numpy()

    @jax.jit
    def last_logits(params: FrozenTree, dropout: Dropout) -> jax.Array:
        embeddings = embed(lm.config, params, jnp.asarray(tokens))
        return vocabulary_logits(lm.config, params, hidden(lm.config, params, embeddings, dropout)[:, -1])

    def draws(rate: float) -> np.ndarray:
        return np.asarray(last_logits(lm.params, Dropout(jax.random.key(12), rate)), np.float64)

    equal, another = (moments_apart(draws(rate), expected) for rate in (0.1, 0.06))
    record_property("standard errors apart", equal)
    print(f"{family}: {equal:.1f} standard errors apart at torch's rate, {another:.1f} at another")
    assert equal < 5 < another
