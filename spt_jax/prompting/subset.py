"""Training on m of K prompts a row, so that a bank of many prompts costs no more than one of a few.

Each row is seen under its favourite (the highest mean score of its turns) and m - 1 others drawn uniformly without
replacement. A prompt's chance π to be among them is 1 for the favourite and (m - 1) / (K - 1) for every other, so the
LM loss with weights 1 / π has the full loss as its expectation, and its gradient with respect to the bank the full
gradient (Horvitz and Thompson, 1952); only m of K rows are computed. What else depends on the subset is an
approximation: the selection loss compares distributions renormalised over it, and the fusion loss mixes its logits with
scores scaled up to the sum over all K.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Subset(NamedTuple):
    """Which prompts each row is seen under.

    Attributes:
        prompts: int32 ``[D, m]``, the favourite first; None for all K.
        inverse_chances: float32 ``[D, m]``, 1 / π; None for all K.
    """

    prompts: jax.Array | None = None
    inverse_chances: jax.Array | None = None

    def of(self, per_prompt: jax.Array) -> jax.Array:
        """The subset of ``[D, N, K]``: ``[D, N, m]``."""
        if self.prompts is None:
            return per_prompt
        return jnp.take_along_axis(per_prompt, self.prompts[:, None], axis=-1)

    def fusion_scores(self, scores: jax.Array) -> jax.Array:
        """Scores ``[D, N, K]`` of the subset, scaled so that their sum is that over all K: ``[D, N, m]``."""
        if self.prompts is None:
            return scores
        mine = self.of(scores)
        total = mine.sum(axis=-1, keepdims=True)
        return mine * (scores.sum(axis=-1, keepdims=True) / jnp.where(total == 0, 1.0, total))


def draw_subset(scores: jax.Array, present: jax.Array, size: int, key: jax.Array | None) -> Subset:
    """Draws m prompts a row.

    Args:
        scores: float32 ``[D, N, K]``; no gradient passes.
        present: ``[D, N]``, 0 where there is no turn.
        size: m; 0 or K for all prompts, which draws nothing.
        key: A random key; may be None where nothing is drawn.

    Returns:
        See `Subset`.
    """
    rows, _, num_prompts = scores.shape
    if size in (0, num_prompts):
        return Subset()
    assert key is not None, "a subset needs a key"
    mean = jax.lax.stop_gradient(jnp.einsum("dnk,dn->dk", scores, present, precision=jax.lax.Precision.HIGHEST))
    order = jax.random.uniform(key, (rows, num_prompts))
    # Uniform numbers are below 1, so the favourite stands first and the others in a random order behind it.
    order = jnp.where(jax.nn.one_hot(jnp.argmax(mean, axis=-1), num_prompts, dtype=bool), 1.0, order)
    _, prompts = jax.lax.top_k(order, size)
    others = (num_prompts - 1) / max(size - 1, 1)
    inverse = jnp.full((rows, size), others, jnp.float32).at[:, 0].set(1.0)
    return Subset(prompts.astype(jnp.int32), inverse)
