"""The laws of the method hold for its rivals: layouts, micro-batches, devices, and what has a gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from spt_jax.config import default_config
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch, row_sharding
from spt_jax.prompting.adapters import EncodedPrompt, LowRank, Nothing, Prefixes, SoftPrompts, WholeModel
from spt_jax.prompting.objective import LM_ALONE, Objective, losses_and_gradients
from spt_jax.prompting.retriever import RetrieverConfig
from spt_jax.prompting.selective_lm import SelectiveLM, score_turns
from spt_jax.training.description import describe, objective_of
from spt_jax.training.step import init_state, make_train_step, state_shardings

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {
    "prefix_tuning": Prefixes(1, 4, 0.5),
    "prefix_tuning encoded": Prefixes(1, 4, encoder_width=6),
    "p_tuning": EncodedPrompt(4),
    "lora": LowRank(3, 6.0, 0.0, ALL_TARGETS),
    "full": WholeModel(),
}
# To the LM a prompt or prefix is the same whatever it comes from, so that two methods of encoders wait for a campaign.
ENCODED = ("p_tuning", "prefix_tuning encoded")
METHODS = [pytest.param(name, marks=pytest.mark.campaign if name in ENCODED else ()) for name in ADAPTERS]
RATE = 0.5


def model_of(adapter: Any) -> SelectiveLM:
    return SelectiveLM(tiny.CONFIG, adapter, max_logit_rows=64)


@functools.cache
def start(name: str) -> Any:
    """A first tree; LoRA's second factors are moved away from 0, where its first factors have no gradient."""
    tree = model_of(ADAPTERS[name]).init(jax.random.key(1), tiny.params())
    if name != "lora":
        return tree
    return jax.tree.map(lambda x: x if x.any() else 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), tree)


@functools.cache
def batch_of(layout: str, order: tuple[int, ...] | None = None) -> dict[str, jax.Array]:
    """The two shortest dialogues, or their five turns and a row of padding."""
    batch = tiny.packed(layout, tiny.DIALOGUES[2:]).batch(order, rows=6 if layout == "turn" else 0)
    return {name: x for name, x in batch.items() if name != "similar"}


@functools.cache
def run(name: str, layout: str = "dialogue", micro_batches: int = 1) -> Any:
    batch = batch_of(layout)
    # The whole LM is its own frozen tree's replacement: that one may be empty.
    frozen = {} if name == "full" else tiny.params()
    return tiny.STEP(model_of(ADAPTERS[name]), LM_ALONE, frozen, start(name), batch, micro_batches)


def difference(a: Any, b: Any) -> float:
    return tiny.relative_difference(
        (a[0].total, a[0].lm, a[0].selected_nll, a[1]), (*b[0][:2], b[0].selected_nll, b[1])
    )


@pytest.mark.parametrize("name", METHODS)
def test_dialogues_at_once_equal_their_turns_in_micro_batches(name):
    assert difference(run(name), run(name, "turn", micro_batches=2)) <= 2e-5
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(run(name)[1]))


@pytest.mark.campaign
@pytest.mark.parametrize("name", METHODS)
def test_dialogue_layout_equals_turn_layout_and_one_batch_its_micro_batches(name):
    assert difference(run(name), run(name, "turn")) <= 2e-5
    assert difference(run(name, micro_batches=2), run(name)) <= 2e-5


