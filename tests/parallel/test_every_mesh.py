"""Every mesh of eight devices, every method, quantised or not: one device's step, and no traffic without need."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny

from spt_jax.config import default_config
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import quantize_params
from spt_jax.parallel.collectives import Collective, collectives
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch, place_whole_batch
from spt_jax.prompting.selective_lm import score_turns
from spt_jax.training.description import describe, objective_of
from spt_jax.training.step import init_state, make_train_step, state_shardings

MESHES = [(d, f, 8 // d // f) for d, f in itertools.product((1, 2, 4, 8), repeat=2) if d * f <= 8]
KINDS = ("spt", "prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full")
CASES = [
    (kind, quantization, mesh)
    for kind, quantization, mesh in itertools.product(KINDS, ("none", "int8", "int4"), MESHES)
    if kind != "full" or quantization == "none"  # else there are no floats to learn
]
# Weights gathered, activations summed, weights learned; prompts, a prefix, matrices of each layer, the LM.
SHORT = {
    ("spt", "int8", (1, 4, 2)),
    ("spt", "int4", (1, 4, 2)),
    ("prefix_tuning", "none", (2, 1, 4)),
    ("lora", "none", (2, 2, 2)),
    ("full", "none", (4, 2, 1)),
}
RATE = 0.5
SCALARS = 4096
"""Bytes: losses, pairs and the retriever's scores of a batch of four dialogues take less."""


@dataclasses.dataclass(frozen=True)
class Stepped:
    """One step of plain gradient descent, so that the move shows the gradient."""

    metrics: Any
    gradient: Any
    found: list[Collective]


def decoder_of(quantization: str) -> DecoderConfig:
    return dataclasses.replace(tiny.CONFIG, quantization=quantization)


def config_of(kind: str) -> Any:
    config = default_config()
    config.method.kind = kind
    config.bank.num_prompts, config.bank.prompt_length, config.bank.init_stddev = 3, 4, 0.5
    config.lora.rank, config.lora.dropout = 2, 0.0
    config.model.max_logit_rows = 64
    return config


@functools.cache
def first_tree(kind: str) -> Any:
    """LoRA's second factors are moved away from 0, where its first factors have no gradient."""
    model = describe(config_of(kind), decoder_of("none"))
    if kind == "full":
        return {"lm": tiny.params()}
    tree = model.init(jax.random.key(1), tiny.params())
    return jax.tree.map(lambda x: x if x.any() else 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), tree)


@functools.cache
def stepped(kind: str, quantization: str, sizes: tuple[int, int, int]) -> Stepped:
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    config, decoder, optimizer = config_of(kind), decoder_of(quantization), optax.sgd(RATE)
    layout, first = tiny.layout_of(decoder, mesh), first_tree(kind)
    own = {"lm": layout} if kind == "full" else None
    frozen = {} if kind == "full" else jax.device_put(quantize_params(decoder, tiny.params()), layout)
    batch = tiny.packed("dialogue").batch([0, -1, 1, -1, 2, -1, 3, -1])
    host = {name: np.asarray(x) for name, x in batch.items() if kind == "spt" or name != "similar"}
    step = make_train_step(
        describe(config, decoder, mesh),
        objective_of(config),
        optimizer,
        mesh,
        shardings=state_shardings(first, optimizer, mesh, own),
    )
    arguments = init_state(first, optimizer, mesh, own), frozen, place_batch(mesh, host)
    compiled: Any = step.lower(*arguments).compile()  # pyright: ignore[reportFunctionMemberAccess]
    state, metrics = jax.device_get(step(*arguments))  # a compiled step refuses int4 arrays (jax 0.10)
    gradient = jax.tree.map(lambda new, old: (np.asarray(old) - new) / RATE, state.trainable, first)
    return Stepped(metrics, gradient, collectives(compiled.as_text()))


def cases() -> list[Any]:
    return [
        pytest.param(*case, marks=() if case in SHORT else pytest.mark.campaign, id="-".join(map(str, case)))
        for case in CASES
    ]


