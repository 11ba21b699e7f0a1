"""Bytes and collectives are counted where they happen, as often as they happen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spt_jax.parallel.mesh import make_mesh
from spt_jax.planning.traffic import traffic

LOOP = """HloModule jit_f, is_scheduled=true

%sliced (p0: bf16[6,512,512], p1: s32[]) -> bf16[1,512,512] {
  %p0 = bf16[6,512,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero, %zero)
}

%updated (p2: f32[6,128], p3: f32[1,128], p4: s32[]) -> f32[6,128] {
  %p2 = f32[6,128]{1,0} parameter(0)
  %p3 = f32[1,128]{1,0:S(1)} parameter(1)
  %p4 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %update = f32[6,128]{1,0} dynamic-update-slice(%p2, %p3, %p4, %nought)
}

%body (carry: (s32[], bf16[6,512,512], f32[6,128])) -> (s32[], bf16[6,512,512], f32[6,128]) {
  %carry = (s32[]{:T(128)}, bf16[6,512,512]{2,1,0:T(8,128)(2,1)}, f32[6,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %stack = bf16[6,512,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %kept = f32[6,128]{1,0} get-tuple-element(%carry), index=2
  %layer = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %gathered = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%layer), replica_groups=[2,2]<=[4], dimensions={1}
  %row = f32[1,128]{1,0:S(1)} custom-call(%gathered), custom_call_target="tpu_custom_call"
  %written = f32[6,128]{1,0} fusion(%kept, %row, %i), kind=kLoop, calls=%updated
  %one = s32[] constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %result = (s32[]{:T(128)}, bf16[6,512,512]{2,1,0:T(8,128)(2,1)}, f32[6,128]{1,0}) tuple(%next, %stack, %written)
}

%condition (state: (s32[], bf16[6,512,512], f32[6,128])) -> pred[] {
  %limit = LIMIT
  %state = (s32[]{:T(128)}, bf16[6,512,512]{2,1,0:T(8,128)(2,1)}, f32[6,128]{1,0}) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%now, %limit), direction=LT
}

ENTRY %main (weights: bf16[6,512,512], start: f32[6,128]) -> f32[6,128] {
  %weights = bf16[6,512,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %start = f32[6,128]{1,0} parameter(1)
  %first = s32[]{:T(128)S(6)} constant(0)
  %tuple = (s32[]{:T(128)}, bf16[6,512,512]{2,1,0:T(8,128)(2,1)}, f32[6,128]{1,0}) tuple(%first, %weights, %start)
  %loop = (s32[], bf16[6,512,512]{2,1,0:T(8,128)(2,1)}, f32[6,128]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = f32[6,128]{1,0} get-tuple-element(%loop), index=2
}
"""
"""As the TPU's compiler writes a loop over layers: weights in HBM, S(1) on the chip."""

LAYER, ROW = 512 * 512 * 2, 128 * 4


@pytest.mark.parametrize(
    ("limit", "unknown", "times"),
    [("s32[]{:T(128)} constant(6)", 1, 6), ("s32[] get-tuple-element(%state), index=0", 9, 9)],
)
def test_a_loop_counts_as_often_as_it_runs_and_slices_count_what_they_take(limit, unknown, times):
    found = traffic(LOOP.replace("LIMIT", limit), unknown_trips=unknown)
    # Of the stack a layer is read, of what is kept a row is written; what lies on the chip is free, scalars are few.
    assert found.hbm == pytest.approx(times * (LAYER + ROW), abs=times * 16)
    (gather,) = found.collectives
    assert (gather.kind, gather.bytes, gather.group_size, gather.times) == ("all-gather", 2 * LAYER, 2, times)
    assert gather.in_loop
    assert gather.sent == times * LAYER


def test_of_a_program_that_xla_compiled_the_collectives_of_its_layers_are_found():
    mesh = make_mesh(data=1, fsdp=4, tensor=1, devices=jax.devices()[:4])
    layers = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def over_layers(weights: jax.Array, x: jax.Array) -> jax.Array:
        step = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None)  # noqa: E731
        return jax.lax.scan(step, x, weights)[0]

    shapes = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32), jax.ShapeDtypeStruct((8, 64), jnp.float32)
    compiled = jax.jit(over_layers, in_shardings=(layers, rows), out_shardings=rows).lower(*shapes).compile()
    found = traffic(compiled.as_text() or "").by_kind()
    assert found == {"all-gather": (5.0, 5 * 64 * 64 * 4.0, 5 * 64 * 64 * 4 * 3 / 4)}
