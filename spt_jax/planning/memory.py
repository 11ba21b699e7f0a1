"""An estimate of a train step's memory by arithmetic, for comparing choices and where no compiler is present.

What lies still (weights, what is learned, its moments) is exact. Activations are counted as the decoder makes them:

- kept for the backward pass, a layer: its input under remat = full; besides that the results of its weights' products
  under dots; and what lies between them under none.
- of the layer at work: everything of one layer, in both passes, and its kernels as they are multiplied: gathered over
  fsdp, dequantised.
- at the head: ``max_logit_rows`` rows of float32 logits, or those of all targets where they are fewer, three times
  (logits, probabilities, gradient).

docs/plan.md says how far this is from compiled programs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import traverse_util

from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.quantized import QTensor, tree_bytes
from spt_jax.parallel.rules import row_devices
from spt_jax.planning.programs import Shapes, TrainStep
from spt_jax.training.description import front_length


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        frozen: The LM's weights.
        learned: What is learned, its moments, its gradients, and the batch.
        kept: Activations that wait for the backward pass.
        layer: Activations of the layer at work.
        kernels: Of that layer, as they are multiplied.
        head: Logits.
    """

    frozen: float
    learned: float
    kept: float
    layer: float
    kernels: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


def estimated_memory(step: TrainStep) -> Memory:
    """Of a train step."""
    decoder, tokens, tensor = step.decoder, device_tokens(step), step.mesh.shape["tensor"]
    width = decoder.jax_dtype.dtype.itemsize
    inputs, products, between = _activations(decoder, tensor)
    logits = min(step.config.model.max_logit_rows, device_rows(step) * step.shape.targets)
    kept = {"full": inputs, "dots": inputs + products, "none": inputs + products + between}[step.remat]
    return Memory(
        frozen=device_bytes(step.frozen),
        learned=device_bytes((step.state, step.state.trainable, step.batch)),
        kept=tokens * kept * width * decoder.num_layers,
        layer=2 * tokens * (inputs + products + between) * width,
        kernels=_kernels(decoder, tensor),
        head=3 * 4 * logits * decoder.vocab_size / tensor,
    )


def device_rows(step: TrainStep) -> float:
    """Rows that a device has at once: its part of a micro-batch, behind every prompt."""
    config = step.config
    prompts = config.objective.prompts_per_step or config.bank.num_prompts if config.method.kind == "spt" else 1
    return config.data.batch * prompts / row_devices(step.mesh) / config.optimizer.micro_batches


def device_tokens(step: TrainStep) -> float:
    """Tokens of `device_rows`, soft prompts included."""
    return device_rows(step) * (step.shape.length + front_length(step.config))


def _activations(c: DecoderConfig, tensor: int) -> tuple[float, float, float]:
    """Numbers a token that a layer makes: its input, its weights' products, and what lies between them."""
    heads, key_heads = c.num_attention_heads * c.head_dim / tensor, 2 * c.num_key_value_heads * c.head_dim / tensor
    inner = c.intermediate_size / tensor
    up = 2 * inner if c.gated_mlp else inner
    return c.hidden_size, heads + key_heads + 2 * c.hidden_size + up, 2 * heads + key_heads + 3 * c.hidden_size + up


def _kernels(c: DecoderConfig, tensor: int) -> float:
    """Bytes of a layer's largest kernel and the next one, as they are multiplied: whole over fsdp, dequantised."""
    attention = c.hidden_size * c.num_attention_heads * c.head_dim
    largest = max(attention, c.hidden_size * c.intermediate_size)
    return 2 * largest / tensor * c.jax_dtype.dtype.itemsize


def device_bytes(tree: Shapes) -> float:
    """Bytes of one device's part of a tree of shapes with shardings."""

    def part(leaf: Any) -> Any:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return float(tree_bytes(jax.tree.map(part, tree)))


def learned_bytes(state: Shapes) -> float:
    """Bytes of what is learned, which devices sum their gradients of."""
    return float(sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state.trainable)))


def kernel_bytes(weights: Shapes, dtype: Any = None) -> float:
    """Bytes of one device's part of the blocks' kernels, which every pass over the layers reads.

    Args:
        weights: The LM's tree.
        dtype: The type they are counted in; None for that in which they lie, integers and their scales included.
    """
    flat = traverse_util.flatten_dict(weights.get("layers", {}), is_leaf=lambda _, x: isinstance(x, QTensor))
    kernels: list[Any] = [leaf for path, leaf in flat.items() if path[-1] == "kernel"]
    if dtype is None:
        return device_bytes(kernels)
    whole = [leaf.q if isinstance(leaf, QTensor) else leaf for leaf in kernels]
    return device_bytes([jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding) for leaf in whole])
