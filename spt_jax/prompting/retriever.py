"""The dense retriever: which prompt serves which context (METHOD 1; paper, section 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spt_jax.prompting.encoder import TransformerEncoder, across_rows

SOFTPLUS_BETA = 10.0
COSINE_EPSILON = 1e-8


def softplus_score(cosine: jax.Array) -> jax.Array:
    """``log(1 + exp(βx)) / β`` with β = 10: positive, smooth, and monotonic in the cosine."""
    return jax.nn.softplus(SOFTPLUS_BETA * cosine) / SOFTPLUS_BETA


def official_softplus_score(cosine: jax.Array) -> jax.Array:
    """`softplus_score` as the authors' program has it: the identity above βx = 1, so it jumps down at x = 0.1."""
    return jnp.where(SOFTPLUS_BETA * cosine > 1.0, cosine, softplus_score(cosine))


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


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """The static description of a retriever.

    Attributes:
        kind: ``"linear"``, or ``"transformer"``: a small encoder instead of ``lin`` (METHOD 1).
        sides: What it maps before the cosine: ``"both"``, ``"prompts"``, ``"contexts"`` or ``"none"``.
        share: Whether both sides use the same parameters (the authors' program; the paper's text has two).
        activation: A name in `SCORE_ACTIVATIONS`.
        context: ``"context"``: a masked mean over the context alone; ``"official"``: the authors' program, whose mean
            runs over padding too, whose softplus jumps, and whose transformer attends across examples.
        layers: Layers of the transformer.
        heads: Its attention heads.
        feed_forward: Width of its MLP.
        dropout: Its dropout in training.
    """

    kind: str = "linear"
    sides: str = "both"
    share: bool = True
    activation: str = "softplus"
    context: str = "context"
    layers: int = 2
    heads: int = 4
    feed_forward: int = 2048
    dropout: float = 0.0


class Contexts(NamedTuple):
    """What the retriever reads of a batch; made by the frozen LM, so nothing here has a gradient.

    Attributes:
        embeddings: ``[D, R, M]``, what `embed` gives for the rows, soft prompt excluded; None where `means` suffice.
        lengths: int32 ``[D, N]``; turn n's context is the row's first ``lengths[d, n]`` tokens, 0 where there is no
            turn. In the official mode: the R tokens over which the authors' mean runs, padding included.
        means: float32 ``[D, N, M]``, `context_means` of the two.
    """

    embeddings: jax.Array | None
    lengths: jax.Array
    means: jax.Array

    @classmethod
    def of(cls, embeddings: jax.Array, lengths: jax.Array) -> Contexts:
        """From embeddings ``[D, R, M]`` and lengths ``[D, N]``."""
        return cls(embeddings, lengths, context_means(embeddings, lengths))


class Retriever(nn.Module):
    """Scores every context against every prompt: ``score = softplus(cos(lin(c̄), lin(p̄)))``.

    Parameters: ``{"lin": {"kernel": [M, M], "bias": [M]}}``; with ``share=False`` ``lin_context`` and ``lin_prompt``.
    The transformer has ``encoder`` (``encoder_context``, ``encoder_prompt``) in their place, and in the official mode
    ``lin`` besides, which maps the prompts before the encoder does.

    Attributes:
        hidden_size: M.
        config: See `RetrieverConfig`.
    """

    hidden_size: int
    config: RetrieverConfig = RetrieverConfig()

    def __call__(self, contexts: Contexts, prompts: jax.Array, deterministic: bool = True) -> jax.Array:
        """Scores; gradients reach the prompts too, through their side of the cosine.

        Args:
            contexts: Of D rows with N turns.
            prompts: The bank, float32 ``[K, P, M]``.
            deterministic: Whether the transformer's dropout is off. If not, ``apply`` needs ``rngs={"dropout": key}``.

        Returns:
            Scores, float32 ``[D, N, K]``.
        """
        c = self.config
        cosine = cosine_similarity(*self.vectors(contexts, prompts, deterministic))
        if c.context == "official" and c.activation == "softplus":
            return official_softplus_score(cosine)
        return SCORE_ACTIVATIONS[c.activation](cosine)

    @nn.compact
    def vectors(
        self, contexts: Contexts, prompts: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """What the cosine is between: contexts, float32 ``[D, N, M]``, and prompts ``[K, M]``; as `__call__`."""
        side = self._linear if self.config.kind == "linear" else self._transformer
        return side(contexts, prompts.astype(jnp.float32), deterministic)

    def _maps(self, side: str) -> bool:
        return self.config.sides in ("both", side)

    def _linear(self, contexts: Contexts, prompts: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        # A linear map commutes with the mean.
        del deterministic
        means, prompt_means = contexts.means, prompts.mean(axis=1)
        if self.config.sides == "none":
            return means, prompt_means
        if self.config.share:
            lin_context = lin_prompt = Linear(self.hidden_size, name="lin")
        else:
            lin_context = Linear(self.hidden_size, name="lin_context") if self._maps("contexts") else None
            lin_prompt = Linear(self.hidden_size, name="lin_prompt") if self._maps("prompts") else None
        if lin_context is not None and self._maps("contexts"):
            means = lin_context(means)
        if lin_prompt is not None and self._maps("prompts"):
            prompt_means = lin_prompt(prompt_means)
        return means, prompt_means

    def _transformer(self, contexts: Contexts, prompts: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        c, means = self.config, contexts.means
        if c.sides == "none":
            return means, prompts.mean(axis=1)

        def encoder(name: str) -> TransformerEncoder:
            return TransformerEncoder(c.layers, c.heads, c.feed_forward, c.dropout, name=name)

        if c.share:
            encode_context = encode_prompt = encoder("encoder")
        else:
            encode_context = encoder("encoder_context") if self._maps("contexts") else None
            encode_prompt = encoder("encoder_prompt") if self._maps("prompts") else None
        if encode_prompt is not None and self._maps("prompts"):
            if c.context == "official":
                mapped = Linear(self.hidden_size, name="lin")(prompts)
                prompts = across_rows(lambda x, mask: encode_prompt(x, mask, deterministic), mapped)
            else:
                prompts = encode_prompt(prompts, _causal(prompts.shape[1]), deterministic)
        if encode_context is not None and self._maps("contexts"):
            assert contexts.embeddings is not None, "a transformer reads embeddings, not their means"
            text = contexts.embeddings
            if c.context == "official":
                present = contexts.lengths[:, 0] > 0
                encoded = across_rows(lambda x, mask: encode_context(x, mask, deterministic), text, present)
            else:
                encoded = encode_context(text, _causal(text.shape[1]), deterministic)
            means = context_means(encoded, contexts.lengths)
        return means, prompts.mean(axis=1)


def _causal(length: int) -> jax.Array:
    return jnp.tril(jnp.ones((length, length), bool))


def select(scores: jax.Array) -> jax.Array:
    """The prompt of each context, ``argmax_k score``; among ties the lowest k. ``[..., K]`` to int ``[...]``."""
    return jnp.argmax(scores, axis=-1)
