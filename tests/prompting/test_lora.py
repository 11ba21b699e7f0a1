"""Laws of the low-rank updates: exact beside the kernels and merged, and the frozen LM stays frozen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.errors import UserError
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.dropout import Dropout
from spt_jax.models.frozen_tree import abstract_params, quantize_params, random_params
from spt_jax.models.low_rank import LowRankKernel
from spt_jax.models.quantized import contract
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, replicated
from spt_jax.prompting.lora import init_lora, lora_targets, merge_lora, with_lora

# Intermediate sizes that no other product has: a weight gradient would show by its shape.
CONFIG = dataclasses.replace(tiny.CONFIG, intermediate_size=56)
ALL = tuple(lora_targets(CONFIG))
RANK, SCALE = 3, 0.7
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, CONFIG.vocab_size)


@functools.cache
def frozen(config: Any = CONFIG) -> Any:
    return tiny.params(config)


@functools.cache
def moved(config: Any = CONFIG, targets: tuple[str, ...] = ALL, seed: int = 3) -> Any:
    """A tree whose updates are as large as the kernels."""
    tree = init_lora(config, jax.random.key(seed), RANK, targets)
    leaves, shape = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(shape, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Any, params: Any, tokens: jax.Array = TOKENS) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decode(config, params, embed(config, params, tokens), positions, positions >= 0)
    return vocabulary_logits(config, params, hidden)


def loss(config: Any, params: Any, tree: Any, key: Any = None, dropout: float = 0.0) -> jax.Array:
    z = logits(config, with_lora(params, tree, SCALE, key, dropout))
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z[:, :-1]), TOKENS[:, 1:, None], axis=-1))


def difference(a: Any, b: Any) -> float:
    return tiny.relative_difference(a, b)


def test_a_fresh_update_is_the_lm_itself_bitwise():
    tree = init_lora(CONFIG, jax.random.key(0), RANK, ALL)
    np.testing.assert_array_equal(logits(CONFIG, with_lora(frozen(), tree, SCALE)), logits(CONFIG, frozen()))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_merged_equals_unmerged(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    beside = logits(config, with_lora(frozen(), moved(), SCALE))
    assert difference(logits(config, merge_lora(frozen(), moved(), SCALE)), beside) <= 1e-5
    assert difference(beside, logits(config, frozen())) > 0.1


@pytest.mark.parametrize("name", ALL)
def test_each_projection_gets_its_own_update(name):
    tree = moved(targets=(name,))
    part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "attention"
    base = frozen()["layers"][part][name]["kernel"]
    down, up = tree[name]["down"], tree[name]["up"]
    expected = np.stack([
        np.asarray(w) + SCALE * (np.asarray(a).reshape(-1, RANK) @ np.asarray(b).reshape(RANK, -1)).reshape(w.shape)
        for w, a, b in zip(base, down, up, strict=True)
    ])  # fmt: skip
    assert difference(merge_lora(frozen(), tree, SCALE)["layers"][part][name]["kernel"], expected) <= 1e-6
    kernel = with_lora(frozen(), tree, SCALE)["layers"][part][name]["kernel"]
    inputs = lora_targets(CONFIG)[name].inputs
    x = jax.random.normal(jax.random.key(7), (3, *inputs))
    ours = jax.vmap(lambda layer: contract(x, layer, len(inputs)))(kernel)
    assert difference(ours, [np.tensordot(x, w, len(inputs)) for w in expected]) <= 1e-5


def test_other_arrays_are_shared_and_the_tree_given_is_left_alone():
    params = frozen()
    joined = with_lora(params, moved(targets=("q_proj",)), SCALE)
    kernel = joined["layers"]["attention"]["q_proj"]["kernel"]
    assert isinstance(kernel, LowRankKernel)
    assert kernel.base is params["layers"]["attention"]["q_proj"]["kernel"]
    assert joined["layers"]["mlp"]["up_proj"]["kernel"] is params["layers"]["mlp"]["up_proj"]["kernel"]
    assert joined["embed_tokens"] is params["embed_tokens"]


def test_down_starts_uniform_within_one_over_the_root_of_the_inputs_and_up_at_zero():
    tree = init_lora(dataclasses.replace(CONFIG, hidden_size=100), jax.random.key(0), 64, ALL)
    for name, shape in lora_targets(dataclasses.replace(CONFIG, hidden_size=100)).items():
        down, bound = np.asarray(tree[name]["down"]), np.prod(shape.inputs) ** -0.5
        assert down.shape == (CONFIG.num_layers, *shape.inputs, 64)
        assert tree[name]["up"].shape == (CONFIG.num_layers, 64, *shape.outputs)
        assert 0.99 * bound < np.abs(down).max() <= bound
        assert abs(down.std() / (bound / 3**0.5) - 1) < 0.03
        assert not np.asarray(tree[name]["up"]).any()
    few = init_lora(dataclasses.replace(CONFIG, hidden_size=100), jax.random.key(0), 64, ("v_proj",))
    np.testing.assert_array_equal(few["v_proj"]["down"], tree["v_proj"]["down"])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_equal_those_through_the_merged_kernels(remat):
    config, tree = dataclasses.replace(CONFIG, remat=remat), moved()

    def through_merged(tree: Any) -> jax.Array:
        return loss(config, merge_lora(frozen(), tree, SCALE), {})

    ours = jax.jit(jax.grad(lambda t: loss(config, frozen(), t)))(tree)
    assert difference(ours, jax.jit(jax.grad(through_merged))(tree)) <= 1e-4
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(ours))


def product_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    """Sorted output shapes of every matrix product in a program, whatever loop or call it stands in."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes += [tuple(sorted(out.aval.shape)) for out in equation.outvars]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            shapes += product_shapes(inner) if hasattr(inner, "eqns") else []
    return shapes


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_gradient_of_a_frozen_kernel_is_computed(remat):
    config, params = dataclasses.replace(CONFIG, remat=remat), frozen()
    kernels = {
        tuple(sorted(x.shape[1:]))
        for path, x in jax.tree_util.tree_leaves_with_path(params["layers"])
        if "kernel" in jax.tree_util.keystr(path)
    }
    ours = jax.make_jaxpr(jax.grad(lambda t, p: loss(config, p, t)))(moved(), params)
    assert not kernels & set(product_shapes(ours.jaxpr))
    of_the_lm = jax.make_jaxpr(jax.grad(lambda p, t: loss(config, p, t)))(params, moved())
    assert kernels <= set(product_shapes(of_the_lm.jaxpr)), "the shapes would show a weight gradient"


