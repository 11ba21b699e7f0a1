"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the rotate-half layout of Hugging Face checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.models.decoder_config import DecoderConfig


def rotary_frequencies(config: DecoderConfig) -> np.ndarray:
    """The angular frequency of each rotated pair, in radians a position.

    Returns:
        float32 ``[head_dim // 2]``, after `config.rope_scaling`.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "factors":
        if len(scaling.factors) != len(frequencies):
            raise ValueError(f"{len(scaling.factors)} rope factors for {len(frequencies)} rotated pairs")
        return (frequencies / np.asarray(scaling.factors)).astype(np.float32)
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    if scaling.kind != "llama3":
        raise ValueError(f"rope_scaling kind is {scaling.kind!r}; allowed: linear, llama3, factors")
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0.0, 1.0)  # 1: a short wavelength, kept; 0: a long one, stretched
    return (share * frequencies + (1 - share) * stretched).astype(np.float32)


def rotary_table(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every position's angles.

    Args:
        config: The decoder.
        positions: int ``[B, T]``; the soft prompt, where there is one, starts at 0.

    Returns:
        Two float32 arrays ``[B, T, 1, head_dim]``, ready to broadcast over heads.
    """
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair ``(x_i, x_{i + head_dim/2})`` by its position's angle; ``[B, T, H, head_dim]`` in and out."""
    cosine, sine = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cosine + rotated * sine).astype(x.dtype)
