"""The frozen LM behind every soft prompt of the bank, on packed rows (METHOD, "Dialogue packing")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_head, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.prompting.bank import from_normal, from_vocabulary
from spt_jax.prompting.losses import chunk_size, target_losses
from spt_jax.prompting.retriever import Retriever, context_means

Trainable = dict[str, Any]
"""``{"bank": {"prompts": [K, P, M]}, "retriever": {"lin": {"kernel": [M, M], "bias": [M]}}}``, all float32."""

ArrayBatch = Mapping[str, jax.Array]
"""A packed batch; see `spt_jax.data.loader` for the fields and shapes."""


@dataclasses.dataclass(frozen=True)
class SelectiveLM:
    """The static description of a bank and a retriever before a frozen LM; hashable, so a static argument of jit.

    Attributes:
        decoder: The frozen LM.
        num_prompts: K.
        prompt_length: P.
        share: Whether the retriever's two sides share their linear layer.
        activation: The score's activation (`spt_jax.prompting.retriever.SCORE_ACTIVATIONS`).
        max_logit_rows: How many rows of V logits may exist at once; bounds memory, changes no result.
        row_sharding: How the first axis of activations is laid out; None leaves it to the compiler, which would follow
            the embedding table where that is sharded along M, and give every device all rows.
    """

    decoder: DecoderConfig
    num_prompts: int
    prompt_length: int
    share: bool = True
    activation: str = "softplus"
    max_logit_rows: int = 512
    row_sharding: jax.sharding.NamedSharding | None = None

    @property
    def bank_shape(self) -> tuple[int, int, int]:
        """``(K, P, M)``."""
        return self.num_prompts, self.prompt_length, self.decoder.hidden_size

    @property
    def retriever(self) -> Retriever:
        """The retriever module."""
        return Retriever(self.decoder.hidden_size, self.share, self.activation)

    def init_retriever(self, key: jax.Array) -> dict[str, Any]:
        """Fresh retriever parameters."""
        means = jnp.zeros((1, self.decoder.hidden_size))
        return self.retriever.init(key, means, jnp.zeros(self.bank_shape))["params"]  # pyright: ignore[reportReturnType]

    def init(self, key: jax.Array, params: FrozenTree | None = None, stddev: float = 1.0) -> Trainable:
        """A fresh trainable tree: the bank from random vocabulary embeddings of `params`, or normal when None.

        Args:
            key: A random key.
            params: The frozen tree.
            stddev: Standard deviation of the normal bank.
        """
        bank_key, retriever_key = jax.random.split(key)
        if params is None:
            prompts = from_normal(bank_key, self.bank_shape, stddev)
        else:
            table = embed(self.decoder, params, jnp.arange(self.decoder.vocab_size))
            prompts = from_vocabulary(bank_key, table, self.bank_shape)
        return {"bank": {"prompts": prompts}, "retriever": self.init_retriever(retriever_key)}


class TurnScores(NamedTuple):
    """What the LM and the retriever say of every turn.

    Attributes:
        nll: float32 ``[D, N, K]``, mean negative log likelihood of the turn's response under each prompt, nats a
            token, end of sequence included; 0 where there is no turn.
        scores: float32 ``[D, N, K]``, the retriever's.
        tokens: float32 ``[D, N]``, target tokens of each turn.
    """

    nll: jax.Array
    scores: jax.Array
    tokens: jax.Array


def join(prompts: jax.Array, text: jax.Array) -> jax.Array:
    """Puts every prompt before every row: ``[K, P, M]`` and ``[D, T, M]`` to ``[D·K, P+T, M]``, K innermost.

    K is innermost so that one dialogue's prompts stay on one device. The bank is cast to the text's type here.
    """
    rows = repeat(text, "d t m -> (d k) t m", k=prompts.shape[0])
    # Cast after repeating, so that the gradient is summed over dialogues in the bank's own type.
    fronts = repeat(prompts, "k p m -> (d k) p m", d=text.shape[0]).astype(text.dtype)
    return jnp.concatenate([fronts, rows], axis=1)


def _on_its_devices(model: SelectiveLM, rows: jax.Array) -> jax.Array:
    return rows if model.row_sharding is None else jax.lax.with_sharding_constraint(rows, model.row_sharding)


def embed_rows(model: SelectiveLM, params: FrozenTree, batch: ArrayBatch) -> jax.Array:
    """The embeddings ``[D, T, M]`` of the batch's rows, each on the devices that own the row."""
    return _on_its_devices(model, embed(model.decoder, params, batch["tokens"]))


