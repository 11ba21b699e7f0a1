"""The mesh, the rematerialisation and the rows with which a train step is fastest, among those that fit."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.planning.estimated_traffic import estimated_traffic
from spt_jax.planning.memory import estimated_memory, learned_bytes
from spt_jax.planning.plan import Plan, mesh_of, plan_training
from spt_jax.planning.programs import train_step
from spt_jax.planning.roofline import roofline
from spt_jax.planning.topology import Topology
from spt_jax.planning.workload import Workload
from spt_jax.training.remat import POLICIES

MARGIN = 1.25
"""A candidate whose estimate is above this multiple of what programs may use is not compiled."""
WORTH = 1.02
"""A candidate that promises no more than this multiple of the best so far is not worth the minutes of a compilation."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A choice that is estimated and not compiled yet.

    Attributes:
        config: The configuration with that choice.
        rows_per_second: Rows a second, all of the longest length, at best.
        needed: Bytes of a device.
    """

    config: Config
    rows_per_second: float
    needed: float


def search(
    config: Config,
    decoder: DecoderConfig,
    topology: Topology,
    workload: Workload,
    rows: tuple[int, ...],
    tries: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Compiles candidates, the fastest on the longest rows first, until none that is left promises more than the best.

    An estimate leaves out what only the compiler knows, so it promises too much: what is compiled may be slower than
    the next candidate's promise, which is then compiled too.

    Args:
        config: A validated configuration; its mesh, remat and batch are replaced.
        decoder: Its LM.
        topology: The hardware.
        workload: The rows of an epoch.
        rows: Batch sizes to try.
        tries: At most so many are compiled.
        say: Takes a line for each of them.

    Returns:
        The plans in the order of trying.

    Raises:
        UserError: No mesh goes with the topology and the rows.
    """
    found = candidates(config, decoder, topology, workload, rows)
    # For GPUs there is no compiler here that would know better than the estimate.
    limit = (1.0 if topology.chip.kind == "gpu" else MARGIN) * topology.chip.capacity
    plausible = [each for each in found if each.needed <= limit] or [min(found, key=lambda each: each.needed)]
    say(f"{len(found)} choices of mesh, remat and rows; {len(plausible)} of them may fit by the estimate")
    plans: list[Plan] = []
    for candidate in plausible[:tries]:
        best = max((_longest_rows_per_second(plan) for plan in plans), default=0.0)
        if candidate.rows_per_second <= WORTH * best:
            break
        plans.append(plan_training(candidate.config, decoder, topology, workload, say))
    return plans


def _longest_rows_per_second(plan: Plan) -> float:
    """As `Candidate.rows_per_second`; 0 for a plan that does not fit."""
    return plan.rows / plan.longest.seconds if plan.fits and plan.longest is not None else 0.0


def candidates(
    config: Config, decoder: DecoderConfig, topology: Topology, workload: Workload, rows: tuple[int, ...]
) -> list[Candidate]:
    """All choices that go with the hardware, the fastest by the estimate first; of equals, that of the least memory.

    Raises:
        UserError: There is none.
    """
    found: list[Candidate] = []
    flops_per_row: dict[str, float] = {}
    for data, fsdp, tensor in _meshes(topology, decoder):
        changed = copy.deepcopy(config)
        changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor = data, fsdp, tensor
        try:
            mesh = mesh_of(changed, topology)
        except UserError:
            continue
        for count in rows:
            changed.data.batch = count
            try:
                found += _of_policies(changed, decoder, topology, workload, mesh, flops_per_row)
            except UserError:
                continue
    if not found:
        raise UserError(
            f"no mesh of {topology} shares {', '.join(map(str, rows))} rows in {config.optimizer.micro_batches} "
            f"micro-batches and {decoder.num_attention_heads} heads among {topology.count} devices; allowed: --rows in "
            "multiples of the devices"
        )
    return sorted(found, key=lambda each: (-each.rows_per_second, each.needed))


def _meshes(topology: Topology, decoder: DecoderConfig) -> Iterator[tuple[int, int, int]]:
    """Data, fsdp and tensor; heads are never split, and slices share rows alone."""
    sizes = [size for size in range(1, topology.count + 1) if topology.count % size == 0]
    for data, fsdp in itertools.product(sizes, sizes):
        if topology.count % (data * fsdp) or data % topology.slices:
            continue
        tensor = topology.count // (data * fsdp)
        if decoder.num_attention_heads % tensor == 0 and decoder.num_key_value_heads % tensor == 0:
            yield data, fsdp, tensor


def _of_policies(
    config: Config,
    decoder: DecoderConfig,
    topology: Topology,
    workload: Workload,
    mesh: Mesh,
    flops_per_row: dict[str, float],
) -> Iterator[Candidate]:
    """The candidates of a mesh and a batch; FLOPs are traced once a policy, as they are the same on any mesh."""
    for policy in POLICIES:
        step = train_step(config, decoder, mesh, workload.longest_shape, policy)
        memory = estimated_memory(step)
        hbm, sent = estimated_traffic(step, memory)
        if policy not in flops_per_row:
            flops_per_row[policy] = step.flops / config.data.batch
        flops = flops_per_row[policy] * config.data.batch / mesh.size
        times = roofline(topology, flops, hbm, sent, learned_bytes(step.state))
        chosen = copy.deepcopy(config)
        chosen.model.remat = policy
        yield Candidate(chosen, config.data.batch / times.seconds, memory.total)
