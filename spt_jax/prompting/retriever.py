"""The dense retriever: which prompt serves which context (METHOD 1; paper, section 3.2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SOFTPLUS_BETA = 10.0
COSINE_EPSILON = 1e-8


def softplus_score(cosine: jax.Array) -> jax.Array:
    """``log(1 + exp(βx)) / β`` with β = 10: positive, smooth, and monotonic in the cosine."""
    return jax.nn.softplus(SOFTPLUS_BETA * cosine) / SOFTPLUS_BETA


SCORE_ACTIVATIONS = {"softplus": softplus_score, "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu}


def cosine_similarity(x: jax.Array, y: jax.Array, epsilon: float = COSINE_EPSILON) -> jax.Array:
    """Cosines of every row of `x` with every row of `y`, in float32, with finite gradients at zero.

    Args:
        x: ``[..., U, M]``.
        y: ``[K, M]``.
        epsilon: Lower bound of each norm.

    Returns:
        ``[..., U, K]``.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    inverse_x = jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1), epsilon**2))
    inverse_y = jax.lax.rsqrt(jnp.maximum(jnp.sum(y * y, axis=-1), epsilon**2))
    products = jnp.einsum("...um,km->...uk", x, y, precision=jax.lax.Precision.HIGHEST)
    return products * inverse_x[..., None] * inverse_y


def context_means(embeddings: jax.Array, context_lengths: jax.Array) -> jax.Array:
    """The mean embedding of each turn's context, a prefix of its row.

    A linear map commutes with the mean, so the retriever's ``e_c = mean_t(lin(embed(c_t)))`` is ``lin`` of this.

    Args:
        embeddings: ``[D, T, M]``, what `embed` gives for the row's tokens, soft prompt excluded.
        context_lengths: int ``[D, N]``; turn n's context is the row's first ``context_lengths[d, n]`` tokens, 0 where
            there is no turn.

    Returns:
        float32 ``[D, N, M]``; zero where there is no turn.
    """
    inside = jnp.arange(embeddings.shape[1]) < context_lengths[..., None]
    sums = jnp.einsum(
        "dnt,dtm->dnm", inside.astype(jnp.float32), embeddings.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return sums / jnp.maximum(context_lengths, 1)[..., None]


class Linear(nn.Module):
    """A linear layer with bias in float32, initialised like the authors' ``torch.nn.Linear``: U(±1/√M)."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., M]`` to float32 ``[..., features]``."""
        bound = x.shape[-1] ** -0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("kernel", uniform, (x.shape[-1], self.features))
        bias = self.param("bias", uniform, (self.features,))
        return jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST) + bias


class Retriever(nn.Module):
    """Scores every context against every prompt: ``score = softplus(cos(lin(c̄), lin(p̄)))``.

    Parameters: ``{"lin": {"kernel": [M, M], "bias": [M]}}``; with ``share=False`` ``lin_context`` and ``lin_prompt``.

    Attributes:
        hidden_size: M.
        share: Whether both sides use one linear layer (the authors' program; the paper's text has two).
        activation: A name in `SCORE_ACTIVATIONS`.
    """

    hidden_size: int
    share: bool = True
    activation: str = "softplus"

    @nn.compact
    def __call__(self, means: jax.Array, prompts: jax.Array) -> jax.Array:
        """Scores; gradients reach the prompts too, through their side of the cosine.

        Args:
            means: Context means, float32 ``[..., U, M]`` (see `context_means`).
            prompts: The bank, float32 ``[K, P, M]``.

        Returns:
            Scores, float32 ``[..., U, K]``.
        """
        if self.share:
            lin_context = lin_prompt = Linear(self.hidden_size, name="lin")
        else:
            lin_context = Linear(self.hidden_size, name="lin_context")
            lin_prompt = Linear(self.hidden_size, name="lin_prompt")
        # A bank [1, 0, M] is the LM without a prompt; its one score is then the same for every context.
        prompt_means = jnp.sum(prompts.astype(jnp.float32), axis=1) / max(1, prompts.shape[1])
        cosine = cosine_similarity(lin_context(means), lin_prompt(prompt_means))
        return SCORE_ACTIVATIONS[self.activation](cosine)


def select(scores: jax.Array) -> jax.Array:
    """The prompt of each context, ``argmax_k score``; among ties the lowest k. ``[..., K]`` to int ``[...]``."""
    return jnp.argmax(scores, axis=-1)
