"""A frozen kernel with a trained low-rank update beside it (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from spt_jax.models.dropout import Dropout


def product(x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
    """Contracts the last `num_inputs` axes of `x` with the first of a kernel: ``[..., in...]`` to ``[..., out...]``."""
    ours = tuple(range(x.ndim - num_inputs, x.ndim))
    return jax.lax.dot_general(x, kernel, ((ours, tuple(range(num_inputs))), ((), ())))


@flax.struct.dataclass
class LowRankKernel:
    """``W + scale · down · up``, never multiplied out; takes a kernel's place in the frozen tree.

    The shapes are those of one layer; in the tree of the LM every leaf has the layers L in front.

    Attributes:
        base: W ``[in..., out...]``, an array or a `QTensor`. It is the first leaf: Flax compares a parameter's leaves
            with those that the module declares, in order, and the module declares a kernel.
        down: float32 ``[in..., r]``.
        up: float32 ``[r, out...]``.
        dropout: Of the update's input; None for none.
        scale: α / r.
    """

    base: Any
    down: jax.Array
    up: jax.Array
    dropout: Dropout | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    def update(self, x: jax.Array, num_inputs: int) -> jax.Array:
        """``dropout(x) · down · up · scale`` in the type of `x`: ``[..., in...]`` to ``[..., out...]``."""
        inner = product(x if self.dropout is None else self.dropout(x), self.down.astype(x.dtype), num_inputs)
        return product(inner, self.up.astype(x.dtype), 1) * jnp.asarray(self.scale, x.dtype)
