"""The programs of a run as JAX traces them, from shapes and shardings alone: no weight is made, no device is needed."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from spt_jax.config import Config
from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate, training_contexts
from spt_jax.generation.decode import begin, decode_loop, prefill
from spt_jax.generation.decoding import Decoding
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.weights import map_boxes
from spt_jax.parallel.rules import cache_sharding, parameter_sharding, replicated, row_devices, row_sharding
from spt_jax.planning.arithmetic import product_flops
from spt_jax.prompting.selective_lm import SelectiveLM
from spt_jax.training.description import describe, front_length, objective_of
from spt_jax.training.experiment import check_rows
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.remat import with_remat
from spt_jax.training.step import TrainState, make_train_step, state_shardings

Shapes = Any
"""A tree of `jax.ShapeDtypeStruct` with shardings."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function with the shapes of its arguments.

    Attributes:
        name: What it does.
        function: The jitted function.
        arguments: Positional ones, `Shapes`.
        options: Keyword arguments.
    """

    name: str
    function: Any
    arguments: tuple[Shapes, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def trace(self) -> Any:
        """The traced function, whose ``jaxpr`` tells its arithmetic and whose ``lower()`` leads to the compiler."""
        return self.function.trace(*self.arguments, **self.options)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A run's train step, and what it was made of; see `train_step`."""

    config: Config
    decoder: DecoderConfig
    mesh: Mesh
    shape: BucketShape
    remat: str
    program: Program

    @property
    def state(self) -> Shapes:
        """The `TrainState`: what is learned, its moments and counters."""
        return self.program.arguments[0]

    @property
    def frozen(self) -> Shapes:
        """The LM's weights; an empty dict where they are learned."""
        return self.program.arguments[1]

    @property
    def batch(self) -> Shapes:
        """The rows, arrays by name."""
        return self.program.arguments[2]

    @property
    def flops(self) -> float:
        """Of its matrix products, on all devices; traced anew each time."""
        return product_flops(self.program.trace().jaxpr.jaxpr)


def frozen_shapes(decoder: DecoderConfig, mesh: Mesh) -> Shapes:
    """The frozen tree, where loading would put it."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = parameter_sharding(mesh, leaf.names, leaf.value.shape)
        return jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype, sharding=sharding)

    return map_boxes(one, abstract_params(decoder))


def traceable(config: Config, decoder: DecoderConfig, mesh: Mesh) -> SelectiveLM:
    """What a run describes; for GPUs, in whose places CPUs are, with XLA's attention, which these can trace."""
    if mesh.devices.flat[0].platform == "cpu":
        config = copy.deepcopy(config)
        config.model.attention = "xla"
    return describe(config, decoder, mesh)


def train_step(config: Config, decoder: DecoderConfig, mesh: Mesh, shape: BucketShape, remat: str) -> TrainStep:
    """The train step of a run of `config`, on batches of `shape`.

    Args:
        config: A validated configuration; its mesh is not looked at.
        decoder: The LM.
        mesh: Of the devices that there would be.
        shape: T, S and N of the batch; D is ``data.batch``.
        remat: The policy, one of `spt_jax.training.remat.POLICIES`.

    Raises:
        UserError: The devices cannot share the batch's rows.
    """
    check_rows(config, mesh)
    model = with_remat(traceable(config, decoder, mesh), remat)
    optimizer = make_optimizer(config.optimizer, 1)
    frozen = frozen_shapes(model.decoder, mesh)
    trainable = jax.eval_shape(lambda params: model.init(jax.random.key(0), params), frozen)
    own = None
    if config.method.kind == "full":
        # As `run_training` does: the state holds the weights, where they were.
        own = {"lm": jax.tree.map(lambda leaf: leaf.sharding, frozen)}
        frozen = {}
    shardings = state_shardings(trainable, optimizer, mesh, own)
    zero = jnp.int32(0)
    state = jax.eval_shape(lambda tree: TrainState(tree, optimizer.init(tree), zero, zero, zero), trainable)
    step = make_train_step(
        model, objective_of(config), optimizer, mesh, config.optimizer.micro_batches, shardings=shardings
    )
    program = Program("train step", step, (_placed(state, shardings), frozen, _batch(config, mesh, shape)))
    return TrainStep(config, decoder, mesh, shape, remat, program)


def _placed(tree: Any, shardings: Any) -> Shapes:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _batch(config: Config, mesh: Mesh, shape: BucketShape) -> Shapes:
    """A batch as the loader makes it and `spt_jax.parallel.rules.place_batch` places it."""
    empty = np.full(config.data.batch, -1, np.int64)
    batch: dict[str, Any] = dict(collate([], empty, shape, 0))
    if config.retriever.context == "official":
        batch |= training_contexts([], empty, config.data.max_length, 0)
    if config.method.kind == "spt" and config.objective.contrastive_weight:
        batch["similar"] = jax.ShapeDtypeStruct((len(empty) * shape.turns,) * 2, bool)
    rows, same = row_sharding(mesh), replicated(mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=same if name == "similar" else rows)
        for name, x in batch.items()
    }


def generation(config: Config, decoder: DecoderConfig, mesh: Mesh, length: int) -> list[Program]:
    """The programs that reply to a batch: reading its contexts, the first token, and the loop over the others.

    Args:
        config: A validated configuration; ``evaluation.batch`` rows get ``evaluation.max_new_tokens`` tokens by its
            section ``generation``, which asks for no beams.
        decoder: The LM.
        mesh: Of the devices that there would be.
        length: Tokens of the longest context.
    """
    model = describe(config, decoder, mesh)
    c, rows, room = model.decoder, config.evaluation.batch, config.evaluation.max_new_tokens
    spread = row_sharding(mesh) if rows % row_devices(mesh) == 0 else replicated(mesh)
    decoding = Decoding.of(config.generation)
    rule, eos_ids = decoding.rule([0]), jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated(mesh))
    frozen, on = frozen_shapes(c, mesh), partial(_on, spread)
    prefix = (rows, c.num_layers, 2, front_length(config), c.num_key_value_heads, c.head_dim)
    texts = (on(prefix, c.jax_dtype), on((rows, length), jnp.int32), on((rows,), jnp.int32))
    reading = Program("reading contexts", prefill, (c, frozen, *texts))
    context, logits = _results(reading, spread)
    strands = decoding.samples if decoding.draws else 1
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (rows, strands)))
    start = (c, logits, on((rows,), jnp.bool_), on(keys.shape, keys.dtype), eos_ids)
    options = {"rule": rule, "row_sharding": spread if mesh.size > 1 else None}
    first = Program("first token", begin, start, {"room": room, **options})
    state = _results(first, spread)
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return [
        reading,
        Program("further tokens", decode_loop, (c, frozen, context, state, eos_ids, until), options),
    ]


def _on(sharding: NamedSharding, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _results(program: Program, rows: NamedSharding) -> Shapes:
    """The shapes of what a program gives, rows where the caches have them."""
    found = jax.eval_shape(partial(program.function, program.arguments[0], **program.options), *program.arguments[1:])

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.ndim == 5:  # keys and values
            return _on(cache_sharding(rows, x.shape), x.shape, x.dtype)
        return _on(rows if x.ndim else replicated(rows.mesh), x.shape, x.dtype)

    return jax.tree.map(placed, found)
