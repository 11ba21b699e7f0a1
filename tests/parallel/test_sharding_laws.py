"""One device equals eight, and the frozen LM is really spread over them."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

from spt_jax.errors import UserError
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.parallel.mesh import make_mesh, sliced_devices
from spt_jax.parallel.rules import parameter_sharding, place_batch, replicated, row_devices, row_sharding
from spt_jax.prompting.objective import Objective
from spt_jax.prompting.selective_lm import SelectiveLM
from spt_jax.training.step import TrainState, init_state, make_train_step


def model_on(mesh: Mesh) -> SelectiveLM:
    return dataclasses.replace(tiny.MODEL, row_sharding=row_sharding(mesh))


OBJECTIVE = Objective(selection_weight=0.7, contrastive_weight=0.4, fusion_weight=0.9, gold_temperature=0.8)
RATE = 0.5
TRAINABLES = len(jax.tree.leaves(tiny.trainable()))


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def sharded_params(mesh: Mesh) -> Any:
    names = jax.tree.map(
        lambda leaf: leaf.names, abstract_params(tiny.CONFIG), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    return jax.tree.map(
        lambda x, axes: jax.device_put(x, parameter_sharding(mesh, axes, x.shape)), tiny.params(), names
    )


def host_batch() -> dict[str, np.ndarray]:
    """Eight rows, four of them dialogues and four padding, in an order that puts dialogues on several devices."""
    return {name: np.asarray(x) for name, x in tiny.packed("dialogue").batch([0, -1, 1, -1, 2, -1, 3, -1]).items()}


def start(mesh: Mesh) -> TrainState:
    return init_state(tiny.trainable(), optax.sgd(RATE), mesh)


@functools.cache
def one_step(data: int, fsdp: int, tensor: int, micro_batches: int = 1) -> Any:
    """Metrics and moved trainables of one step; plain gradient descent, so that the move shows the gradient."""
    mesh = mesh_of(data, fsdp, tensor)
    step = make_train_step(model_on(mesh), OBJECTIVE, optax.sgd(RATE), mesh, micro_batches)
    state, metrics = step(start(mesh), sharded_params(mesh), place_batch(mesh, host_batch()))
    return jax.device_get((metrics, state.trainable))


def gradients(result: Any) -> Any:
    return jax.tree.map(lambda new, old: (np.asarray(old) - new) / RATE, result[1], jax.device_get(tiny.trainable()))


@pytest.mark.parametrize(
    "shape",
    [(8, 1, 1), (1, 8, 1), (1, 1, 2), (1, 1, 4), (2, 2, 2), (2, 2, 2, 2), (4, 1, 1, 2)],
    ids=lambda shape: "data{}-fsdp{}-tensor{}-micro{}".format(*shape, *[1][: 4 - len(shape)]),
)
def test_one_device_equals_eight(shape):
    one, many = one_step(1, 1, 1), one_step(*shape)
    assert tiny.relative_difference(many[0], one[0]) <= 1e-5
    assert tiny.relative_difference(many[1], one[1]) <= 1e-5
    assert tiny.relative_difference(gradients(many), gradients(one)) <= 1e-5


def test_the_law_concerns_a_step_that_moves_everything():
    metrics, _ = one_step(1, 1, 1)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients(one_step(1, 1, 1))))
    assert min(metrics[f"loss/{name}"] for name in ("lm", "selection", "contrastive", "fusion")) > 1e-4


def test_pairs_across_devices_keep_their_places():
    mesh, batch = mesh_of(4, 2, 1), host_batch()
    placed = place_batch(mesh, batch)
    assert batch["similar"].any()
    assert placed["similar"].sharding == replicated(mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(np.asarray(array), batch[name], err_msg=name)


def test_rows_lie_on_the_row_axes_in_order():
    mesh = mesh_of(2, 2, 2)
    tokens = place_batch(mesh, host_batch())["tokens"]
    assert tokens.sharding == row_sharding(mesh)
    whole = np.asarray(tokens)
    for shard in tokens.addressable_shards:
        place = np.argwhere(mesh.devices == shard.device)[0]
        first = (place[0] * 2 + place[1]) * 2
        np.testing.assert_array_equal(np.asarray(shard.data), whole[first : first + 2])


def test_frozen_weights_are_spread_over_the_devices():
    mesh = mesh_of(2, 2, 2)
    params = sharded_params(mesh)
    spread = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, x.addressable_shards[0].data.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    divisors = {name: np.prod(whole) // np.prod(shard) for name, (whole, shard) in spread.items()}
    matrices = {name: divisor for name, divisor in divisors.items() if "norm" not in name}
    assert set(matrices.values()) == {4}, matrices
    assert set(divisors.values()) == {1, 4}
    (_, _), (vocabulary, width) = spread["embed_tokens"]
    assert (vocabulary, width) == (64, 16)


def folded_rows_a_device(mesh: Mesh, model: SelectiveLM) -> set[int]:
    """First sizes of the activations ``[D·K, P+T, ...]`` in one device's compiled program."""
    step = make_train_step(model, OBJECTIVE, optax.sgd(RATE), mesh)
    placed = place_batch(mesh, host_batch())
    length = placed["tokens"].shape[1] + model.adapter.prompt_length
    text = step.lower(start(mesh), sharded_params(mesh), placed).compile().as_text()
    return {int(rows) for rows in re.findall(rf"f32\[(\d+),{length},\d+\]", text)}


def test_rows_stay_on_their_devices_when_the_weights_are_spread_over_the_same():
    mesh = mesh_of(1, 8, 1)
    assert folded_rows_a_device(mesh, model_on(mesh)) == {3}  # eight rows behind three prompts on eight devices
    assert 24 in folded_rows_a_device(mesh, tiny.MODEL)  # left alone, the compiler gives every device every row


