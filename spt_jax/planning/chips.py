"""What accelerators have, as their vendors document it."""

from __future__ import annotations

import dataclasses
import math
import os

from spt_jax.errors import UserError, nearest

GIB = 2**30
GPU_SHARE = 0.75
"""Of a GPU's memory that JAX takes, unless a variable says another (docs.jax.dev, GPU memory allocation)."""
GPU_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""What says another: its name, and the one of old."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        name: As it is written in a topology.
        kind: ``"tpu"`` or ``"gpu"``.
        memory: Bytes of HBM.
        flops: Peak bfloat16 FLOP/s without sparsity.
        bandwidth: Bytes/s of HBM.
        link: Bytes/s between the chips of a slice (ICI) or the GPUs of a machine (NVLink), in and out together.
        network: Bytes/s out of a slice or a machine, one way.
        source: Where the figures are documented.
        devices_per_chip: How many of these JAX sees in one chip.
        compute_capability: Of NVIDIA's GPUs, as JAX's devices tell it.
    """

    name: str
    kind: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    source: str
    devices_per_chip: int = 1
    compute_capability: str = ""

    @property
    def platform(self) -> str:
        """Its kind, as JAX's devices name it."""
        return self.kind

    @property
    def device_kind(self) -> str:
        """Its name, as JAX's devices name it."""
        return self.name

    @property
    def capacity(self) -> float:
        """Bytes that programs may use: a TPU's HBM, or the share that JAX takes of a GPU's.

        Raises:
            UserError: The variable that sets this share is not a number above 0.
        """
        return self.memory * (_gpu_share() if self.kind == "gpu" else 1.0)


def _gpu_share() -> float:
    variable, text = next(
        ((name, os.environ[name]) for name in GPU_SHARE_VARIABLES if os.environ.get(name)), ("", str(GPU_SHARE))
    )
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise UserError(f"{variable} is {text!r}; allowed: a number above 0, such as {GPU_SHARE}")
    return share


_CLOUD = "docs.cloud.google.com/tpu/docs"
_V7 = f"{_CLOUD}/tpu7x"

CHIPS = {
    chip.name: chip
    for chip in (
        # Links of v4: six of 50 GB/s each way (arXiv 2304.01433). Its network, as v5e's, is 200 Gb/s a host.
        Chip("v4", "tpu", 32 * GIB, 275e12, 1200e9, 600e9, 200e9 / 8 / 4, f"{_CLOUD}/v4"),
        Chip("v5e", "tpu", 16 * GIB, 197e12, 819e9, 400e9, 200e9 / 8 / 8, f"{_CLOUD}/v5e"),
        Chip("v5p", "tpu", 95 * GIB, 459e12, 2765e9, 1200e9, 50e9 / 8, _V7),
        Chip("v6e", "tpu", 32 * GIB, 918e12, 1638e9, 800e9, 100e9 / 8, _V7),
        # A chip is two devices of half its parts.
        Chip("tpu7x", "tpu", 96 * GIB, 2307e12 / 2, 7380e9 / 2, 1200e9 / 2, 100e9 / 8 / 2, _V7, devices_per_chip=2),
        Chip(
            "a100",
            "gpu",
            80e9,
            312e12,
            2039e9,
            600e9,
            200e9 / 8,
            "NVIDIA A100 80GB SXM data sheet",
            compute_capability="8.0",
        ),
        Chip(
            "h100",
            "gpu",
            80e9,
            989e12,
            3350e9,
            900e9,
            400e9 / 8,
            "NVIDIA H100 SXM data sheet",
            compute_capability="9.0",
        ),
        Chip(
            "h200",
            "gpu",
            141e9,
            989e12,
            4800e9,
            900e9,
            400e9 / 8,
            "NVIDIA H200 SXM data sheet",
            compute_capability="9.0",
        ),
    )
}
"""By name."""


def chip_named(name: str) -> Chip:
    """The chip of this name.

    Raises:
        UserError: There is none.
    """
    if name not in CHIPS:
        raise UserError(f"there is no chip {name!r}; allowed: {', '.join(CHIPS)}.{nearest(name, CHIPS)}")
    return CHIPS[name]
