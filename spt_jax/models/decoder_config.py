"""What makes one decoder family differ from another, as plain fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from spt_jax.errors import UserError

REMAT_POLICIES = ("none", "full", "dots")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length.

    Attributes:
        kind: ``"linear"`` divides every frequency by `factor` (position interpolation, arXiv 2306.15595); ``"llama3"``
            does so for wavelengths beyond ``original_max_position_embeddings / low_freq_factor``, leaves those below
            ``original_max_position_embeddings / high_freq_factor`` and blends between (Llama 3.1, arXiv 2407.21783);
            ``"factors"`` divides each pair's frequency by its own factor (how GGUF files store the same).
        factor: The stretch.
        low_freq_factor: Llama 3 only.
        high_freq_factor: Llama 3 only.
        original_max_position_embeddings: Llama 3 only; tokens.
        factors: ``"factors"`` only; one divisor for each of the ``head_dim // 2`` pairs.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal decoder, described by what makes it differ.

    Hashable, so that it may be a static argument of a jitted function.

    Attributes:
        vocab_size: V, rows of the embedding table.
        hidden_size: M, the model width.
        intermediate_size: Width of the gated MLP.
        num_layers: Number of blocks.
        num_attention_heads: H, query heads.
        num_key_value_heads: Heads of keys and values; divides `num_attention_heads` (grouped-query attention).
        head_dim: Width of one head.
        max_position_embeddings: The context in tokens for which the model was trained.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: None for plain rotary embeddings.
        tie_word_embeddings: Whether the vocabulary projection is the transposed embedding table.
        attention_bias: Whether the four attention projections carry a bias.
        mlp_bias: Whether the three MLP projections carry a bias.
        dtype: ``"float32"`` or ``"bfloat16"``; the type of parameters and activations. Softmaxes, norms' statistics
            and rotary tables are float32 whatever it is.
        remat: ``"none"`` keeps every activation for the backward pass, ``"dots"`` keeps the results of weight matrix
            products, ``"full"`` keeps each block's input alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat is {self.remat!r}; allowed: {', '.join(REMAT_POLICIES)}")

    @property
    def jax_dtype(self) -> Any:
        """The JAX type of parameters and activations."""
        return DTYPES[self.dtype]
