"""What to change where a train step does not fit, and what each change would leave, by the estimate."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.planning.memory import estimated_memory
from spt_jax.planning.plan import Plan, mesh_of
from spt_jax.planning.programs import train_step
from spt_jax.planning.topology import Topology, next_larger
from spt_jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
        change: As it is written on the command line.
        needed: Bytes of a device that the train step would need then: what was compiled, moved by the difference of the
            estimates.
        fits: Whether a device has them.
    """

    change: str
    needed: float
    fits: bool


def advice(config: Config, decoder: DecoderConfig, plan: Plan, workload: Workload) -> list[Advice]:
    """Changes that need less memory, the least first; each alone, and then all that leave the hardware as it is.

    Args:
        config: The configuration that was planned.
        decoder: Its LM.
        plan: Of its train step.
        workload: The rows.
    """
    assert plan.memory is not None
    tried = list(_changes(config, plan))
    together: dict[str, Any] = {}
    for options, _ in tried:
        if not any(name.startswith("mesh.") for name in options):
            together |= {"model.quantization": "int8"} if "model.quantization" in options else options
    larger = next_larger(plan.topology)
    everything = [(options, topology) for options, topology in [*tried, (together, plan.topology)] if options]
    if larger is not None:
        everything.append((_within_slices(larger, plan), larger))
    found = []
    for options, topology in everything:
        needed = _needed(config, decoder, plan, workload, options, topology)
        if needed is None or needed >= plan.needed:
            continue
        words = [f"--config.{name}={value}" for name, value in options.items()]
        if topology != plan.topology:
            words.insert(0, f"--topology={topology.name}")
        found.append(Advice(" ".join(words), needed, needed <= topology.chip.capacity))
    return sorted({each.change: each for each in found}.values(), key=lambda each: each.needed)


def _changes(config: Config, plan: Plan) -> Iterator[tuple[dict[str, Any], Topology]]:
    """Options that need less memory than the plan's, on its hardware."""
    if plan.remat != "full":
        yield {"model.remat": "full"}, plan.topology
    quantizations = ("none", "int8", "int4")
    for quantization in quantizations[quantizations.index(plan.quantization) + 1 :]:
        if config.method.kind != "full":
            yield {"model.quantization": quantization}, plan.topology
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}, plan.topology
    share = plan.mesh["data"] * plan.mesh["fsdp"]
    parts = config.optimizer.micro_batches
    if plan.rows % (2 * share * parts) == 0:
        yield {"optimizer.micro_batches": 2 * parts}, plan.topology
        yield {"data.batch": plan.rows // 2}, plan.topology
    if config.model.max_logit_rows > 128:
        yield {"model.max_logit_rows": 128}, plan.topology
    if plan.mesh["data"] > 1:
        yield _within_slices(plan.topology, plan), plan.topology


def _within_slices(topology: Topology, plan: Plan) -> dict[str, Any]:
    """The mesh on which each slice has the weights once."""
    return {"mesh.data": topology.slices, "mesh.fsdp": topology.count // topology.slices // plan.mesh["tensor"]}


def _needed(
    config: Config, decoder: DecoderConfig, plan: Plan, workload: Workload, options: dict[str, Any], topology: Topology
) -> float | None:
    """Bytes of a device with other options; None where they do not go with the hardware or the batch."""
    assert plan.memory is not None
    changed = copy.deepcopy(config)
    for name, value in options.items():
        section, option = name.split(".")
        changed[section][option] = value
    decoder = dataclasses.replace(decoder, quantization=changed.model.quantization, dtype=changed.model.dtype)
    remat = options.get("model.remat", plan.remat)
    try:
        mesh = mesh_of(changed, topology)
        then = estimated_memory(train_step(changed, decoder, mesh, workload.longest_shape, remat))
    except UserError:
        return None
    return max(then.frozen + then.learned, plan.needed + then.total - plan.memory.total)
