"""From seeds to random keys: a row's draws depend on its own seed, never on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import UserError


def row_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """One key a row, ``[n]``.

    Args:
        seed: One for all rows (row i draws with key i of it), or one a row.
        count: n.

    Raises:
        UserError: A seed is outside its range, or there is not one for each row.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    for value in seeds:
        if not 0 <= value < 2**32:
            raise UserError(f"seed is {value}; allowed: 0 to {2**32 - 1}")
    fold_in = jax.vmap(jax.random.fold_in)
    if isinstance(seed, int):
        bases = jnp.full(count, seed, jnp.uint32)
        return fold_in(jax.vmap(jax.random.key)(bases), jnp.arange(count))
    if len(seeds) != count:
        raise UserError(f"{count} contexts came with {len(seeds)} seeds; give one for each, or one for all")
    return fold_in(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)), jnp.zeros(count, jnp.int32))


def strand_keys(keys: jax.Array, strands: int) -> jax.Array:
    """From one key a row to one a strand, ``[n, strands]``: the first is the same however many there are."""
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))(keys, jnp.arange(strands))


def seed_at(seed: int, place: int) -> int:
    """The seed of the row at a place, 0, 1, …: its own, and another one for another `seed`."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])
