"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the rotate-half layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.models.decoder_config import DecoderConfig, Rope, RopeScaling

RotaryTable = tuple[jax.Array, jax.Array]
"""Cosines and sines, float32 ``[B, T, 1, rotated features]``."""


def rotary_frequencies(config: DecoderConfig, rope: Rope) -> np.ndarray:
    """The angular frequency of each rotated pair, in radians a position.

    Returns:
        float32 ``[rotated features // 2]``, after the scaling.
    """
    width = config.head_dim if config.rotary_dim is None else config.rotary_dim
    theta, scaling = rope.theta, rope.scaling
    if scaling is not None and scaling.kind == "dynamic":
        stretch = max(1.0, config.longest_row / scaling.original_max_position_embeddings)
        theta *= (scaling.factor * stretch - (scaling.factor - 1)) ** (width / (width - 2))
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling, theta, config.longest_row)
    return frequencies.astype(np.float32)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling, theta: float, longest_row: int) -> np.ndarray:
    original = scaling.original_max_position_embeddings
    match scaling.kind:
        case "dynamic":
            return frequencies
        case "linear":
            return frequencies / scaling.factor
        case "factors" | "longrope":
            long = scaling.kind == "longrope" and longest_row > original
            factors = scaling.long_factors if long else scaling.factors
            return frequencies / np.asarray(factors)
        case "llama3":
            turns = original * frequencies / (2 * np.pi)
            kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        case "yarn":
            width = 2 * len(frequencies)

            def pair_turning(turns: float) -> float:
                return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

            first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            kept = 1 - (np.arange(len(frequencies)) - first) / max(last - first, 0.001)
        case _:
            raise ValueError(f"unknown kind of rope scaling {scaling.kind!r}")
    kept = np.clip(kept, 0.0, 1.0)  # 1: a fast pair, left alone; 0: a slow one, stretched
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotary_table(config: DecoderConfig, rope: Rope | None, positions: jax.Array) -> RotaryTable:
    """Cosines and sines of every position's angles.

    Args:
        config: The decoder.
        rope: The rotation; None for none, in a decoder where other layers rotate.
        positions: int ``[B, T]``; the soft prompt, where there is one, starts at 0.

    Returns:
        Two float32 arrays ``[B, T, 1, rotated features]``, ready to broadcast over heads.
    """
    if rope is None:
        shape = (*positions.shape, 1, config.head_dim if config.rotary_dim is None else config.rotary_dim)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config, rope)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    factor = rope.scaling.attention_factor if rope.scaling is not None else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, table: RotaryTable) -> jax.Array:
    """Turns each pair ``(x_i, x_{i + d/2})`` of the first d features by its position's angle.

    Args:
        x: ``[B, T, H, head_dim]``.
        table: See `rotary_table`; its width is d, features beyond it are left alone.

    Returns:
        Like `x`.
    """
    cosine, sine = table
    width = cosine.shape[-1]
    rotated = x[..., :width].astype(jnp.float32)
    first, second = jnp.split(rotated, 2, axis=-1)
    rotated = (rotated * cosine + jnp.concatenate([-second, first], axis=-1) * sine).astype(x.dtype)
    return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)
