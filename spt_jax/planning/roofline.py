"""The least time that a program can take on a chip: the slowest of arithmetic, memory and links (a roofline)."""

from __future__ import annotations

import dataclasses

from spt_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program on each device, were it busy with one thing alone, at the vendor's peak.

    Attributes:
        compute: Matrix products.
        memory: HBM.
        links: Collectives within a slice.
        network: Collectives between slices.
    """

    compute: float
    memory: float
    links: float
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """The least time, all of it side by side."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """What takes that time."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def roofline(topology: Topology, flops: float, hbm: float, sent: float, between_slices: float = 0.0) -> Roofline:
    """The roofline of a program.

    Args:
        topology: What runs it.
        flops: Of one device, in bfloat16.
        hbm: Bytes that it reads from HBM and writes there.
        sent: Bytes that it sends in collectives; as many arrive, and all links are taken to share them.
        between_slices: Bytes of an all-reduce over slices, of which each device of a slice sends its part.
    """
    chip, slices = topology.chip, topology.slices
    part = between_slices / (topology.count // slices)
    network = 2 * part * (slices - 1) / slices / chip.network if slices > 1 else 0.0
    return Roofline(flops / chip.flops, hbm / chip.bandwidth, 2 * sent / chip.link, network)
