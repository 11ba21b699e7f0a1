"""Laws of the decoder that need no other implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig, LayerKind, Rope, RopeScaling
from spt_jax.models.frozen_tree import random_params

pytestmark = pytest.mark.first_python

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
LOCAL = LayerKind(window=6)
DECODERS = {
    "llama 3": CONFIG,
    "gemma 2: windows, soft caps, norms on both sides": dataclasses.replace(
        CONFIG,
        layer_kinds=(LOCAL, LayerKind()),
        layer_pattern=(0, 1, 0),
        norm_placement="both",
        norm_plus_one=True,
        embedding_scale=7.0,
        attention_softcap=2.0,
        logit_softcap=3.0,
        activation="gelu_tanh",
        tie_word_embeddings=True,
    ),
    "smollm3: no positions on one layer": dataclasses.replace(
        CONFIG, layer_kinds=(LayerKind(), LayerKind(rope=None)), layer_pattern=(0, 0, 1)
    ),
    "opt-350m: learned positions, norms on the sum, a narrow table": dataclasses.replace(
        CONFIG,
        position_embedding="learned",
        position_offset=2,
        layer_kinds=(LayerKind(rope=None),),
        embedding_size=20,
        norm="layer",
        norm_placement="sum",
        final_norm=False,
        gated_mlp=False,
        activation="relu",
        mlp_bias=True,
        output_bias=True,
        tie_word_embeddings=True,
    ),
    "gpt-neox: side by side, a part of each head rotated": dataclasses.replace(
        CONFIG,
        layer_kinds=(LayerKind(),),
        rotary_dim=4,
        norm="layer",
        parallel_residual="two norms",
        gated_mlp=False,
        activation="gelu",
    ),
    "stablelm 2: one norm, each head normalised": dataclasses.replace(
        CONFIG, norm="layer", parallel_residual="one norm", query_key_norm="each head", rotary_dim=2
    ),
    "olmo 2: norms on outputs, all heads normalised": dataclasses.replace(
        CONFIG, norm_placement="output", query_key_norm="width", layer_kinds=(LOCAL,)
    ),
    "gpt-2: scale by layer": dataclasses.replace(
        CONFIG,
        position_embedding="learned",
        layer_kinds=(LayerKind(rope=None),),
        norm="layer",
        gated_mlp=False,
        attention_scale=1.0,
        attention_scale_by_layer=True,
    ),
}
PROMPTS = 0.5 * np.random.default_rng(1).normal(size=(4, 3, 48)).astype(np.float32)  # [K, P, M]
every_decoder = pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)


@functools.cache
def params_of(config: DecoderConfig) -> FrozenTree:
    """Every parameter random, norms and biases too."""
    leaves, tree = jax.tree.flatten(random_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    spread = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, spread)


PARAMS = params_of(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, embeddings, positions, valid, cache=None):
    return decode(config, params, embeddings, positions, valid, cache)


def rows(lengths: list[int], seed: int = 2) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, CONFIG.vocab_size, length) for length in lengths]


def behind(prompt: np.ndarray, tokens: np.ndarray, config: DecoderConfig = CONFIG) -> np.ndarray:
    """[P+T, M]: a soft prompt before its text."""
    return np.concatenate([prompt, np.asarray(embed(config, params_of(config), jnp.asarray(tokens)))])


def padded(embeddings: list[np.ndarray], width: int, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of embeddings [T, M] on one side of a batch filled with noise, with positions and validity."""
    batch = np.random.default_rng(3).normal(size=(len(embeddings), width, CONFIG.hidden_size)).astype(np.float32)
    positions = np.zeros((len(embeddings), width), np.int32)
    valid = np.zeros((len(embeddings), width), bool)
    for i, row in enumerate(embeddings):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch[i, place], positions[i, place], valid[i, place] = row, np.arange(len(row)), True
    return batch, positions, valid


