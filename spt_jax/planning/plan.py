"""A plan: what the train step, or generation, of a configuration takes on a topology."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from spt_jax.config import Config
from spt_jax.data.buckets import BucketShape
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.planning.compilation import Compiled, compile_program
from spt_jax.planning.estimated_traffic import estimated_traffic
from spt_jax.planning.memory import Memory, estimated_memory, learned_bytes
from spt_jax.planning.programs import TrainStep, generation, traceable, train_step
from spt_jax.planning.roofline import Roofline, roofline
from spt_jax.planning.topology import Topology, topology_mesh
from spt_jax.planning.workload import Workload
from spt_jax.training.description import attention_kernel, describe
from spt_jax.training.remat import POLICIES, leaves_enough

_HOPELESS = 1.5
"""Above this multiple of what programs may use, by the estimate, a policy is not compiled while another is left."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one configuration takes on one topology.

    Attributes:
        source: The LM.
        topology: The hardware.
        mesh: Places along each axis.
        rows: Of a batch, over all devices.
        prompts: K, the conditions under which each row is seen.
        remat: The policy; empty for generation.
        quantization: Of the frozen kernels.
        attention: The kernel of whole rows.
        programs: As compiled; empty where no compiler is present.
        memory: The estimate of the train step's memory; None for generation.
        needed: Bytes of a device: compiled where it could be, else estimated.
        capacity: Bytes that it has for programs.
        longest: Roofline of a train step on the longest rows, or of all that replies to a batch.
        mean: Roofline of a train step on rows of mean length; None for generation.
        steps: Of an epoch; 0 for generation.
    """

    source: str
    topology: Topology
    mesh: dict[str, int]
    rows: int
    prompts: int
    remat: str
    quantization: str
    attention: str
    programs: tuple[Compiled, ...]
    memory: Memory | None
    needed: float
    capacity: float
    longest: Roofline | None
    mean: Roofline | None
    steps: int

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        if self.programs:
            return all(program.fits for program in self.programs)
        return self.needed <= self.capacity

    @property
    def counted(self) -> float:
        """Bytes of a device by which training would choose what is recomputed."""
        counted = [program.counted for program in self.programs if program.counted is not None]
        return max(counted, default=self.needed)

    @property
    def rows_per_second(self) -> float:
        """Dialogues a second at best; 0 where it does not fit or nothing is trained."""
        return self.rows / self.mean.seconds if self.fits and self.mean is not None else 0.0


def mesh_of(config: Config, topology: Topology) -> Mesh:
    """The mesh of a configuration on a topology.

    Raises:
        UserError: See `topology_mesh`.
    """
    return topology_mesh(topology, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def plan_training(
    config: Config,
    decoder: DecoderConfig,
    topology: Topology,
    workload: Workload,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles the train step on the longest rows; with ``model.remat = auto``, of the policy that training takes.

    Args:
        config: A validated configuration.
        decoder: Its LM.
        topology: The hardware.
        workload: The rows.
        say: Takes a line before each compilation, which takes up to minutes.

    Raises:
        UserError: The mesh does not fit the topology or the batch, there is no compiler for it, or ``model.attention``
            asks for what the chips cannot do.
    """
    mesh = mesh_of(config, topology)
    attention = attention_kernel(decoder, config.model.attention, topology.chip, mesh.shape["tensor"])
    policies = POLICIES if config.model.remat == "auto" else (config.model.remat,)
    plan, capacity = None, topology.chip.capacity
    for policy in policies:
        step = train_step(config, decoder, mesh, workload.longest_shape, policy)
        memory = estimated_memory(step)
        if policy != policies[-1] and memory.total > _HOPELESS * topology.chip.capacity:
            continue
        compiled = None
        if topology.chip.kind == "tpu":
            say(f"compiling the train step for {topology}, remat = {policy}")
            compiled = compile_program(step.program, mesh.size)
        plan = _training_plan(step, topology, workload, memory, compiled, attention)
        capacity = min(capacity, plan.capacity)
        if plan.fits and leaves_enough(plan.counted, capacity):
            break
    assert plan is not None
    return plan


def _training_plan(
    longest: TrainStep,
    topology: Topology,
    workload: Workload,
    memory: Memory,
    compiled: Compiled | None,
    attention: str,
) -> Plan:
    """Puts together what is known of a step; a shape's FLOPs are traced, its bytes are those of the longest rows."""
    config, decoder, mesh = longest.config, longest.decoder, longest.mesh

    def on(shape: BucketShape) -> Roofline:
        step = train_step(config, decoder, mesh, shape, longest.remat)
        flops = step.flops / mesh.size
        if compiled is not None and compiled.traffic is not None:
            share = shape.length / workload.longest_shape.length
            hbm, sent = share * compiled.traffic.hbm, sum(c.sent for c in compiled.traffic.collectives)
        else:
            hbm, sent = estimated_traffic(step, estimated_memory(step))
        return roofline(topology, flops, hbm, sent, learned_bytes(step.state))

    return Plan(
        source=config.model.source,
        topology=topology,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        rows=config.data.batch,
        prompts=traceable(config, decoder, mesh).num_prompts,
        remat=longest.remat,
        quantization=decoder.quantization,
        attention=attention,
        programs=() if compiled is None else (compiled,),
        memory=memory,
        needed=memory.total if compiled is None else compiled.peak,
        capacity=(None if compiled is None else compiled.capacity) or topology.chip.capacity,
        longest=on(workload.longest_shape),
        mean=on(workload.mean_shape),
        steps=workload.steps(config.data.batch),
    )


def plan_generation(
    config: Config,
    decoder: DecoderConfig,
    topology: Topology,
    workload: Workload,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles what replies to a batch of the longest contexts.

    Args:
        config: As in `plan_training`; so are the others.
        decoder: Its LM.
        topology: TPUs.
        workload: The rows.
        say: Takes a line before each compilation.

    Raises:
        UserError: As `plan_training`.
    """
    mesh = mesh_of(config, topology)
    compiled = []
    for program in generation(config, decoder, mesh, workload.longest_shape.length):
        say(f"compiling {program.name} for {topology}")
        compiled.append(compile_program(program, mesh.size, config.evaluation.max_new_tokens - 1))
    traffic = [each.traffic for each in compiled if each.traffic is not None]
    hbm, sent = sum(each.hbm for each in traffic), sum(c.sent for each in traffic for c in each.collectives)
    model = describe(config, decoder, mesh)
    return Plan(
        source=config.model.source,
        topology=topology,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        rows=config.evaluation.batch,
        prompts=1,
        remat="",
        quantization=decoder.quantization,
        attention=model.decoder.attention_kernel,
        programs=tuple(compiled),
        memory=None,
        needed=max(each.peak for each in compiled),
        capacity=next((each.capacity for each in compiled if each.capacity), topology.chip.capacity),
        longest=roofline(topology, sum(each.flops for each in compiled), hbm, sent),
        mean=None,
        steps=0,
    )
