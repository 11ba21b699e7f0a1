"""The reader of compiled programs finds what is known to be in them, in every notation of XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spt_jax.parallel.collectives import Collective, collectives
from spt_jax.parallel.mesh import make_mesh

LAYERS = 5


def compiled(function: Any, *arguments: Any) -> list[Collective]:
    return collectives(jax.jit(function).lower(*arguments).compile().as_text())


def shaped(mesh: Mesh, shape: tuple[int, ...], *axes: str | None, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def test_a_contraction_over_two_devices_is_one_all_reduce_of_its_result():
    mesh = make_mesh(2, 2, 2)
    product = lambda x, w: x @ w  # noqa: E731
    (found,) = compiled(product, shaped(mesh, (16, 8), "data", "tensor"), shaped(mesh, (8, 24), "tensor", None))
    assert (found.kind, found.shapes, found.bytes) == ("all-reduce", (("f32", (8, 24)),), 8 * 24 * 4)
    assert found.groups == ((0, 1), (2, 3), (4, 5), (6, 7))  # neighbours along the last axis of the mesh
    assert (found.group_size, found.in_loop, found.times) == (2, False, 1)


def test_what_a_loop_over_layers_gathers_is_gathered_in_the_loop_once_a_layer():
    mesh = make_mesh(1, 8, 1)

    def run(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    stack = shaped(mesh, (LAYERS, 32, 32), None, "fsdp", None, dtype=jnp.bfloat16)
    (found,) = compiled(run, shaped(mesh, (64, 32), "fsdp", dtype=jnp.bfloat16), stack)
    assert (found.kind, found.in_loop, found.times, found.group_size) == ("all-gather", True, LAYERS, 8)
    assert found.shapes[0][1] == (32, 32)
    assert "while/body" in found.source


def test_a_program_for_one_device_has_none():
    assert not compiled(lambda x: x @ x, jnp.ones((8, 8)))


WHOLE = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%never_called (a: f32[4]) -> f32[4] {{
  %a.9 = f32[4]{{0}} parameter(0)
  ROOT %lost = f32[4]{{0}} all-reduce(%a.9), replica_groups={{}}, to_apply=%add
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
{lines}
}}
"""


def one(line: str) -> Collective:
    (found,) = collectives(WHOLE.format(lines=f"  {line}"))
    return found


NEIGHBOURS = ((0, 1), (2, 3), (4, 5), (6, 7))
FAR = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{}", (tuple(range(8)),)),
        ("{{0,1},{2,3},{4,5},{6,7}}", NEIGHBOURS),
        ("[1,8]<=[8]", (tuple(range(8)),)),
        ("[4,2]<=[8]", NEIGHBOURS),
        ("[4,2]<=[2,4]T(1,0)", FAR),
        ("mesh['x'=8] {'x'}", (tuple(range(8)),)),
        ("mesh['x'=4,'y'=2] {'y'}", NEIGHBOURS),
        ("mesh['x'=2,'y'=4] {'x'}", FAR),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=8] {'x':(1)2}", FAR),
        ("mesh['x'=8] {'x':(4)2}", NEIGHBOURS),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", NEIGHBOURS),
    ],
)
def test_every_notation_of_groups_is_read(written, groups):
    assert one(f"%r = f32[4]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add").groups == groups


def test_groups_in_an_unknown_notation_are_refused_rather_than_guessed():
    with pytest.raises(ValueError, match="unknown way"):
        one("%r = f32[4]{0} all-reduce(%x), replica_groups=somehow, to_apply=%add")
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("nothing")


def test_an_asynchronous_pair_counts_once_and_by_its_results_alone():
    start = "%s.1 = ((f32[4]{0:T(128)}), (f32[32]{0:T(128)})) all-gather-start(%x), replica_groups=[1,8]<=[8]"
    done = "%d = f32[32]{0:T(128)} all-gather-done(%s.1)"
    other = "%s.11 = f32[32]{0} copy(%x)"
    found = one(f"{start}, dimensions={{0}}\n  {other}\n  {done}")
    assert (found.kind, found.bytes) == ("all-gather", 32 * 4)


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("(f32[], f32[2])", 12),
        ("pred[9]", 9),
        ("s4[8]", 4),
        ("f8e4m3fn[7]", 7),
        ("s8[2,3]", 6),
    ],
)
def test_bytes_are_those_of_all_results(type_, size):
    assert one(f"%r = {type_} all-reduce(%x), replica_groups={{}}, to_apply=%add").bytes == size


def test_a_permutation_names_its_pairs():
    found = one("%r = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}")
    assert (found.groups, found.group_size) == (((0, 1), (1, 0)), 2)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 75),
        ("all-gather", 75),
        ("reduce-scatter", 300),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_what_a_device_sends_is_what_the_best_algorithm_sends(kind, sent):
    four = Collective(kind, (("f32", (25,)),), bytes=100, groups=((0, 1, 2, 3),), in_loop=False, times=2, source="")
    assert four.sent == 2 * sent
