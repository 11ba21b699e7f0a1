"""What the backward pass recomputes, chosen by what fits the devices (``model.remat = auto``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from spt_jax.prompting.selective_lm import SelectiveLM

POLICIES = ("none", "dots", "full")
"""From the fastest, which keeps every activation, to the one that needs least memory."""
SHARE = 0.92
"""Of a device's memory; the rest is for what no compiler counts: fragments, buffers of collectives, the next batch."""


def with_remat(model: SelectiveLM, policy: str) -> SelectiveLM:
    """The same model whose backward pass recomputes what `policy` says."""
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, remat=policy))


def device_memory(device: Any) -> int | None:
    """Bytes that programs may use on a device; None where it does not tell, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def step_memory(step: Any, *arguments: Any) -> float:
    """Bytes of each device that the compiled step needs, its arguments included; infinite where it does not compile.

    Args:
        step: A jitted function.
        arguments: Its arguments, arrays or shapes with shardings.
    """
    try:
        memory = step.lower(*arguments).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise
    return program_memory(memory)


def program_memory(analysis: Any) -> float:
    """Bytes of each device that a compiled program needs by its memory analysis, its arguments included."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def leaves_enough(needed: float, limit: float) -> bool:
    """Whether a step that needs so many bytes of a device's `limit` is one that ``model.remat = auto`` takes."""
    return needed <= SHARE * limit


def fitting_remat(step_of: Callable[[str], Any], arguments: tuple[Any, ...], limit: int | None) -> str:
    """The fastest policy with which a step on the longest rows fits; the smallest where none does.

    A policy is compiled to be measured, and its program is in the compilation cache when the run asks for it.

    Args:
        step_of: Makes the jitted step of a policy.
        arguments: Of the step, with the longest rows that a run has.
        limit: Bytes of a device; None chooses the fastest.
    """
    if limit is None:
        return POLICIES[0]
    for policy in POLICIES[:-1]:
        if leaves_enough(step_memory(step_of(policy), *arguments), limit):
            return policy
    return POLICIES[-1]
