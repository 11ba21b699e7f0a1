"""Laws of quantised kernels: how near they are, and that all else is as with the kernels they stand for."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_files import random_llama

from spt_jax.errors import UserError
from spt_jax.generation.engine import GenerationEngine
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig, LayerKind, Rope
from spt_jax.models.frozen_tree import abstract_params, quantize_params, random_params
from spt_jax.models.loading import load_lm
from spt_jax.models.quantized import GROUP_SIZE, INTEGERS, QTensor, contract, quantize, scale_shape, tree_bytes
from spt_jax.models.random_lm import random_lm_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, place_batch, row_sharding
from spt_jax.prompting.objective import Objective
from spt_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.first_python

KINDS = ("int8", "int4")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen": {"qkv_bias": True, "query_key_norm": "head", "tie_word_embeddings": True},
    "gemma": {
        "norm_placement": "both",
        "norm_plus_one": True,
        "attention_softcap": 20.0,
        "layer_kinds": (LayerKind(), LayerKind(Rope(1e3), 5)),
        "layer_pattern": (0, 1),
    },
    "gpt": {
        "gated_mlp": False,
        "activation": "gelu",
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "position_embedding": "learned",
        "layer_kinds": (LayerKind(None),),
    },
    "neox": {"gated_mlp": False, "norm": "layer", "parallel_residual": "two norms", "rotary_dim": 4},
}


def is_quantized(node: Any) -> bool:
    return isinstance(node, QTensor)


def is_boxed(node: Any) -> bool:
    return isinstance(node, nn.LogicallyPartitioned)


def dequantized(params: Any) -> Any:
    return jax.tree.map(lambda x: x.dequantized() if is_quantized(x) else x, params, is_leaf=is_quantized)


def quantised(kind: str, config: DecoderConfig = tiny.CONFIG, **changes: Any) -> DecoderConfig:
    return dataclasses.replace(config, quantization=kind, **changes)


def assert_trees_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32))


jitted_quantize = jax.jit(quantize, static_argnums=(1, 2))


@st.composite
def kernels(draw: st.DrawFn) -> np.ndarray:
    """``[in, out]``, an output a hard case: outliers, far from zero, constant, zero, tiny, huge."""
    rows = draw(st.sampled_from([1, 6, 32, 48, 96]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = random.normal(size=(rows, 6)).astype(np.float32)
    w[0, 0] *= draw(st.floats(1, 1e6))
    w[:, 1] += draw(st.floats(-1e5, 1e5))
    w[:, 2] = draw(st.floats(-1e5, 1e5))
    w[:, 3] = 0
    w[:, 4] *= np.float32(10.0 ** draw(st.integers(-30, 30)))
    return w


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(w=kernels())
def test_a_weight_is_at_most_half_a_scale_off_and_quantises_to_the_same_again(kind: str, w: np.ndarray) -> None:
    shape = scale_shape(w.shape, 1, kind)
    made = jitted_quantize(jnp.asarray(w), shape, INTEGERS[kind])
    found = np.asarray(made.dequantized(), np.float64)
    scale = np.repeat(np.asarray(made.scale, np.float64), w.shape[0] // shape[0], 0)
    # float32 itself: what is subtracted and added back is as large as the weight; subnormal scales count as zero.
    assert np.all(np.abs(found - w) <= scale * (0.5 + 1e-4) + np.abs(w) * 2.0**-22 + 1e-35)
    assert np.all(found[:, 3] == 0) and np.isfinite(found).all()
    again = jitted_quantize(made.dequantized(), shape, INTEGERS[kind])
    np.testing.assert_array_equal(np.asarray(again.q, np.int32), np.asarray(made.q, np.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_integers_use_their_whole_range(kind: str) -> None:
    w = jax.random.normal(jax.random.key(0), (96, 5))
    made = quantize(w, scale_shape(w.shape, 1, kind), INTEGERS[kind])
    q = np.asarray(made.q, np.int32).reshape(*made.scale.shape[:1], -1, 5)
    assert np.all(np.abs(q).max((0, 1)) == 127) if kind == "int8" else np.all(q.min(1) == -8) & np.all(q.max(1) == 7)


def test_a_grid_of_sixteen_levels_comes_through_int4_unharmed() -> None:
    """GGUF's Q4_1: ``scale · n + smallest`` by groups of 32 inputs."""
    random = np.random.default_rng(0)
    n = random.integers(0, 16, (3, GROUP_SIZE, 8))
    n[:, 0], n[:, 1] = 0, 15
    scale = 2.0 ** random.integers(-6, 0, (3, 1, 8))
    w = jnp.asarray((scale * (n - 6)).reshape(-1, 8), jnp.float32)
    np.testing.assert_array_equal(quantize(w, (3, 8), jnp.int4).dequantized(), w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_weight_stays_broken_and_harms_its_own_block_alone(kind: str, bad: float) -> None:
    w = np.ones((64, 3), np.float32)
    w[40, 1] = bad
    found = np.asarray(quantize(jnp.asarray(w), scale_shape(w.shape, 1, kind), INTEGERS[kind]).dequantized())
    assert not np.isfinite(found[40, 1])
    assert np.isfinite(found[:, [0, 2]]).all() and (kind == "int8" or np.isfinite(found[:32]).all())


@pytest.mark.parametrize(
    ("shape", "num_inputs", "int8", "int4"),
    [
        ((4096, 11008), 1, (1, 11008), (128, 11008)),
        ((576, 9, 64), 1, (1, 9, 64), (18, 9, 64)),
        ((9, 64, 576), 2, (1, 1, 576), (9, 2, 576)),
        ((32, 80, 2560), 2, (1, 1, 2560), (32, 4, 2560)),  # OPT-2.7B's heads: the largest divisor is 20
        ((8, 5), 1, (1, 5), (1, 5)),
        ((97, 5), 1, (1, 5), (97, 5)),
    ],
)
def test_scales_are_one_an_output_or_one_a_group(shape: Any, num_inputs: int, int8: Any, int4: Any) -> None:
    assert scale_shape(shape, num_inputs, "int8") == int8
    assert scale_shape(shape, num_inputs, "int4") == int4


def test_scales_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        quantize(jnp.ones((6, 4)), (4, 4), jnp.int4)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(config: DecoderConfig, params: Any, prompts: jax.Array, tokens: jax.Array) -> Any:
    def logits(prompts: jax.Array) -> jax.Array:
        embeddings = jnp.concatenate([prompts, embed(config, params, tokens)], 1)
        positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
        return vocabulary_logits(config, params, decode(config, params, embeddings, positions, positions >= 0)[0])

    return logits(prompts), jax.grad(lambda prompts: jnp.sin(logits(prompts)).sum())(prompts)


PROMPTS = jax.random.normal(jax.random.key(5), (2, 3, 32))
TOKENS = jnp.asarray(np.random.default_rng(6).integers(0, 128, (2, 7)), jnp.int32)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "int8"), ("qwen", "int4"), ("gemma", "int4")]
    + [pytest.param(*case, marks=pytest.mark.campaign) for case in (("gpt", "int8"), ("neox", "int4"))],
)
def test_logits_and_prompt_gradients_equal_those_of_the_dequantised_weights(family: str, kind: str) -> None:
    remat = {"llama": "none", "qwen": "full"}.get(family, "dots")
    config = dataclasses.replace(tiny.CONFIG, **FAMILIES[family], remat=remat)
    params = quantize_params(quantised(kind, config), random_params(config, jax.random.key(0)))
    found = logits_and_gradient(quantised(kind, config), params, PROMPTS, TOKENS)
    expected = logits_and_gradient(config, dequantized(params), PROMPTS, TOKENS)
    assert tiny.relative_difference(found, expected) <= 1e-6
    assert np.abs(found[1]).max() > 0


