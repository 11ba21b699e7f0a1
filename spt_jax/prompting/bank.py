"""The bank of soft prompts ``[K, P, M]`` and the ways to start one.

Each initialiser is a function that returns float32 prompts and checks what it was given, naming both shapes where they
differ. The bank stays float32 whatever the LM's type; it is cast where it joins the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from spt_jax.errors import UserError
from spt_jax.numpy_files import npz_names, read_npy, read_npz
from spt_jax.user_paths import expanded


def check_bank_shape(prompts: np.ndarray | jax.Array, shape: tuple[int, int, int], origin: str) -> None:
    """Raises UserError unless `prompts` has the shape ``(K, P, M)`` and is finite; `origin` names the place."""
    if tuple(prompts.shape) != shape:
        raise UserError(
            f"{origin} holds prompts of shape {tuple(prompts.shape)}, but the bank needs (K, P, M) = {shape}"
        )
    if not bool(jnp.isfinite(jnp.asarray(prompts)).all()):
        raise UserError(f"{origin} holds values that are not finite")


_MOST_BANKS = 16
"""The array of a packed file may unfold to so many banks of 8 bytes a number."""

Embedder = Callable[[Any], jax.Array]
"""From token ids ``[...]`` to what `embed` gives for them, ``[..., M]``."""


def from_vocabulary(key: jax.Array, vocab_size: int, embedder: Embedder, shape: tuple[int, int, int]) -> jax.Array:
    """Each virtual token starts as the embedding of a random vocabulary token, no token drawn twice while they last.

    Args:
        key: A random key.
        vocab_size: How many leading tokens are drawn from; those that the tokenizer can spell.
        embedder: See `Embedder`.
        shape: ``(K, P, M)``.

    Returns:
        float32 ``[K, P, M]``.
    """
    num_prompts, prompt_length, _ = shape
    count = num_prompts * prompt_length
    ids = jax.random.choice(key, vocab_size, (count,), replace=count > vocab_size)
    prompts = embedder(ids.reshape(num_prompts, prompt_length)).astype(jnp.float32)
    check_bank_shape(prompts, shape, "the embedding table")
    return prompts


def from_normal(key: jax.Array, shape: tuple[int, int, int], stddev: float = 1.0) -> jax.Array:
    """Independent normal values; standard deviation 1 is the authors' program."""
    return stddev * jax.random.normal(key, shape, jnp.float32)


def from_token_ids(token_ids: Sequence[Sequence[int]], embedder: Embedder, shape: tuple[int, int, int]) -> jax.Array:
    """Each prompt starts as the embeddings of a text, cut to P tokens or repeated until P are filled.

    Args:
        token_ids: K lists of token ids, one text a prompt; a single list serves every prompt.
        embedder: See `Embedder`.
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
    prompts = embedder(jnp.asarray(rows)).astype(jnp.float32)
    check_bank_shape(prompts, shape, "the embedding table")
    return prompts


def from_clusters(
    key: jax.Array, personas: Sequence[Sequence[int]], embedder: Embedder, shape: tuple[int, int, int]
) -> jax.Array:
    """Each prompt starts from a cluster of personas: K-means (k-means++ start) over their mean embeddings.

    Virtual token p of a prompt is the mean embedding of a p-th part of its cluster's personas, those nearest to the
    centre first; so prompts begin apart from one another, where the contexts they will serve are.

    Args:
        key: A random key.
        personas: Token ids of n distinct personas.
        embedder: See `Embedder`.
        shape: ``(K, P, M)``.

    Returns:
        float32 ``[K, P, M]``.

    Raises:
        UserError: There are fewer personas than prompts.
    """
    from scipy.cluster.vq import ClusterError, kmeans2  # half a second that no other start of a bank needs

    num_prompts, prompt_length, _ = shape
    found = [np.asarray(embedder(np.asarray(ids)), np.float32).mean(axis=0) for ids in personas if len(ids)]
    if len(found) < num_prompts:
        raise UserError(
            f"bank.init is 'clusters', but the training dialogues have {len(found)} personas for {num_prompts} prompts"
        )
    means = np.stack(found)
    seed = int(jax.random.bits(key, dtype=jnp.uint32))
    try:
        centres, labels = kmeans2(means.astype(np.float64), num_prompts, iter=50, minit="++", rng=seed, missing="raise")
    except ClusterError as error:
        raise UserError(
            f"bank.init is 'clusters', but the {len(means)} personas fall into fewer than {num_prompts} clusters; use "
            "fewer prompts, another seed or bank.init = vocabulary"
        ) from error
    prompts = np.empty(shape, np.float32)
    for k in range(num_prompts):
        members = means[labels == k]
        members = members[np.argsort(np.linalg.norm(members - centres[k], axis=1), kind="stable")]
        for p in range(prompt_length):
            part = members[p::prompt_length]
            prompts[k, p] = (part if len(part) else members[p % len(members)][None]).mean(axis=0)
    return jnp.asarray(prompts)


def from_file(path: str, shape: tuple[int, int, int]) -> jax.Array:
    """Reads a bank from ``.npy``, ``.npz`` or ``.safetensors`` (array ``prompts``, or the only one).

    Raises:
        UserError: The file is missing, unreadable, holds several arrays and none named ``prompts``, no numbers, or
            another shape.
    """
    file = expanded(path, "bank.init_file")
    if not file.is_file():
        raise UserError(f"bank.init_file: there is no file {path}")
    try:
        if file.suffix == ".safetensors":
            arrays = load_file(file)
        elif file.suffix == ".npz":
            content = file.read_bytes()
            names = npz_names(content)
            wanted = ["prompts"] if "prompts" in names else names[:1]
            found = read_npz(content, wanted, max(len(content), _MOST_BANKS * math.prod(shape) * 8))
            arrays = {name: found.get(name, np.empty(0)) for name in names}
        elif file.suffix == ".npy":
            arrays = {"prompts": read_npy(file.read_bytes())}
        else:
            raise UserError(f"bank.init_file: {path} ends with {file.suffix!r}; allowed: .npy, .npz, .safetensors")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"bank.init_file: {path} cannot be read ({error})") from error
    if "prompts" not in arrays and len(arrays) != 1:
        raise UserError(f"bank.init_file: {path} holds {sorted(arrays)}; allowed: one array, or one named 'prompts'")
    prompts = arrays["prompts"] if "prompts" in arrays else next(iter(arrays.values()))
    if not (jnp.issubdtype(prompts.dtype, jnp.floating) or jnp.issubdtype(prompts.dtype, jnp.integer)):
        raise UserError(f"bank.init_file: {path} holds {prompts.dtype}; allowed: floating point and whole numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite
        prompts = prompts.astype(np.float32)
    check_bank_shape(prompts, shape, path)
    return jnp.asarray(prompts)