@every_decoder
def test_outputs_do_not_change_with_amount_or_side_of_padding(config: DecoderConfig) -> None:
    texts = [behind(PROMPTS[i], tokens, config) for i, tokens in enumerate(rows([11, 5, 8]))]
    params = params_of(config)
    alone = [run(config, params, *padded([row], len(row), "right"))[0][0] for row in texts]
    for width, side in ((14, "right"), (14, "left"), (32, "right"), (32, "left")):
        hidden, _ = run(config, params, *padded(texts, width, side))
        for i, row in enumerate(texts):
            found = hidden[i, : len(row)] if side == "right" else hidden[i, width - len(row) :]
            np.testing.assert_allclose(found, alone[i], atol=5e-5)


@every_decoder
def test_a_token_changes_what_comes_after_it_within_reach_and_nothing_before(config: DecoderConfig) -> None:
    row = behind(PROMPTS[0], rows([9])[0], config)
    pattern = config.layer_pattern or (0,) * config.num_layers
    reach = sum((config.layer_kinds[kind].window or 1000) - 1 for kind in pattern)
    changed = np.repeat(row[None], len(row) + 1, axis=0)
    changed[np.arange(len(row)), np.arange(len(row))] += np.random.default_rng(8).normal(size=config.hidden_size)
    positions = np.tile(np.arange(len(row)), (len(changed), 1))
    hidden, _ = run(config, params_of(config), changed, positions, positions >= 0)
    difference = np.abs(np.asarray(hidden - hidden[-1:])).max(axis=-1)
    for position in range(len(row)):
        seen = np.arange(len(row)) - position
        within = (seen >= 0) & (seen <= reach)
        assert np.all(difference[position, ~within] == 0), "a token changed what cannot see it"
        assert np.all(difference[position, within] > 1e-7), "a token left what can see it unchanged"


@every_decoder
def test_cached_decode_equals_full_forward_with_every_soft_prompt(config: DecoderConfig) -> None:
    params = params_of(config)
    contexts, replies = rows([10, 4, 7]), rows([5, 5, 5], seed=4)
    pairs = [(d, k) for d in range(3) for k in range(4)]  # K innermost
    full = [behind(PROMPTS[k], np.concatenate([contexts[d], replies[d]]), config) for d, k in pairs]
    expected, _ = run(config, params, *padded(full, 20, "right"))

    prefill = [behind(PROMPTS[k], contexts[d], config) for d, k in pairs]
    cache = KVCache.empty(config, len(pairs), 13 + 5)
    hidden, cache = run(config, params, *padded(prefill, 13, "right"), cache)
    for i, row in enumerate(prefill):
        np.testing.assert_allclose(hidden[i, : len(row)], expected[i, : len(row)], atol=5e-5)
    for step in range(5):
        tokens = jnp.asarray([[replies[d][step]] for d, _ in pairs])
        positions = jnp.asarray([[len(row) + step] for row in prefill])
        hidden, cache = run(config, params, embed(config, params, tokens), positions, positions >= 0, cache)
        for i, row in enumerate(prefill):
            np.testing.assert_allclose(hidden[i, 0], expected[i, len(row) + step], atol=5e-5)


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


FORMS = [{"unrolled": True}, {"remat": "full"}, {"remat": "dots"}]


