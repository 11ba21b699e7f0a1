"""Topologies are read, refused in a sentence, and become meshes; one without a compiler says what to install."""

from __future__ import annotations

import importlib.util

import pytest

from spt_jax.errors import UserError
from spt_jax.planning.chips import CHIPS, GPU_SHARE_VARIABLES
from spt_jax.planning.topology import Topology, next_larger, topology_mesh


@pytest.mark.parametrize(
    ("text", "slices", "count"),
    [("v5e:4x4", 1, 16), ("v5p:2x2x4", 2, 32), ("tpu7x:2x2x1", 1, 8), ("h100:8", 2, 16), ("v5e:1x1", 1, 1)],
)
def test_a_topology_is_chips_and_slices(text, slices, count):
    found = Topology.parse(text, slices)
    assert (found.count, found.slices, found.name) == (count, slices, text)
    assert str(found) == (text if slices == 1 else f"{slices} × {text}")


@pytest.mark.parametrize(
    ("text", "slices", "words"),
    [
        ("v5e", 1, "allowed: CHIP:SIZES"),
        ("v5e:4y4", 1, "allowed: CHIP:SIZES"),
        ("v5e:0x4", 1, "allowed: CHIP:SIZES"),
        ("v5f:4x4", 1, "there is no chip 'v5f'; allowed: v4, .* Did you mean"),
        ("h100:2x4", 1, "allowed for GPUs: h100:N"),
        ("v5e:4x4", 0, "slices is 0; allowed: 1 or more"),
        ("h100:100000", 1, "allowed: CHIP:SIZES"),
        ("h100:" + "9" * 5000, 1, "allowed: CHIP:SIZES"),
        ("h100:99999", 1, "h100:99999 has 99,999 devices; allowed: at most 4,096"),
        ("v5e:16x16", 513, "513 × v5e:16x16 has 131,328 devices; allowed: at most 131,072"),
    ],
)
def test_what_is_no_topology_is_refused(text, slices, words):
    with pytest.raises(UserError, match=words):
        Topology.parse(text, slices)


def test_the_next_larger_slice_is_one_that_is_offered():
    def names(text: str) -> list[str]:
        found, larger = [], next_larger(Topology.parse(text))
        while larger is not None:
            found.append(larger.name)
            larger = next_larger(larger)
        return found

    assert names("v5e:1x1")[:3] == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]
    assert names("v5p:2x2x1")[:2] == ["v5p:2x2x2", "v5p:2x2x4"]
    assert names("h100:2") == ["h100:4", "h100:8"]


def test_without_the_compiler_a_tpu_topology_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the TPU compiler of the package libtpu.*pip install 'spt_jax\[plan\]'"):
        topology_mesh(Topology.parse("v5e:2x2"))


def test_slices_are_neighbours_along_data_alone():
    mesh = topology_mesh(Topology.parse("h100:4", 2), data=4, fsdp=2)
    machines = [[[device.id // 4 for device in row] for row in place] for place in mesh.devices]
    assert machines == [[[0], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]
    with pytest.raises(UserError, match=r"mesh\.slices is 2; allowed: a divisor of mesh\.data \(1\)"):
        topology_mesh(Topology.parse("h100:4", 2), data=1, fsdp=8)


def test_gpus_have_cpu_devices_in_their_places_if_there_are_enough():
    assert dict(topology_mesh(Topology.parse("h100:8"), fsdp=4, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    with pytest.raises(UserError, match="has 16 devices, and this process stands for 8"):
        topology_mesh(Topology.parse("h100:8", 2))


def test_of_a_gpu_programs_may_use_what_jax_takes_and_of_a_tpu_all(monkeypatch):
    for name in GPU_SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert CHIPS["h100"].capacity == 0.75 * CHIPS["h100"].memory
    assert CHIPS["v5e"].capacity == CHIPS["v5e"].memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert CHIPS["h100"].capacity == 0.5 * CHIPS["h100"].memory
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "much")
    with pytest.raises(UserError, match="XLA_CLIENT_MEM_FRACTION is 'much'; allowed: a number above 0"):
        _ = CHIPS["h100"].capacity


def test_a_chip_has_more_of_everything_on_it_than_on_its_way_out():
    for chip in CHIPS.values():
        assert chip.flops > chip.bandwidth > chip.link > chip.network > 0
        assert chip.memory > 2**33
        assert chip.source