@pytest.mark.parametrize(
    ("remat", "kind"),
    [
        ("none", "int4"),
        ("full", "int8"),
        pytest.param("none", "int8", marks=pytest.mark.campaign),
        pytest.param("dots", "int4", marks=pytest.mark.campaign),
    ],
)
def test_backward_pass_keeps_integers_for_kernels_and_the_same_activations(remat: str, kind: str) -> None:
    embeddings = jnp.concatenate([PROMPTS, embed(tiny.CONFIG, tiny.params(), TOKENS)], 1)
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))

    def kept(config: DecoderConfig, params: Any) -> set[tuple[tuple[int, ...], str]]:
        def pullback(params: Any) -> Any:
            return jax.vjp(lambda x: decode(config, params, x, positions, positions >= 0)[0], embeddings)[1]

        return {(x.shape, jnp.dtype(x.dtype).name) for x in jax.tree.leaves(jax.eval_shape(pullback, params))}

    config = dataclasses.replace(tiny.CONFIG, remat=remat)
    params = quantize_params(quantised(kind, config), tiny.params())
    kernels = {node.q.shape for node in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(node)}
    found, expected = kept(quantised(kind, config), params), kept(config, tiny.params())
    assert {dtype for shape, dtype in found if shape in kernels} == {kind}
    assert {dtype for shape, dtype in expected if shape in kernels} == {"float32"}
    # Activations are those of 10 tokens; a rematerialisation policy sees the same products.
    assert {leaf for leaf in found if 10 in leaf[0]} == {leaf for leaf in expected if 10 in leaf[0]} != set()