def target_hidden(model: SelectiveLM, params: FrozenTree, prompts: jax.Array, batch: ArrayBatch) -> jax.Array:
    """Hidden states at every target position, under every prompt.

    Args:
        model: The description.
        params: The frozen tree.
        prompts: The bank ``[K, P, M]``; K and P are read from it, so a bank ``[1, 0, M]`` is the LM without prompts.
        batch: Uses ``tokens`` ``[D, T]``, ``lengths`` ``[D]`` and ``target_positions`` ``[D, S]``.

    Returns:
        ``[D, S, K, M]``.
    """
    num_prompts, prompt_length, _ = prompts.shape
    embeddings = _on_its_devices(model, join(prompts, embed_rows(model, params, batch)))
    rows, length, _ = embeddings.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    row_lengths = repeat(batch["lengths"], "d -> (d k)", k=num_prompts) + prompt_length
    hidden, _ = decode(model.decoder, params, embeddings, positions, positions < row_lengths[:, None])
    at = repeat(batch["target_positions"], "d s -> (d k) s 1", k=num_prompts) + prompt_length
    return rearrange(jnp.take_along_axis(hidden, at, axis=1), "(d k) s m -> d s k m", k=num_prompts)


def target_turn_onehot(batch: ArrayBatch) -> jax.Array:
    """Which turn each target position belongs to: float32 ``[D, S, N]``, zero rows on padding."""
    slots = batch["context_lengths"].shape[1]
    return jax.nn.one_hot(batch["target_turns"], slots) * batch["target_mask"][..., None]


def turn_means(values: jax.Array, onehot: jax.Array) -> jax.Array:
    """Means over each turn's targets: ``[D, S, K]`` and ``[D, S, N]`` to ``[D, N, K]``; 0 where there are none."""
    sums = jnp.einsum("dsk,dsn->dnk", values, onehot, precision=jax.lax.Precision.HIGHEST)
    return sums / jnp.maximum(onehot.sum(axis=1), 1.0)[..., None]


def at_targets(per_turn: jax.Array, onehot: jax.Array) -> jax.Array:
    """Spreads turns to their target positions: ``[D, N, K]`` and ``[D, S, N]`` to ``[D, S, K]``; 0 on padding."""
    return jnp.einsum("dnk,dsn->dsk", per_turn, onehot, precision=jax.lax.Precision.HIGHEST)


def batch_context_means(model: SelectiveLM, params: FrozenTree, batch: ArrayBatch) -> jax.Array:
    """Mean embeddings of every turn's context, float32 ``[D, N, M]``; see `context_means`."""
    return context_means(embed_rows(model, params, batch), batch["context_lengths"])


def retriever_scores(model: SelectiveLM, trainable: Trainable, means: jax.Array) -> jax.Array:
    """Scores of contexts ``[..., M]`` against the bank: float32 ``[..., K]``."""
    return model.retriever.apply({"params": trainable["retriever"]}, means, trainable["bank"]["prompts"])  # pyright: ignore[reportReturnType]


def logits_chunk(model: SelectiveLM, rows: int, num_prompts: int, positions: int) -> int:
    """Target positions projected at once for a batch of `rows`; see `spt_jax.prompting.losses.chunk_size`."""
    return chunk_size(rows, num_prompts, positions, model.max_logit_rows)


def score_turns(model: SelectiveLM, params: FrozenTree, trainable: Trainable, batch: ArrayBatch) -> TurnScores:
    """Every turn's likelihood under every prompt and the retriever's scores, forward only.

    Args:
        model: The description.
        params: The frozen tree.
        trainable: The bank and the retriever.
        batch: A packed batch.

    Returns:
        See `TurnScores`.
    """
    prompts = trainable["bank"]["prompts"]
    hidden = target_hidden(model, params, prompts, batch)
    onehot = target_turn_onehot(batch)
    scores = retriever_scores(model, trainable, batch_context_means(model, params, batch))
    rows, positions, num_prompts, _ = hidden.shape
    losses = target_losses(
        lambda head, h: vocabulary_logits(model.decoder, head, h),
        vocabulary_head(params),
        hidden,
        at_targets(scores, onehot),
        batch["target_ids"],
        logits_chunk(model, rows, num_prompts, positions),
    )
    return TurnScores(turn_means(losses.nll, onehot), scores, onehot.sum(axis=1))