@pytest.mark.parametrize("name", METHODS)
def test_one_device_equals_eight(name):
    mesh = make_mesh(2, 2, 2)
    layout = tiny.layout_of(tiny.CONFIG, mesh)
    model = dataclasses.replace(model_of(ADAPTERS[name]), row_sharding=row_sharding(mesh))
    optimizer = optax.sgd(RATE, momentum=0.9)
    own = {"lm": layout} if name == "full" else None
    state = init_state(start(name), optimizer, mesh, own)
    frozen = {} if name == "full" else jax.device_put(tiny.params(), layout)
    shardings = state_shardings(start(name), optimizer, mesh, own)
    step = make_train_step(model, LM_ALONE, optimizer, mesh, 2, shardings=shardings)
    batch = jax.tree.map(np.asarray, batch_of("dialogue", (0, -1, -1, -1, -1, -1, 1, -1)))
    state, metrics = step(state, frozen, place_batch(mesh, batch))
    losses, gradients = run(name)
    assert float(metrics["loss/total"]) == pytest.approx(float(losses.total), rel=1e-5)
    moved = jax.tree.map(lambda new, old: (np.asarray(old) - np.asarray(new)) / RATE, state.trainable, start(name))
    assert tiny.relative_difference(moved, gradients) <= 2e-5
    assert jax.tree.map(lambda x: x.sharding, (state.trainable, state.optimizer)) == (
        shardings.trainable,
        shardings.optimizer,
    )
    if name == "full":
        trace = jax.tree.leaves(state.optimizer[0].trace)
        for weights in (jax.tree.leaves(state.trainable), trace):
            whole = sum(x.size for x in weights)
            assert sum(x.addressable_shards[0].data.size for x in weights) < 0.3 * whole


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside of scans and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def weight_shapes() -> set[tuple[int, ...]]:
    """Shapes of the LM's matrices, stacked over layers, over all but the last, and of one layer."""
    stacked = [x.shape for x in jax.tree.leaves(tiny.params()["layers"]) if x.ndim > 2]
    but_last = [(layers - 1, *shape) for layers, *shape in stacked]
    return {*stacked, *but_last, *(shape[1:] for shape in stacked), tiny.params()["lm_head"].shape}


def made_by_products(
    adapter: Any, retriever: RetrieverConfig | None, objective: Objective, unrolled: bool
) -> set[tuple[int, ...]]:
    """Shapes, up to their axes' order, of everything that a step gets as a matrix product, sums up or keeps."""
    decoder = dataclasses.replace(tiny.CONFIG, unrolled=unrolled)
    model = SelectiveLM(decoder, adapter, retriever, max_logit_rows=64)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    step = functools.partial(losses_and_gradients, model, objective)
    # So many rows as no weight has layers, heads or features: no hidden state has the shape of a weight by chance.
    batch = tiny.packed("dialogue", tiny.DIALOGUES[2:]).batch(rows=5)
    traced = jax.make_jaxpr(step)(tiny.params(), tree, batch)
    return {
        tuple(sorted(out.aval.shape))
        for equation in equations(traced.jaxpr)
        if equation.primitive.name in ("dot_general", "add_any", "scan")
        for out in equation.outvars
    }


@pytest.mark.parametrize("unrolled", [False, True])
def test_only_full_fine_tuning_makes_gradients_of_weights_and_nothing_copies_them(unrolled):
    weights = {tuple(sorted(shape)) for shape in weight_shapes()}
    made = made_by_products(WholeModel(), None, LM_ALONE, unrolled)
    assert all(tuple(sorted(x.shape)) in made for x in jax.tree.leaves(tiny.params()) if x.ndim > 1)
    assert not weights & made_by_products(Prefixes(3, 4, keys=True), None, LM_ALONE, unrolled)
    assert not weights & made_by_products(SoftPrompts(3, 4), RetrieverConfig(sides="none"), Objective(), unrolled)
    assert not weights & made_by_products(ADAPTERS["lora"], None, LM_ALONE, unrolled)