def test_quantised_kernels_take_no_gradient() -> None:
    w = jax.random.normal(jax.random.key(0), (32, 4))
    made = quantize(w, (1, 4), jnp.int8)
    gradient = jax.grad(lambda s: contract(jnp.ones((2, 32)), QTensor(made.q, s), 1).sum())(made.scale)
    np.testing.assert_array_equal(gradient, 0)


def test_train_step_equals_that_before_the_dequantised_weights() -> None:
    config = quantised("int8")
    params = quantize_params(config, tiny.params())
    batch = tiny.packed("dialogue").batch(rows=4)
    model = dataclasses.replace(tiny.MODEL, decoder=config)
    found = tiny.STEP(model, Objective(), params, tiny.trainable(), batch, 2)
    expected = tiny.STEP(tiny.MODEL, Objective(), dequantized(params), tiny.trainable(), batch, 2)
    assert tiny.relative_difference(found, expected) <= 1e-6
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[1]))


def placed(mesh: Any, config: DecoderConfig, params: Any) -> Any:
    def one(box: nn.LogicallyPartitioned, x: jax.Array) -> jax.Array:
        return jax.device_put(x, parameter_sharding(mesh, box.names, x.shape))

    return jax.tree.map(one, abstract_params(config), params, is_leaf=is_boxed)


