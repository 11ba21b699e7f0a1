"""What the compiler says of a program for devices that are not here: memory, or by how much it is too large."""

from __future__ import annotations

import dataclasses
import re
import time

import jax

from spt_jax.planning.arithmetic import product_flops
from spt_jax.planning.programs import Program
from spt_jax.planning.traffic import Traffic, traffic
from spt_jax.training.remat import program_memory

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SHORTFALL = re.compile(
    r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm"
    r"|\(([\d.]+)([BKMGT]?)\) exceeds available HBM \(([\d.]+)([BKMGT]?)\)"
)
"""What is needed and what is there, in the words of either pass of the compiler that adds up memory."""
_KERNEL = re.compile(r"%([a-zA-Z_]+)[.\d]* = [^\n]*custom_call_target=\"tpu_custom_call\"")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for one device.

    Attributes:
        name: Of the program.
        flops: Of its matrix products, a device's share.
        peak: Bytes of HBM that it needs at once, arguments included.
        capacity: Bytes of HBM that the compiler allows; None where it told no more than that they are enough.
        arguments: Bytes of its arguments; None where it does not fit.
        temporaries: Bytes of what is neither argument nor result; None where it does not fit.
        traffic: Bytes and collectives; None where it does not fit.
        seconds: That compiling took.
        kernels: Custom kernels in the program, such as splash attention, by name.
        counted: Bytes by which training would choose what is recomputed; None where it does not fit.
    """

    name: str
    flops: float
    peak: float
    capacity: float | None
    arguments: float | None
    temporaries: float | None
    traffic: Traffic | None
    seconds: float
    kernels: tuple[str, ...] = ()
    counted: float | None = None

    @property
    def fits(self) -> bool:
        """Whether it compiled."""
        return self.traffic is not None


def compile_program(program: Program, devices: int, unknown_trips: int = 1) -> Compiled:
    """Traces and compiles a program.

    Args:
        program: Whose arguments lie on a mesh of the devices.
        devices: How many there are.
        unknown_trips: How often the body of a loop runs that ends when the data say so.
    """
    begun = time.perf_counter()
    traced = program.trace()
    flops = product_flops(traced.jaxpr.jaxpr, unknown_trips) / devices
    lowered = traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _SHORTFALL.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        used, used_unit, capacity, capacity_unit = (group for group in found.groups() if group is not None)
        used, capacity = float(used) * _UNITS[used_unit], float(capacity) * _UNITS[capacity_unit]
        return Compiled(program.name, flops, used, capacity, None, None, None, time.perf_counter() - begun)
    took = time.perf_counter() - begun
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    return Compiled(
        program.name,
        flops,
        float(memory.peak_memory_in_bytes),
        None,
        float(memory.argument_size_in_bytes),
        float(memory.temp_size_in_bytes),
        traffic(text, unknown_trips),
        took,
        tuple(sorted(set(_KERNEL.findall(text)))),
        program_memory(memory),
    )