def test_the_mean_over_dropout_masks_is_the_undropped_update():
    kernel = jax.random.normal(jax.random.key(0), (6, 5))
    down, up = jax.random.normal(jax.random.key(1), (6, 2)), jax.random.normal(jax.random.key(2), (2, 5))
    x = jax.random.normal(jax.random.key(3), (4, 6))

    def update(key: jax.Array) -> jax.Array:
        return LowRankKernel(kernel, down, up, Dropout(key, 0.3), SCALE).update(x, 1)

    drawn = np.asarray(jax.vmap(update)(jax.random.split(jax.random.key(4), 20_000)))
    undropped = np.asarray(LowRankKernel(kernel, down, up, scale=SCALE).update(x, 1))
    error = drawn.std(axis=0) / len(drawn) ** 0.5
    assert (np.abs(drawn.mean(axis=0) - undropped) <= 5 * error).all()
    assert (error > 0).all()


def test_dropout_depends_on_its_key_alone_and_differs_by_layer_and_projection():
    joined = with_lora(frozen(), moved(), SCALE, jax.random.key(1), 0.4)["layers"]
    kernels = [*joined["attention"].values(), *joined["mlp"].values()]
    keys = np.concatenate([jax.random.key_data(p["kernel"].dropout.key) for p in kernels])
    assert len(np.unique(keys, axis=0)) == len(ALL) * CONFIG.num_layers

    def run(seed: int) -> jax.Array:
        return logits(CONFIG, with_lora(frozen(), moved(), SCALE, jax.random.key(seed), 0.4))

    np.testing.assert_array_equal(run(1), run(1))
    assert difference(run(1), run(2)) > 1e-2
    without = with_lora(frozen(), moved(), SCALE, jax.random.key(1), 0.0)
    np.testing.assert_array_equal(logits(CONFIG, without), logits(CONFIG, with_lora(frozen(), moved(), SCALE)))


