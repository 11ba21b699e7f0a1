"""The frozen LM's own dropout (Srivastava et al., 2014), as some families are trained with; off unless asked for."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from spt_jax.errors import UserError


@flax.struct.dataclass
class Dropout:
    """Inverted dropout: an element becomes 0 with probability `rate`, or else is divided by ``1 - rate``.

    The mask is a function of the key alone, so that a recomputing backward pass meets the same one. The rate is no leaf
    of the tree: a `Dropout` may be an argument of a jitted function.

    Attributes:
        key: A JAX random key, or several along a first axis (see `split`).
        rate: At least 0 and below 1.

    Raises:
        UserError: The rate is outside of its range.
    """

    key: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"the LM's dropout rate is {self.rate}; allowed: at least 0 and below 1")

    def split(self, count: int) -> Dropout:
        """Independent ones, their keys along a first axis."""
        return Dropout(jax.random.split(self.key, count), self.rate)

    def __getitem__(self, index: int | slice) -> Dropout:
        """One of several, or some of them."""
        return Dropout(self.key[index], self.rate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Each element of `x` dropped or scaled on its own; shape and type as they are."""
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))