@pytest.mark.parametrize(
    ("kind", "fsdp", "tensor"), [pytest.param("int8", 2, 4, marks=pytest.mark.campaign), ("int4", 4, 2)]
)
def test_eight_devices_train_as_one_does(kind: str, fsdp: int, tensor: int) -> None:
    config = quantised(kind, hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    model = dataclasses.replace(tiny.MODEL, decoder=config)
    params = quantize_params(config, random_params(dataclasses.replace(config, quantization="none"), jax.random.key(0)))
    host = {name: np.asarray(x) for name, x in tiny.packed("dialogue").batch(rows=8).items()}
    results = []
    for sizes, count in (((1, 1, 1), 1), ((1, fsdp, tensor), 8)):
        mesh = make_mesh(*sizes, devices=jax.devices()[:count])
        on_mesh = dataclasses.replace(model, row_sharding=row_sharding(mesh))
        step = make_train_step(on_mesh, Objective(), optax.sgd(0.1), mesh)
        frozen = placed(mesh, config, params)
        state, metrics = step(init_state(tiny.trainable(model), optax.sgd(0.1), mesh), frozen, place_batch(mesh, host))
        results.append((state.trainable, metrics["loss/total"]))
        up = frozen["layers"]["mlp"]["up_proj"]["kernel"]
        assert up.q.sharding.shard_shape(up.q.shape) == (2, 128 // sizes[1], 48 // sizes[2])
        groups = 4 if kind == "int4" else 1
        shard = (2, groups // sizes[1] if kind == "int4" else 1, 48 // sizes[2])
        assert up.scale.sharding.shard_shape(up.scale.shape) == shard
    assert tiny.relative_difference(results[1], results[0]) <= 1e-5


def test_cached_generation_equals_that_before_the_dequantised_weights() -> None:
    config = quantised("int4")
    params = quantize_params(config, tiny.params())
    contexts, selected = [[5, 6, 7], [9, 3, 4, 8, 11]], [0, 2]
    bank = tiny.trainable()["bank"]["prompts"]
    found, expected = (
        GenerationEngine(c, p, eos_ids=[2], pad_id=0).generate(bank, contexts, selected, max_new_tokens=8)
        for c, p in ((config, params), (tiny.CONFIG, dequantized(params)))
    )
    assert found == expected and any(found)


@pytest.mark.parametrize(
    ("kind", "dtype"), [pytest.param("int8", "bfloat16", marks=pytest.mark.campaign), ("int4", "float32")]
)
def test_loading_layer_by_layer_equals_quantising_what_the_file_holds(kind: str, dtype: str, tmp_path: Path) -> None:
    files = random_llama(attention_bias=True)
    sources = (files.write_folder(tmp_path / "folder", shards=2), files.write_gguf(tmp_path / "m.gguf"))
    mesh = make_mesh(1, 2, 4)
    for source in map(str, sources):
        plain = load_lm(source)
        lm = load_lm(source, dtype=dtype, quantization=kind)
        expected = quantize_params(dataclasses.replace(plain.config, quantization=kind), plain.params)
        for path, leaf in jax.tree.leaves_with_path(expected, is_leaf=is_quantized):
            expected_leaf = leaf if is_quantized(leaf) else leaf.astype(dtype)
            found = functools.reduce(lambda node, key: node[key.key], path, lm.params)
            assert_trees_equal(found, expected_leaf)
        assert jax.tree.structure(lm.params) == jax.tree.structure(expected)
        assert lm.identity == plain.identity
        sharding = functools.partial(parameter_sharding, mesh)
        over = load_lm(source, dtype=dtype, quantization=kind, sharding_for=sharding).params
        assert_trees_equal(over, lm.params)
        assert_shardings(mesh, lm.config, over)


def assert_shardings(mesh: Any, config: DecoderConfig, params: Any) -> None:
    boxes = jax.tree.leaves(abstract_params(config), is_leaf=is_boxed)
    for box, leaf in zip(boxes, jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(parameter_sharding(mesh, box.names, leaf.shape), leaf.ndim)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_those_of_the_float_model_quantised(kind: str) -> None:
    config = quantised(kind)
    expected = quantize_params(config, random_lm_params(tiny.CONFIG))
    assert_trees_equal(random_lm_params(config), expected)
    mesh = make_mesh(1, 2, 4)
    over = random_lm_params(config, sharding_for=functools.partial(parameter_sharding, mesh))
    assert_trees_equal(over, expected)
    assert_shardings(mesh, config, over)


@pytest.mark.parametrize(("family", "kind"), [("llama", "int8"), ("gpt", "int4"), ("qwen", "int4")])
def test_declared_tree_is_the_quantised_tree_and_only_kernels_of_blocks_are(family: str, kind: str) -> None:
    config = quantised(kind, **FAMILIES[family])
    params = random_params(config, jax.random.key(0))
    boxes = abstract_params(config)
    declared = jax.tree.map(lambda x: (x.shape, x.dtype), nn.unbox(boxes))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == declared
    assert tree_bytes(params) == tree_bytes(boxes)
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_quantized):
        assert is_quantized(leaf) == (path[-1].key == "kernel" and path[0].key == "layers")
        if is_quantized(leaf):
            bits = 8 * tree_bytes(leaf) / leaf.q.size
            assert bits < 9.1 if kind == "int8" else bits <= 8  # heads of 8 features have a group a head


def test_an_int4_counts_half_a_byte_and_a_group_of_32_one_bit_a_weight() -> None:
    w = jnp.ones((64, 7))
    assert tree_bytes({"w": w, "half": w.astype(jnp.bfloat16)}) == 64 * 7 * 6
    assert tree_bytes(quantize(w, (2, 7), jnp.int4)) == 64 * 7 * 5 // 8
    assert tree_bytes(jax.ShapeDtypeStruct((3, 3), jnp.int4)) == 5


@pytest.mark.parametrize(("config", "tree"), [("int8", "none"), ("none", "int8"), ("none", "int4")])
def test_a_tree_stored_in_another_way_is_refused(config: str, tree: str) -> None:
    params = random_params(quantised(tree), jax.random.key(0))
    with pytest.raises(UserError, match=f"quantization is {config}"):
        logits_and_gradient(quantised(config), params, PROMPTS, TOKENS)