def largest_matrix() -> int:
    """Bytes of the largest matrix of one layer in the type of the arithmetic, in which integers are gathered too."""
    return max(x.nbytes // len(x) for x in jax.tree.leaves(tiny.params()["layers"]) if x.ndim > 2)


@pytest.mark.parametrize(("kind", "quantization", "sizes"), cases())
def test_one_device_equals_eight_and_only_what_a_layer_needs_moves(kind, quantization, sizes):
    one, many = stepped(kind, quantization, (1, 1, 1)), stepped(kind, quantization, sizes)
    assert tiny.relative_difference(many.metrics, one.metrics) <= 1e-5
    assert tiny.relative_difference(many.gradient, one.gradient) <= 1e-5
    assert one.found == []
    check_traffic(many.found, kind, sizes)


def check_traffic(found: list[Collective], kind: str, sizes: tuple[int, int, int]) -> None:
    """What `docs/scaling.md` says of the collectives of a step."""
    _, fsdp, tensor = sizes
    learned = sum(x.nbytes for x in jax.tree.leaves(first_tree(kind)))
    # Nothing changes its place: arrays are summed and gathered where they are needed, and never exchanged, unless
    # devices along `tensor` share the heads of keys and values.
    kinds = {"all-gather", "all-reduce"} | ({"reduce-scatter"} if kind == "full" else set())
    shared = tensor > tiny.CONFIG.num_key_value_heads
    assert {c.kind for c in found} <= kinds | ({"collective-permute"} if shared else set())
    for permute in [c for c in found if c.kind == "collective-permute"]:
        assert permute.bytes <= (largest_matrix() // (fsdp * tensor) if permute.in_loop else SCALARS)
    gathers = [c for c in found if c.kind == "all-gather"]
    in_layers = [c for c in gathers if c.in_loop]
    whole = [c for c in gathers if not c.in_loop and c.bytes >= SCALARS]
    if fsdp == 1:
        # Keys' and values' matrices that `tensor` does not divide are whole everywhere, and their updates are not.
        updates = (
            {tiny.params()["layers"]["attention"]["k_proj"]["kernel"].nbytes} if kind == "full" and shared else set()
        )
        assert not in_layers and {c.bytes for c in whole} <= updates and len(whole) <= 2
    else:
        assert in_layers, "the weights of a layer are gathered where it is computed"
        assert max(c.bytes for c in in_layers) <= largest_matrix()
        if kind != "full":
            vocabulary = tiny.params()["lm_head"].nbytes // tensor
            assert [c.bytes for c in whole] == [vocabulary] * 2, "the vocabulary's two tables, once"
    if kind != "full":
        # The data axis, which may run over a slow network, carries nothing a layer, or a chunk of targets, at a time:
        # but for the gradients of LoRA's matrices, which each layer has.
        inner = fsdp * tensor
        crossing = [c for c in found if c.in_loop and any(len({i // inner for i in group}) > 1 for group in c.groups)]
        sums = [c for c in found if c.kind == "all-reduce" and c.in_loop and tensor == 1]
        if kind == "lora":
            assert all(c.kind == "all-reduce" for c in crossing)
            assert sum(c.bytes * c.times for c in crossing + [c for c in sums if c not in crossing]) <= learned
        else:
            assert not crossing and not sums
    if tensor == 1 and kind != "full":
        assert sum(c.bytes for c in found if c.kind == "all-reduce") <= 2 * learned + SCALARS


def test_scoring_with_a_trained_lm_gathers_the_tables_of_the_vocabulary_once_and_not_for_each_chunk_of_targets():
    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    model = dataclasses.replace(describe(config_of("full"), decoder_of("none"), mesh), max_logit_rows=8)
    tree = {"lm": jax.device_put(tiny.params(), tiny.layout_of(model.decoder, mesh))}
    batch = tiny.packed("dialogue").batch([0, -1, 1, -1])
    host = {name: np.asarray(x) for name, x in batch.items() if name != "similar"}
    score = jax.jit(score_turns, static_argnums=0)
    compiled = score.lower(model, {}, tree, place_whole_batch(mesh, host)).compile()
    text = compiled.as_text()
    assert " while(" in text, "the targets come in chunks"
    gathers = [c for c in collectives(text) if c.kind == "all-gather"]
    assert [c.in_loop for c in gathers if c.bytes > largest_matrix()] == [False, False]
