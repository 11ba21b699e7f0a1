"""What is planned is what a run compiles: the same shapes, types and shardings; and generation's programs compile."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tiny

from spt_jax.config import Config, default_config
from spt_jax.data.buckets import BucketShape
from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.generation import batch as batch_module
from spt_jax.generation.decode import decode_loop
from spt_jax.generation.engine import GenerationEngine
from spt_jax.models.random_lm import random_lm_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, place_batch, replicated, row_sharding
from spt_jax.planning.compilation import compile_program
from spt_jax.planning.programs import Program, frozen_shapes, generation, train_step
from spt_jax.training.description import describe
from spt_jax.training.experiment import make_loader, pack_dialogues
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.remat import step_memory
from spt_jax.training.step import init_state


def tiny_config(**options: Any) -> Config:
    config = default_config()
    config.data.batch, config.data.max_length, config.evaluation.batch = 8, 224, 8
    config.evaluation.max_new_tokens = 4
    config.bank.num_prompts, config.bank.prompt_length = 2, 3
    for name, value in options.items():
        section, option = name.split("__")
        config[section][option] = value
    return config


def as_compiled(tree: Any) -> list[Any]:
    """Shape, type and placement of every array, by name."""

    def one(x: Any) -> Any:
        return x.shape, str(x.dtype), x.sharding.shard_shape(x.shape), x.sharding.is_fully_replicated

    return [(jax.tree_util.keystr(path), one(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method__kind": "lora", "optimizer__clip_norm": 0.0},
        {"method__kind": "full"},
        {"bank__kind": "prefixes", "bank__init": "normal", "objective__contrastive_weight": 0.0},
    ],
)
def test_a_planned_step_has_the_arguments_of_a_runs_step(options):
    config, mesh = tiny_config(**options), make_mesh(data=2, fsdp=2, tensor=2)
    dialogues = read_dialogues("builtin:train").dialogues[:8]
    encoder: Any = tiny.CharacterEncoder()
    config.data.max_length = 1536
    loader = make_loader(config, pack_dialogues(config, dialogues, encoder), dialogues, mesh, 0)
    frozen = random_lm_params(tiny.CONFIG, sharding_for=lambda names, shape: parameter_sharding(mesh, names, shape))
    model, optimizer = describe(config, tiny.CONFIG, mesh), make_optimizer(config.optimizer, 1)
    first = model.init(jax.random.key(0), frozen)
    own = jax.tree.map(lambda x: x.sharding, first) if config.method.kind == "full" else None
    state = init_state(first, optimizer, mesh, own)
    batch = place_batch(mesh, loader.batch(0))
    program = train_step(config, tiny.CONFIG, mesh, loader.shape(0), "none").program
    wanted = (state, {} if config.method.kind == "full" else frozen, batch)
    for planned, real in zip(program.arguments, wanted, strict=True):
        assert as_compiled(planned) == as_compiled(real)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_planned_weights_are_those_that_loading_makes(quantization):
    mesh, decoder = make_mesh(data=2, fsdp=2, tensor=2), dataclasses.replace(tiny.CONFIG, quantization=quantization)
    made = random_lm_params(decoder, sharding_for=lambda names, shape: parameter_sharding(mesh, names, shape))
    assert as_compiled(frozen_shapes(decoder, mesh)) == as_compiled(made)


def test_rows_that_devices_cannot_share_are_refused_in_trainings_words():
    config, mesh = tiny_config(data__batch=6), make_mesh(data=2, fsdp=2, tensor=2)
    with pytest.raises(UserError, match=r"data\.batch is 6; allowed: a multiple of 4 \(mesh\.data × mesh\.fsdp = 4"):
        train_step(config, tiny.CONFIG, mesh, BucketShape(64, 16, 2), "none")


def test_what_is_compiled_is_counted_as_training_counts_it():
    mesh = make_mesh()
    square = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=replicated(mesh))
    program = Program("power", jax.jit(lambda x: jnp.sin(x @ x) @ x, donate_argnums=0), (square,))
    found = compile_program(program, mesh.size)
    assert found.counted == step_memory(program.function, square) > 0


def test_generation_reads_contexts_chooses_a_token_and_goes_on():
    config, mesh = tiny_config(), make_mesh(data=2, fsdp=2, tensor=2)
    reading, further = generation(config, tiny.CONFIG, mesh, 64)
    found = [compile_program(program, mesh.size, 3) for program in (reading, further)]
    tokens = config.evaluation.batch * 64
    c = tiny.CONFIG
    kernels = c.num_layers * (
        2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    head = config.evaluation.batch * c.hidden_size * c.vocab_size
    assert found[0].flops * mesh.size > 2 * (0.5 * tokens * kernels + head)
    assert found[1].flops * mesh.size > 2 * 3 * (config.evaluation.batch * kernels + head)
    assert all(each.fits and each.traffic is not None and each.traffic.hbm > 0 for each in found)


def test_a_planned_reply_has_the_arguments_of_the_engines():
    config, mesh = tiny_config(), make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(tiny.params(), tiny.layout_of(tiny.CONFIG, mesh))
    engine = GenerationEngine(
        tiny.CONFIG, params, eos_ids=[0], pad_id=0, max_batch=8, length_multiple=64, row_sharding=row_sharding(mesh)
    )
    seen = []

    def looked_at(*arguments: Any, **options: Any) -> Any:
        # Before the call, which takes the state with it.
        seen.append((as_compiled(arguments[2:4]), options["row_sharding"]))
        return decode_loop(*arguments, **options)

    bank = jnp.zeros((2, 3, tiny.CONFIG.hidden_size))
    with mock.patch.object(batch_module, "decode_loop", looked_at):
        engine.generate(bank, [[1, 2, 3]] * 8, [0, 1] * 4, max_new_tokens=4)
    _, further = generation(config, tiny.CONFIG, mesh, 64)
    assert seen == [(as_compiled(further.arguments[2:4]), further.options["row_sharding"])]