@pytest.mark.parametrize(
    ("config", "form"),
    [(config, {}) for config in DECODERS.values()] + [(CONFIG, form) for form in FORMS],
    ids=[*DECODERS, *map(str, FORMS)],
)
def test_wanted_places_are_those_of_whole_rows(config: DecoderConfig, form: dict) -> None:
    params, wanted = params_of(config), jnp.asarray([[13, 2, 2, 9], [0, 7, 6, 5]])
    batch, positions, valid = padded([behind(PROMPTS[i], t, config) for i, t in enumerate(rows([11, 5]))], 14, "right")
    kept = KVCache.empty(config, 2, 16)

    @functools.partial(jax.jit, static_argnums=0)
    def both(config: DecoderConfig, embeddings: jax.Array, wanted: jax.Array | None) -> tuple:
        def loss(embeddings: jax.Array) -> tuple:
            hidden, _ = decode(config, params, embeddings, positions, valid, wanted=wanted)
            hidden = hidden if wanted is not None else jnp.take_along_axis(hidden, places, axis=1)
            return jnp.sum(jnp.sin(hidden)), hidden

        cached, cache = decode(config, params, embeddings, positions, valid, kept, wanted=wanted)
        cached = cached if wanted is not None else jnp.take_along_axis(cached, places, axis=1)
        return *jax.grad(loss, has_aux=True)(embeddings), cached, cache

    places = wanted[..., None]
    expected, found = both(config, batch, None), both(dataclasses.replace(config, **form), batch, wanted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-5), found, expected)


def test_one_layer_alone_gives_its_wanted_places() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    batch, positions, valid = padded([behind(PROMPTS[0], rows([11])[0])], 14, "right")
    whole, _ = run(config, params_of(config), batch, positions, valid)
    compiled = jax.jit(decode, static_argnums=0)
    found, _ = compiled(config, params_of(config), batch, positions, valid, wanted=jnp.asarray([[3, 12]]))
    np.testing.assert_allclose(found, whole[:, [3, 12]], atol=5e-5)


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


@every_decoder
@pytest.mark.parametrize("width", [6, 14])
def test_rows_padded_behind_need_not_say_where_they_end(config: DecoderConfig, width: int) -> None:
    texts = [behind(PROMPTS[i], tokens, config) for i, tokens in enumerate(rows([width - 3, 1]))]
    batch, positions, valid = padded(texts, width, "right")
    everywhere = np.broadcast_to(np.arange(width), positions.shape)
    wanted, _ = run(config, params_of(config), batch, positions, valid)
    found, _ = run(config, params_of(config), batch, everywhere, None)
    np.testing.assert_allclose(np.asarray(found)[valid], np.asarray(wanted)[valid], atol=2e-5)


@every_decoder
@pytest.mark.parametrize("form", [{"unrolled": True}, {"joint_projections": True}], ids=["unrolled", "joint"])
def test_the_form_of_the_program_changes_neither_values_nor_gradients(config, form, monkeypatch) -> None:
    monkeypatch.setattr("spt_jax.models.layers.JOINT_TOKENS", 0)
    batch, positions, valid = padded([behind(PROMPTS[i], t, config) for i, t in enumerate(rows([11, 5]))], 14, "right")
    weight = np.random.default_rng(5).normal(size=batch.shape) * valid[..., None]
    params, programs = params_of(config), []

    def value_and_grad(config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
        def loss(embeddings: jax.Array) -> jax.Array:
            return jnp.sum(decode(config, params, embeddings, positions, valid)[0] * weight)

        programs.append(str(jax.make_jaxpr(loss)(batch)))
        return jax.jit(jax.value_and_grad(loss))(batch)

    value, gradient = value_and_grad(config)
    again, regradient = value_and_grad(dataclasses.replace(config, **form))
    np.testing.assert_allclose(again, value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(regradient, gradient, atol=1e-5 * float(np.abs(gradient).max()))
    if "unrolled" in form:
        assert [f"unroll={config.num_layers}" in program for program in programs] == [False, True]
    else:
        before, after = (program.count("dot_general") for program in programs)
        assert after == before - 2 - config.gated_mlp  # of the three to heads, of the two that enter the MLP


def test_few_tokens_are_projected_apart() -> None:
    texts = [behind(PROMPTS[0], rows([11])[0])]
    batch, positions, valid = padded(texts, 14, "right")
    jaxprs = [
        str(jax.make_jaxpr(lambda x, c=c: decode(c, PARAMS, x, positions, valid)[0])(batch))
        for c in (CONFIG, dataclasses.replace(CONFIG, joint_projections=True))
    ]
    assert jaxprs[0] == jaxprs[1]
