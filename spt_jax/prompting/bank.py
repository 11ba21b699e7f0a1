"""The bank of soft prompts ``[K, P, M]`` and the ways to start one.

Each initialiser is a function that returns float32 prompts and checks what it was given, naming both shapes where they
differ. The bank stays float32 whatever the LM's type; it is cast where it joins the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from spt_jax.errors import UserError


def check_bank_shape(prompts: np.ndarray | jax.Array, shape: tuple[int, int, int], origin: str) -> None:
    """Raises UserError unless `prompts` has the shape ``(K, P, M)`` and is finite; `origin` names the place."""
    if tuple(prompts.shape) != shape:
        raise UserError(
            f"{origin} holds prompts of shape {tuple(prompts.shape)}, but the bank needs (K, P, M) = {shape}"
        )
    if not bool(jnp.isfinite(jnp.asarray(prompts)).all()):
        raise UserError(f"{origin} holds values that are not finite")


def from_vocabulary(key: jax.Array, table: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Each virtual token starts as the embedding of a random vocabulary token, no token drawn twice while they last.

    Args:
        key: A random key.
        table: What `embed` gives for every token id, ``[V, M]``.
        shape: ``(K, P, M)``.

    Returns:
        float32 ``[K, P, M]``.
    """
    num_prompts, prompt_length, width = shape
    count = num_prompts * prompt_length
    ids = jax.random.choice(key, table.shape[0], (count,), replace=count > table.shape[0])
    prompts = jnp.take(table, ids, axis=0).astype(jnp.float32).reshape(num_prompts, prompt_length, table.shape[1])
    check_bank_shape(prompts, (num_prompts, prompt_length, width), "the embedding table")
    return prompts


def from_normal(key: jax.Array, shape: tuple[int, int, int], stddev: float = 1.0) -> jax.Array:
    """Independent normal values; standard deviation 1 is the authors' program."""
    return stddev * jax.random.normal(key, shape, jnp.float32)


def from_token_ids(token_ids: Sequence[Sequence[int]], table: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Each prompt starts as the embeddings of a text, cut to P tokens or repeated until P are filled.

    Args:
        token_ids: K lists of token ids, one text a prompt; a single list serves every prompt.
        table: What `embed` gives for every token id, ``[V, M]``.
        shape: ``(K, P, M)``.

    Returns:
        float32 ``[K, P, M]``.

    Raises:
        UserError: The number of texts is neither 1 nor K, or a text has no token.
    """
    num_prompts, prompt_length, _ = shape
    if len(token_ids) not in (1, num_prompts):
        raise UserError(
            f"bank.init_text has {len(token_ids)} texts; allowed: 1, or one for each of {num_prompts} prompts"
        )
    rows = []
    for k in range(num_prompts):
        ids = list(token_ids[k if len(token_ids) > 1 else 0])
        if not ids:
            raise UserError(f"bank.init_text: text {k} has no token")
        rows.append([ids[p % len(ids)] for p in range(prompt_length)])
    prompts = jnp.take(table, jnp.asarray(rows), axis=0).astype(jnp.float32)
    check_bank_shape(prompts, shape, "the embedding table")
    return prompts


def from_file(path: str, shape: tuple[int, int, int]) -> jax.Array:
    """Reads a bank from ``.npy``, ``.npz`` or ``.safetensors`` (array ``prompts``, or the only one).

    Raises:
        UserError: The file is missing, unreadable, holds several arrays and none named ``prompts``, or another shape.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"bank.init_file: there is no file {path}")
    try:
        if file.suffix == ".safetensors":
            arrays = load_file(file)
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
        elif file.suffix == ".npy":
            arrays = {"prompts": np.load(file, allow_pickle=False)}
        else:
            raise UserError(f"bank.init_file: {path} ends with {file.suffix!r}; allowed: .npy, .npz, .safetensors")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"bank.init_file: {path} cannot be read ({error})") from error
    if "prompts" not in arrays and len(arrays) != 1:
        raise UserError(f"bank.init_file: {path} holds {sorted(arrays)}; allowed: one array, or one named 'prompts'")
    prompts = arrays["prompts"] if "prompts" in arrays else next(iter(arrays.values()))
    check_bank_shape(prompts, shape, path)
    return jnp.asarray(prompts, jnp.float32)
