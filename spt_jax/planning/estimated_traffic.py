"""An estimate of what a train step moves, by arithmetic, for comparing meshes and where no compiler is present."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from spt_jax.config import Config
from spt_jax.data.buckets import BucketShape
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.planning.memory import Memory, device_tokens, kernel_bytes, learned_bytes
from spt_jax.planning.programs import Program


class EstimatedTraffic(NamedTuple):
    """Of one device and one step.

    Attributes:
        hbm: Bytes read from HBM and written there.
        sent: Bytes sent in collectives.
    """

    hbm: float
    sent: float


def estimated_traffic(
    config: Config,
    decoder: DecoderConfig,
    mesh: Mesh,
    shape: BucketShape,
    remat: str,
    program: Program,
    memory: Memory,
) -> EstimatedTraffic:
    """Of a train step.

    Kernels are gathered over fsdp and read in every pass (forward, backward, and forward again where activations are
    recomputed); a layer's activations are written or read once in each; what is kept is written and read once. Over
    tensor, a layer sums its two outputs in each pass; over rows, the gradients of what is learned are summed. Where
    micro-batches follow each other, all but the last happens in each of them.

    Args:
        config: As in `spt_jax.planning.memory.estimated_memory`, whose result `memory` is; so are the others.
        decoder: The LM.
        mesh: The mesh.
        shape: The batch's.
        remat: The policy.
        program: The train step.
        memory: Its memory.
    """
    state, frozen, _ = program.arguments
    passes, times = 2 if remat == "none" else 3, config.optimizer.micro_batches
    fsdp, tensor, layers = mesh.shape["fsdp"], mesh.shape["tensor"], decoder.num_layers
    kernels = kernel_bytes(frozen)
    outputs = device_tokens(config, mesh, shape) * decoder.hidden_size * decoder.jax_dtype.dtype.itemsize * layers
    hbm = passes * (kernels * fsdp + layers * memory.layer / 2) + 2 * memory.kept
    gathers = passes * kernels * (fsdp - 1)
    sums = passes * 2 * 2 * outputs * (tensor - 1) / tensor
    rows = mesh.size // tensor
    return EstimatedTraffic(times * hbm, times * (gathers + sums) + 2 * learned_bytes(state) * (rows - 1) / rows)