def test_the_backward_pass_draws_the_masks_of_the_forward_pass():
    """Finite differences along a direction, under remat, which draws the masks twice."""
    config, key, tree = dataclasses.replace(CONFIG, remat="full"), jax.random.key(9), moved()
    of = jax.jit(lambda t: loss(config, frozen(), t, key, 0.4))
    direction = jax.tree.map(lambda x: 0.5 * x, moved(seed=8))
    slope = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(jax.tree.leaves(jax.jit(jax.grad(of))(tree)), jax.tree.leaves(direction), strict=True)
    )

    def at(step: float) -> float:
        return float(of(jax.tree.map(lambda x, d: x + step * d, tree, direction)))

    assert abs((at(1e-2) - at(-1e-2)) / 2e-2 - slope) <= 0.02 * abs(slope)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_lm_takes_the_update_beside_its_integers(quantization):
    config = dataclasses.replace(CONFIG, quantization=quantization)
    params = quantize_params(config, frozen())
    plain = jax.tree.map(
        lambda leaf: leaf.dequantized() if hasattr(leaf, "dequantized") else leaf,
        params,
        is_leaf=lambda leaf: hasattr(leaf, "dequantized"),
    )
    expected, gradients = jax.jit(jax.value_and_grad(lambda t, p: loss(CONFIG, p, t)))(moved(), plain)
    ours = jax.jit(jax.value_and_grad(lambda t, p: loss(config, p, t)))(moved(), params)
    assert difference(ours[0], expected) <= 1e-6
    assert difference(ours[1], gradients) <= 1e-4
    with pytest.raises(UserError, match=r"kernels of \w+_proj are quantised.*model\.quantization = none"):
        merge_lora(params, moved(), SCALE)


def test_a_bfloat16_lm_takes_a_float32_update():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen())
    tree = moved(targets=("q_proj", "down_proj"))
    exact = logits(CONFIG, with_lora(frozen(), tree, SCALE))
    assert difference(logits(config, with_lora(params, tree, SCALE)), exact) <= 0.1
    merged = merge_lora(params, tree, SCALE)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    assert difference(logits(config, merged), exact) <= 0.1
    gradients = jax.jit(jax.grad(lambda t: loss(config, params, t, jax.random.key(0), 0.1)))(tree)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_one_device_equals_eight():
    mesh = make_mesh(2, 2, 2)
    names = jax.tree.map(
        lambda leaf: leaf.names, abstract_params(CONFIG), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    params = jax.tree.map(lambda x, axes: jax.device_put(x, parameter_sharding(mesh, axes, x.shape)), frozen(), names)
    tree = jax.device_put(moved(), replicated(mesh))
    value = jax.jit(jax.value_and_grad(lambda t, p, k: loss(CONFIG, p, t, k, 0.3)))
    one = value(moved(), frozen(), jax.random.key(0))
    many = value(tree, params, jax.device_put(jax.random.key(0), replicated(mesh)))
    assert difference(many, one) <= 1e-5
    merged = merge_lora(params, tree, SCALE)
    assert difference(merged, merge_lora(frozen(), moved(), SCALE)) <= 1e-6
    for ours, given in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert ours.sharding.is_equivalent_to(given.sharding, ours.ndim)


@pytest.mark.parametrize(
    ("gated", "targets", "words"),
    [
        (True, ("q_porj",), ["'q_porj'", "allowed: q_proj, k_proj", "Did you mean 'q_proj'?"]),
        (False, ("gate_proj",), ["'gate_proj'", "allowed: q_proj, k_proj, v_proj, o_proj, up_proj, down_proj"]),
        (True, (), ["names no projection", "down_proj"]),
    ],
)
def test_an_unknown_target_is_told_in_a_sentence(gated, targets, words):
    with pytest.raises(UserError) as told:
        init_lora(dataclasses.replace(CONFIG, gated_mlp=gated), jax.random.key(0), RANK, targets)
    assert all(word in str(told.value) for word in words), told.value


def test_a_tree_of_another_lm_is_refused_with_both_shapes():
    other = dataclasses.replace(CONFIG, num_layers=3)
    for change in (with_lora, merge_lora):
        with pytest.raises(UserError, match=r"q_proj has shapes \(3, 32, 3\).*\(2, 32, 4, 8\)"):
            change(frozen(), moved(other, ("q_proj",)), SCALE)
    plain = dataclasses.replace(CONFIG, gated_mlp=False)
    with pytest.raises(UserError, match=r"holds 'gate_proj'.*allowed: q_proj, k_proj, v_proj, o_proj, up_proj"):
        with_lora(random_params(plain, jax.random.key(0)), moved(targets=("gate_proj",)), SCALE)
    with pytest.raises(UserError, match=r"lora\.dropout is 1\.0"):
        with_lora(frozen(), moved(), SCALE, jax.random.key(0), 1.0)
    with pytest.raises(UserError, match=r"lora\.rank is 0"):
        init_lora(CONFIG, jax.random.key(0), 0, ALL)
