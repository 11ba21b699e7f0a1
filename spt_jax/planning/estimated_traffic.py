"""An estimate of what a train step moves, by arithmetic, for comparing meshes and where no compiler is present."""

from __future__ import annotations

from typing import NamedTuple

from spt_jax.planning.memory import Memory, device_tokens, kernel_bytes, learned_bytes
from spt_jax.planning.programs import TrainStep


class EstimatedTraffic(NamedTuple):
    """Of one device and one step.

    Attributes:
        hbm: Bytes read from HBM and written there.
        sent: Bytes sent in collectives.
    """

    hbm: float
    sent: float


def estimated_traffic(step: TrainStep, memory: Memory) -> EstimatedTraffic:
    """Of a train step.

    Kernels are gathered over fsdp, in the type of the arithmetic, and read in every pass (forward, backward, and
    forward again where activations are recomputed); a layer's activations are written or read once in each; what is
    kept is written and read once. Over tensor, a layer sums its two outputs in each pass; over rows, the gradients of
    what is learned are summed. Where micro-batches follow each other, all but the last happens in each of them.

    Args:
        step: The train step.
        memory: Of `spt_jax.planning.memory.estimated_memory`.
    """
    decoder, mesh = step.decoder, step.mesh
    passes, times = 2 if step.remat == "none" else 3, step.config.optimizer.micro_batches
    fsdp, tensor, layers = mesh.shape["fsdp"], mesh.shape["tensor"], decoder.num_layers
    kernels = kernel_bytes(step.frozen or step.state.trainable["lm"], decoder.jax_dtype if fsdp > 1 else None)
    outputs = device_tokens(step) * decoder.hidden_size * decoder.jax_dtype.dtype.itemsize * layers
    hbm = passes * (kernels * fsdp + layers * memory.layer / 2) + 2 * memory.kept
    gathers = passes * kernels * (fsdp - 1)
    sums = passes * 2 * 2 * outputs * (tensor - 1) / tensor
    rows = mesh.size // tensor
    return EstimatedTraffic(times * hbm, times * (gathers + sums) + 2 * learned_bytes(step.state) * (rows - 1) / rows)
