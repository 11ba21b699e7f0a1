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


# As the TPU's compiler gathers weights while other fusions work.
CHAIN = """HloModule jit_g, is_scheduled=true

%begun (shard: @shard) -> (@shard, @whole, @state) {
  %shard = @shard parameter(0)
  %ag.0 = @whole all-gather(%shard), @how
  ROOT %started = (@shard, @whole, @state) custom-call(%ag.0), custom_call_target="AsyncCollectiveStart"
}

%carried_on (p0: @shard, p1: @whole, p2: @state, p3: @whole) -> (@work, @shard, @whole, @whole, @state) {
  %p0 = @shard parameter(0)
  %p1 = @whole parameter(1)
  %p2 = @state parameter(2)
  %p3 = @whole parameter(3)
  %ag.1 = @whole all-gather(%p0), @how
  %work = @work custom-call(%p3), custom_call_target="tpu_custom_call"
  ROOT %parts = (@work, @shard, @whole, @whole, @state) tuple(%work, %p0, %p1, %ag.1, %p2)
}

%ended (q0: @shard, q1: @whole, q2: @state) -> @whole {
  %q0 = @shard parameter(0)
  %q1 = @whole parameter(1)
  %q2 = @state parameter(2)
  %ag.2 = @whole all-gather(%q0), @how
  ROOT %whole = @whole custom-call(%ag.2, %q1, %q2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (weights: @shard, others: @whole) -> @whole {
  %weights = @shard parameter(0)
  %others = @whole parameter(1)
  %start = (@shard, @whole, @state) fusion(%weights), kind=kCustom, calls=%begun
  %a0 = @shard get-tuple-element(%start), index=0
  %a1 = @whole get-tuple-element(%start), index=1
  %a2 = @state get-tuple-element(%start), index=2
  %step = (@work, @shard, @whole, @whole, @state) fusion(%a0, %a1, %a2, %others), kind=kOutput, calls=%carried_on
  %b0 = @shard get-tuple-element(%step), index=1
  %b1 = @whole get-tuple-element(%step), index=3
  %b2 = @state get-tuple-element(%step), index=4
  ROOT %done = @whole fusion(%b0, %b1, %b2), kind=kCustom, calls=%ended
}
"""
for name, text in {
    "@shard": "bf16[256,512]{1,0}",
    "@whole": "bf16[1024,512]{1,0}",
    "@state": "s32[2]{0:S(4)}",
    "@work": "f32[8,128]{1,0}",
    "@how": 'replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="5"}',
}.items():
    CHAIN = CHAIN.replace(name, text)


def test_a_gather_that_several_fusions_carry_on_is_one_and_moves_its_weights_once():
    found = traffic(CHAIN)
    (gather,) = found.collectives
    whole = 1024 * 512 * 2
    assert (gather.kind, gather.bytes, gather.times, gather.sent) == ("all-gather", whole, 1, whole * 3 / 4)
    # The shard is read and the whole written by the gather; the fusion beside it reads other weights of that shape.
    assert found.hbm == whole / 4 + whole + (whole + 8 * 128 * 4)


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