def test_an_uneven_axis_is_replicated():
    mesh = mesh_of(1, 2, 4)
    assert parameter_sharding(mesh, ("embed", "kv_heads", "head_dim"), (32, 2, 8)).spec == PartitionSpec(
        "fsdp", None, None
    )
    assert parameter_sharding(mesh, ("embed", "heads", "head_dim"), (33, 4, 8)).spec == PartitionSpec(
        None, "tensor", None
    )
    assert parameter_sharding(mesh, (None, "norm"), (8, 8)).spec == PartitionSpec(None, None)


@pytest.mark.parametrize(("shape", "parts"), [((8, 1, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 1), ((1, 8, 1), 8)])
def test_rows_are_split_over_data_and_fsdp_alone(shape, parts):
    assert row_devices(mesh_of(*shape)) == parts


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_every_array_of_a_new_state_lies_in_memory_of_its_own(shape):
    mesh = mesh_of(*shape)
    given = jax.device_put(tiny.trainable(), replicated(mesh))
    state = init_state(given, optax.adam(RATE), mesh)
    arrays = [shard.data for x in jax.tree.leaves((given, state)) for shard in x.addressable_shards]
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


def test_a_new_state_is_made_by_one_program_that_holds_nothing_else(monkeypatch):
    compiled = []
    jit = jax.jit

    def noted(function, **options):
        def measured(*arguments):
            memory = jit(function, **options).lower(*arguments).compile().memory_analysis()
            compiled.append(memory.temp_size_in_bytes)
            return jit(function, **options)(*arguments)

        return measured

    monkeypatch.setattr(jax, "jit", noted)
    state = init_state({"w": np.ones((256, 256), np.float32)}, optax.adam(RATE), mesh_of(1, 1, 1))
    assert len(compiled) == 1 and compiled[0] < state.trainable["w"].nbytes


def test_the_frozen_lm_is_an_argument_and_the_state_is_donated():
    mesh = mesh_of(2, 2, 2)
    step = make_train_step(tiny.MODEL, OBJECTIVE, optax.sgd(RATE), mesh)
    state, params, batch = start(mesh), sharded_params(mesh), place_batch(mesh, host_batch())
    lowered = step.lower(state, params, batch)
    arguments = lowered.args_info[0]
    assert len(jax.tree.leaves(arguments[1])) == len(jax.tree.leaves(params))
    assert all(x.donated for x in jax.tree.leaves(arguments[0]))
    assert not any(x.donated for x in jax.tree.leaves(arguments[1:]))
    # A weight matrix inside the program would stand in its text as thousands of hexadecimal digits.
    constants = re.findall(r"dense(?:_resource)?<[^>]*>", lowered.as_text())
    assert constants
    assert max(map(len, constants)) < 1000
    moved, _ = step(state, params, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    assert len(jax.tree.leaves(moved.trainable)) == TRAINABLES
    assert {x.sharding.is_fully_replicated for x in jax.tree.leaves(moved)} == {True}
    other = jax.tree.map(lambda x: 0.5 * x, params)
    _, metrics = step(start(mesh), other, batch)
    assert abs(metrics["loss/lm"] - one_step(1, 1, 1)[0]["loss/lm"]) > 1e-2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["3 × 1 × 1", "3 places", "8 devices", "mesh.data"]),
        ({"fsdp": 3}, ["2 × 3 × 1", "6 places", "8 devices"]),
        ({"tensor": 16}, ["1 × 1 × 16", "16 places", "8 devices"]),
        ({"tensor": 0}, ["mesh.tensor is 0", "allowed: 1 or more"]),
        ({"fsdp": -1}, ["mesh.data and mesh.fsdp are both -1", "give mesh.data = 1"]),
        ({"data": 3, "tensor": -1}, ["3 × 1 × 2", "6 places", "8 devices"]),
        ({"data": 4, "fsdp": 2, "slices": 8}, ["mesh.slices is 8", "divisor of mesh.data (4)"]),
        ({"slices": 0}, ["mesh.slices is 0"]),
        ({"data": 2**32, "fsdp": 2**32, "tensor": -1}, ["18446744073709551616 places", "8 devices"]),
        ({"data": -2}, ["mesh.data is -2", "or -1 for the rest"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_in_a_sentence(sizes, words):
    with pytest.raises(UserError) as told:
        make_mesh(**sizes)
    assert all(word in str(told.value) for word in words), told.value


def test_any_one_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(data=1, fsdp=2, tensor=-1).shape) == {"data": 1, "fsdp": 2, "tensor": 4}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU chip says of itself, as far as the order of a mesh goes by it."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_the_data_axis_runs_over_slices_outermost_and_the_others_stay_within_one():
    # Two slices of 2 × 2 chips, in an order that mixes them.
    chips = [Chip(i, slice_index=i % 2, coords=(i // 2 % 2, i // 4, 0)) for i in range(8)]
    grid = sliced_devices((4, 2, 1), 2, chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    np.testing.assert_array_equal(slices[:2], 0)
    np.testing.assert_array_equal(slices[2:], 1)
    assert sorted(chip.id for chip in grid.flat) == list(range(8))
    with pytest.raises(UserError, match=r"mesh\.slices is 4, but the devices form 2 slices"):
        sliced_devices((4, 2, 1), 4, chips)


def test_devices_that_know_no_slices_fall_into_equal_runs():
    mesh = make_mesh(4, 2, 1, slices=2)
    assert list(mesh.devices.flat) == jax.devices()
    assert dict(make_mesh(data=4, fsdp=-1, slices=4).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
