"""FLOPs of matrix products, counted by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from spt_jax.models.splash import splash_attention
from spt_jax.parallel.mesh import make_mesh
from spt_jax.planning.arithmetic import product_flops

M, N = 8, 16
ONE = 2 * M * N * N


def flops(function: Any, *shapes: tuple[int, ...], unknown_trips: int = 1) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return product_flops(jax.make_jaxpr(function)(*arguments).jaxpr, unknown_trips)


def test_a_product_and_its_gradients():
    assert flops(lambda x, w: x @ w, (M, N), (N, N)) == ONE
    assert flops(jax.grad(lambda x, w: (x @ w).sum()), (M, N), (N, N)) == 2 * ONE


def test_a_gradient_of_weights_would_be_seen_as_a_third_product():
    product = lambda x, w: ((x @ w) ** 2).sum()  # noqa: E731
    assert flops(jax.grad(product), (M, N), (N, N)) == 2 * ONE
    assert flops(jax.grad(product, argnums=(0, 1)), (M, N), (N, N)) == 3 * ONE


def test_a_scan_counts_as_often_as_it_runs():
    def layers(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    assert flops(layers, (M, N), (5, N, N)) == 5 * ONE


def test_a_loop_without_an_end_counts_as_often_as_is_said():
    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, x)

    assert flops(loop, (M, N), (N, N), unknown_trips=7) == 7 * ONE


def test_of_alternatives_the_dearest_counts():
    def either(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert flops(either, (M, N), (N, N)) == 2 * ONE


def test_recomputation_counts():
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w) @ w).sum()

    assert flops(jax.grad(twice), (M, N), (N, N)) == 4 * ONE
    assert flops(jax.grad(jax.checkpoint(twice)), (M, N), (N, N)) == 6 * ONE


def test_what_each_device_does_adds_up():
    mesh = make_mesh(data=4, fsdp=1, tensor=1, devices=jax.devices()[:4])
    rows = PartitionSpec("data")
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops(split, (M, N), (N, N)) == ONE


@pytest.mark.parametrize(("length", "block"), [(384, 384), (1024, 512)])
def test_a_kernel_counts_at_every_place_of_its_grid(length, block):
    rows, heads, dim = 2, 3, 64
    shape = (rows, length, heads, dim)
    whole = rows * heads * 2 * 2 * length * length * dim
    # Of a causal row's blocks of keys the kernel leaves out some that are hidden, and never one that is seen.
    seen = whole * (1 + block / length) / 2
    assert seen <= flops(splash_attention, shape, shape, shape) <= whole