def test_micro_batches_and_steps_drop_out_differently():
    """Of one dialogue, twice in a batch: parts that shared a key would have the same likelihoods."""
    model = model_of(dataclasses.replace(ADAPTERS["lora"], dropout=0.5))
    batch, tree = batch_of("dialogue", (0, 0)), start("lora")
    found = [
        tiny.STEP(model, LM_ALONE, tiny.params(), tree, batch, micro_batches, key)[0].nll
        for micro_batches, key in ((2, jax.random.key(0)), (2, jax.random.key(0)), (2, None))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[2][0], found[2][1], rtol=1e-5)
    present = np.asarray(batch["turn_mask"][0]) > 0
    assert np.abs(found[0][0] - found[0][1])[present].min() > 1e-3
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = optax.sgd(0.0)
    step = make_train_step(model, LM_ALONE, optimizer, mesh, 2, seed=3)
    state, losses = init_state(tree, optimizer, mesh), []
    for _ in range(2):
        state, metrics = step(state, tiny.params(), place_batch(mesh, jax.tree.map(np.asarray, batch)))
        losses.append(float(metrics["loss/lm"]))
    assert abs(losses[0] - losses[1]) > 1e-3


SCORE = jax.jit(score_turns, static_argnums=0)


def test_low_rank_updates_of_zero_and_untrained_weights_are_the_lm_itself():
    batch = batch_of("dialogue")
    bare = SCORE(model_of(Nothing()), tiny.params(), {}, batch)
    for name in ("lora", "full"):
        model = model_of(ADAPTERS[name])
        found = SCORE(model, tiny.params(), model.init(jax.random.key(1), tiny.params()), batch)
        np.testing.assert_array_equal(found.nll, bare.nll)
        np.testing.assert_array_equal(found.scores, bare.scores)


def test_a_trained_whole_model_is_what_is_scored_and_not_the_frozen_one():
    batch = batch_of("dialogue")
    other = {"lm": tiny.params(seed=5)}
    expected = SCORE(model_of(Nothing()), other["lm"], {}, batch)
    found = SCORE(model_of(WholeModel()), tiny.params(), other, batch)
    np.testing.assert_array_equal(found.nll, expected.nll)


def test_prompt_tuning_is_selective_prompt_tuning_with_one_prompt_and_no_other_loss():
    batch = batch_of("dialogue")
    adapter = SoftPrompts(1, 4, stddev=0.5)
    chosen = SelectiveLM(tiny.CONFIG, adapter, RetrieverConfig(), max_logit_rows=64)
    tree = chosen.init(jax.random.key(1))
    spt, spt_gradients = tiny.STEP(chosen, LM_ALONE, tiny.params(), tree, batch)
    bank = {"bank": tree["bank"]}
    alone, gradients = tiny.STEP(model_of(adapter), LM_ALONE, tiny.params(), bank, batch)
    assert set(gradients) == {"bank"}
    assert float(alone.total) == pytest.approx(float(spt.total), rel=1e-6)
    assert tiny.relative_difference(gradients["bank"], spt_gradients["bank"]) <= 1e-5


TREES = {
    "spt": {"bank": {"prompts"}, "retriever": {"lin"}},
    "prompt_tuning": {"bank": {"prompts"}},
    "prefix_tuning": {"bank": {"prefixes"}},
    "p_tuning": {"prompt_encoder": {"embedding", "lin_0", "lin_1", "lin_2"}},
    "lora": {"lora": {"q_proj", "v_proj"}},
    "full": {"lm": {"embed_tokens", "final_norm", "layers", "lm_head"}},
    "zero_shot": {},
    "few_shot": {},
}


@pytest.mark.parametrize("kind", TREES)
def test_a_method_learns_what_it_is_named_for_and_a_rival_has_no_retriever(kind):
    config = default_config()
    config.method.kind = kind
    model = describe(config, tiny.CONFIG)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert {name: set(part) for name, part in tree.items()} == TREES[kind]
    assert model.num_prompts == (4 if kind == "spt" else 1)
    objective = objective_of(config)
    assert (objective == LM_ALONE) == (kind != "spt")
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, tree))


def test_a_bank_of_prefixes_has_a_key_a_prefix_for_the_retriever():
    config = default_config()
    config.bank.kind = "prefixes"
    model = describe(config, tiny.CONFIG)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert tree["bank"]["keys"].shape == (4, 32)
    assert tree["bank"]["prefixes"].shape == (4, 2, 2, 8, 2, 8)
    assert set(tree) == {"bank", "retriever"}
