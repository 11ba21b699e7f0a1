"""A plan in words and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from spt_jax.planning.advice import Advice
from spt_jax.planning.compilation import Compiled
from spt_jax.planning.memory import Memory
from spt_jax.planning.plan import Plan
from spt_jax.planning.roofline import Roofline

Facts = dict[str, Any]
"""Nested dicts and lists of text, numbers, truth values and None, as JSON has them."""


def facts_of(plan: Plan) -> Facts:
    """A plan for programs; bytes are of one device."""
    facts = dataclasses.asdict(plan)
    facts["topology"] = str(plan.topology)
    facts["fits"] = plan.fits
    for name in ("longest", "mean"):
        times: Roofline | None = getattr(plan, name)
        facts[name] = None if times is None else {**facts[name], "seconds": times.seconds, "bound": times.bound}
    for each, program in zip(facts["programs"], plan.programs, strict=True):
        each["fits"] = program.fits
        each["traffic"] = None if program.traffic is None else _traffic(program)
    return facts


def _traffic(program: Compiled) -> Facts:
    assert program.traffic is not None
    collectives = [
        {"kind": kind, "count": count, "bytes": size, "sent": sent}
        for kind, (count, size, sent) in program.traffic.by_kind().items()
    ]
    return {"hbm": program.traffic.hbm, "collectives": collectives}


def lines_of(plan: Plan) -> Iterator[str]:
    """A plan for people."""
    yield heading(plan)
    for program in plan.programs:
        yield from _program(program, plan.capacity)
    if plan.memory is not None and not plan.programs:
        yield from _estimate(plan.memory, plan.capacity)
    if not plan.fits or plan.longest is None:
        return
    what = "longest rows" if plan.mean is not None else "a batch of replies"
    yield from _times(f"At best, {what}", plan.longest)
    if plan.mean is not None:
        yield from _times("At best, rows of mean length", plan.mean)
        epoch = plan.steps * plan.mean.seconds
        yield f"  an epoch              {plan.steps:,} steps, {_duration(epoch)} at best"


def heading(plan: Plan) -> str:
    """What was planned, on one line."""
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    kept = "" if plan.quantization == "none" else f", {plan.quantization}"
    remat = f", remat {plan.remat}" if plan.remat else ""
    behind = f" behind {plan.prompts} prompts" if plan.prompts > 1 else ""
    return (
        f"{plan.source}{kept} on {plan.topology} ({plan.topology.count} devices: {mesh}), {plan.rows} rows{behind}"
        f"{remat}, {plan.attention} attention"
    )


def _program(program: Compiled, capacity: float) -> Iterator[str]:
    yield f"{program.name}, compiled in {program.seconds:,.0f} s; of one device"
    yield f"  memory                {size(program.peak)} of {size(capacity)}, {_share(program.peak, capacity)}"
    if program.traffic is None or program.arguments is None or program.temporaries is None:
        return
    yield f"    arguments           {size(program.arguments)}"
    yield f"    temporaries         {size(program.temporaries)}"
    yield f"  matrix products       {program.flops / 1e12:,.2f} TFLOP"
    yield f"  HBM read and written  {size(program.traffic.hbm)}"
    for kind, (count, total, sent) in sorted(program.traffic.by_kind().items()):
        yield f"  {kind:<21} {count:,.0f} times, {size(total)}, {size(sent)} sent"
    if program.kernels:
        yield f"  kernels               {', '.join(program.kernels)}"


def _share(needed: float, capacity: float) -> str:
    if needed > capacity:
        return f"{size(needed - capacity)} too much"
    return f"{needed / capacity:.0%}"


def _estimate(memory: Memory, capacity: float) -> Iterator[str]:
    yield "train step, estimated without a compiler; of one device"
    yield f"  memory                {size(memory.total)} of {size(capacity)}, {_share(memory.total, capacity)}"
    for name, value in dataclasses.asdict(memory).items():
        yield f"    {name:<19} {size(value)}"


def _times(title: str, times: Roofline) -> Iterator[str]:
    parts = {name: seconds for name, seconds in dataclasses.asdict(times).items() if seconds}
    listed = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
    yield f"{title}: {_duration(times.seconds)} ({1 / times.seconds:,.3g} a second), bound by {times.bound}"
    yield f"  {listed}"


def advice_lines(found: Sequence[Advice]) -> Iterator[str]:
    """What would help, the most helpful first."""
    for each in found:
        yield f"  {'fits' if each.fits else 'does not fit'}, {size(each.needed)}: {each.change}"


def search_lines(plans: Sequence[Plan]) -> Iterator[str]:
    """A line for each plan that was compiled."""
    places = f"{'data':>5}{'fsdp':>6}{'tensor':>8}{'rows':>6}"
    yield f"{places}  {'remat':<6}{'memory':>10}{'share':>8}{'rows/s at best':>16}"
    for plan in plans:
        mesh = plan.mesh
        rate = f"{plan.rows_per_second:,.1f}" if plan.fits else "does not fit"
        yield (
            f"{mesh['data']:>5}{mesh['fsdp']:>6}{mesh['tensor']:>8}{plan.rows:>6}  {plan.remat:<6}"
            f"{size(plan.needed):>10}{plan.needed / plan.capacity:>8.0%}{rate:>16}"
        )


def size(count: float) -> str:
    """Bytes in binary units, in which compilers and vendors count HBM."""
    value, units = count, ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.2f} {units[0]}"


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"
