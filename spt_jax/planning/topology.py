"""How many of which chips, and JAX's devices for those of them that a compiler is here for."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from spt_jax.errors import UserError
from spt_jax.parallel.mesh import make_mesh
from spt_jax.planning.chips import Chip, chip_named

_SHAPE = re.compile(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*")
_MOST_DEVICES = {"tpu": 131_072, "gpu": 4_096}
"""Of all slices or machines: even devices that are only thought of take time and memory."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips that are alike.

    Attributes:
        name: Of one slice, such as ``v5e:4x4`` or ``h100:8``.
        chip: What it is made of.
        sizes: Chips along each axis of a slice.
        slices: How many slices (of TPUs) or machines (of GPUs).
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> Topology:
        """From what a user writes.

        Raises:
            UserError: Not CHIP:SIZES of a chip that is known, a number of slices below 1, or too many devices.
        """
        name, colon, shape = text.partition(":")
        if not colon or not _SHAPE.fullmatch(shape):
            raise UserError(
                f"the topology is {text!r}; allowed: CHIP:SIZES, such as v5e:4x4, v5p:2x2x4 or h100:8 for one slice"
            )
        chip = chip_named(name)
        sizes = tuple(int(size) for size in shape.split("x"))
        if chip.kind == "gpu" and len(sizes) > 1:
            raise UserError(
                f"the topology is {text!r}; allowed for GPUs: {name}:N, the GPUs of one machine, with --slices for the "
                "number of machines"
            )
        if slices < 1:
            raise UserError(f"slices is {slices}; allowed: 1 or more")
        topology = cls(text, chip, sizes, slices)
        if topology.count > (most := _MOST_DEVICES[chip.kind]):
            raise UserError(f"{topology} has {topology.count:,} devices; allowed: at most {most:,}")
        return topology

    @property
    def count(self) -> int:
        """Devices in all."""
        return math.prod(self.sizes) * self.chip.devices_per_chip * self.slices

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} × {self.name}"


def compile_only_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, of TPUs, which need not be here.

    Raises:
        UserError: libtpu, which holds the compiler, is not installed, or it refuses the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {topology} needs the TPU compiler of the package libtpu, which is not installed; "
            "pip install 'spt_jax[plan]'"
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.sizes) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # else a host has four
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"the TPU compiler refuses the topology {topology.name!r} ({first[:200]})") from error
    return list(found.devices)


_SIZES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)),
}
"""Slices that Cloud TPU offers of chips in two and in three dimensions, in order."""


def next_larger(topology: Topology) -> Topology | None:
    """The next larger slice that is offered of the same chips, a machine's GPUs doubled up to 8; None for no such."""
    devices = math.prod(topology.sizes)
    if topology.chip.kind == "gpu":
        sizes = (2 * devices,) if 2 * devices <= 8 else None
    else:
        offered = _SIZES.get(len(topology.sizes), ())
        sizes = next((sizes for sizes in offered if math.prod(sizes) > devices), None)
    if sizes is None:
        return None
    name = f"{topology.chip.name}:{'x'.join(map(str, sizes))}"
    return dataclasses.replace(topology, name=name, sizes=sizes)


def devices_of(topology: Topology) -> list[Any]:
    """Devices that stand for a topology: TPUs to compile for, or as many CPUs, for shapes alone, where it is of GPUs.

    Raises:
        UserError: See `compile_only_devices`; or this process has fewer CPU devices.
    """
    if topology.chip.kind == "tpu":
        return compile_only_devices(topology)
    found = jax.devices("cpu")
    if len(found) < topology.count:
        raise UserError(
            f"{topology} has {topology.count} devices, and this process stands for {len(found)}; allowed: so many, or "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.count}"
        )
    return found[: topology.count]


def topology_mesh(topology: Topology, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh of a run on a topology; slices are neighbours along ``data`` alone.

    Args:
        topology: The hardware.
        data: As in `spt_jax.parallel.mesh.make_mesh`; so are `fsdp` and `tensor`.

    Raises:
        UserError: The product does not equal the number of devices, or the slices do not divide ``data``.
    """
    return make_mesh(data, fsdp, tensor, slices=topology.slices, devices=devices_of(topology))
