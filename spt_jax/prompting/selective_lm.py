"""The frozen LM behind every soft prompt of the bank, on packed rows (METHOD, "Dialogue packing")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_head, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.dropout import Dropout
from spt_jax.parallel.rules import parameter_sharding, row_devices
from spt_jax.prompting.adapters import Adapter, Conditions, LowRank, Nothing, Trainable, num_conditions
from spt_jax.prompting.losses import Chunks, chunk_size, target_losses
from spt_jax.prompting.prefixes import prefix_cache
from spt_jax.prompting.retriever import Contexts, Retriever, RetrieverConfig

ArrayBatch = Mapping[str, jax.Array]
"""A packed batch; see `spt_jax.data.loader` for the fields and shapes."""


@dataclasses.dataclass(frozen=True)
class SelectiveLM:
    """The static description of what is learned before a frozen LM; hashable, so a static argument of jit.

    Attributes:
        decoder: The frozen LM.
        adapter: What is learned and how it conditions the LM.
        retriever_config: What chooses among the K conditions; None where there is one alone.
        max_logit_rows: How many rows of V logits may exist at once on a device; bounds memory, changes no result.
        dropout: The LM's own dropout in training.
        row_sharding: How the first axis of activations is laid out; None leaves it to the compiler, which would follow
            the embedding table where that is sharded along M, and give every device all rows.
    """

    decoder: DecoderConfig
    adapter: Adapter
    retriever_config: RetrieverConfig | None = None
    max_logit_rows: int = 512
    dropout: float = 0.0
    row_sharding: jax.sharding.NamedSharding | None = None

    @property
    def num_prompts(self) -> int:
        """K, the conditions that the LM is seen under."""
        return num_conditions(self.adapter)

    @property
    def official(self) -> bool:
        """Whether the retriever reads what the authors' program reads, padding and batch mates included."""
        return self.retriever_config is not None and self.retriever_config.context == "official"

    @property
    def retriever(self) -> Retriever:
        """The retriever module; only where there is a `retriever_config`."""
        assert self.retriever_config is not None
        return Retriever(self.decoder.hidden_size, self.retriever_config)

    def init_retriever(self, key: jax.Array) -> Trainable:
        """``{"retriever": fresh parameters}``, or nothing where there is no retriever, or one without parameters."""
        if self.retriever_config is None:
            return {}
        contexts = Contexts.of(jnp.zeros((1, 1, self.decoder.hidden_size)), jnp.ones((1, 1), jnp.int32))
        prompts = jnp.zeros((self.num_prompts, 1, self.decoder.hidden_size))
        # Compiled, the forward pass of Flax's init is no work, and one program starts faster than thirty.
        variables: Any = jax.jit(self.retriever.init)(key, contexts, prompts)
        return {"retriever": variables["params"]} if variables else {}

    def init(self, key: jax.Array, params: FrozenTree | None = None) -> Trainable:
        """A fresh trainable tree, as the adapter and the retriever start by themselves.

        Args:
            key: A random key.
            params: The frozen tree; None where only shapes matter.
        """
        adapter_key, retriever_key = jax.random.split(key)
        return self.adapter.init(self.decoder, params, adapter_key) | self.init_retriever(retriever_key)


def without_prompt(model: SelectiveLM) -> SelectiveLM:
    """The LM alone; its trainable tree is empty."""
    return dataclasses.replace(model, adapter=Nothing(), retriever_config=None)


def inference_conditions(model: SelectiveLM, params: FrozenTree, trainable: Trainable) -> Conditions:
    """The LM under what was learned, in the form that is fastest to run: low-rank updates are merged where they can."""
    adapter = model.adapter
    if isinstance(adapter, LowRank) and model.decoder.quantization == "none":
        return adapter.merged(model.decoder, params, trainable)
    return adapter.conditions(model.decoder, params, trainable)


def mixed_prompts(bank: jax.Array, scores: jax.Array | np.ndarray, temperature: float) -> jax.Array:
    """Soft selection: for each of n contexts the bank mixed by ``softmax_k(score / τ_sim)``.

    Args:
        bank: ``[K, P, M]``.
        scores: float32 ``[n, K]``.
        temperature: τ_sim.

    Returns:
        ``[n, P, M]``.
    """
    shares = jax.nn.softmax(scores / temperature, axis=-1)
    return jnp.einsum("nk,kpm->npm", shares, bank, precision=jax.lax.Precision.HIGHEST)


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
    """Puts prompts before every row: ``[K, P, M]`` and ``[D, T, M]`` to ``[D·K, P+T, M]``, K innermost.

    K is innermost so that one dialogue's prompts stay on one device. The bank is cast to the text's type here. Prompts
    ``[D, K, P, M]`` give each row its own.
    """
    rows = repeat(text, "d t m -> (d k) t m", k=prompts.shape[-3])
    # Cast after repeating, so that the gradient is summed over dialogues in the bank's own type.
    return jnp.concatenate([_per_row(prompts, text.shape[0], 3).astype(text.dtype), rows], axis=1)


def _per_row(bank: jax.Array, rows: int, rank: int) -> jax.Array:
    """``[K, ...]`` of `rank` axes for every row, or ``[D, K, ...]``, to ``[D·K, ...]``."""
    if bank.ndim == rank:
        bank = jnp.broadcast_to(bank, (rows, *bank.shape))
    return rearrange(bank, "d k ... -> (d k) ...")


def _on_its_devices(model: SelectiveLM, rows: jax.Array) -> jax.Array:
    return rows if model.row_sharding is None else jax.lax.with_sharding_constraint(rows, model.row_sharding)


def vocabulary_gathered(model: SelectiveLM, params: FrozenTree) -> FrozenTree:
    """The frozen tree with the vocabulary's tables whole along ``fsdp``, for one step.

    Left sharded they are gathered again for every chunk of targets, and a lookup moves its rows between devices.
    """
    if model.row_sharding is None or model.row_sharding.mesh.shape["fsdp"] == 1:
        return params
    axes = {"embed_tokens": ("vocab", None), "lm_head": (None, "vocab")}
    return params | {
        name: jax.lax.with_sharding_constraint(
            params[name], parameter_sharding(model.row_sharding.mesh, names, params[name].shape)
        )
        for name, names in axes.items()
        if name in params
    }


def embed_rows(model: SelectiveLM, params: FrozenTree, tokens: jax.Array) -> jax.Array:
    """The embeddings ``[D, T, M]`` of tokens ``[D, T]``, each row on the devices that own it."""
    return _on_its_devices(model, embed(model.decoder, params, tokens))


def target_hidden(
    model: SelectiveLM,
    conditions: Conditions,
    batch: ArrayBatch,
    subset: jax.Array | None = None,
    dropout: Dropout | None = None,
    whole_rows: bool = False,
) -> jax.Array:
    """Hidden states at every target position, under every condition.

    Args:
        model: The description.
        conditions: K and P are read from them.
        batch: Uses ``tokens`` ``[D, T]``, ``lengths`` ``[D]`` and ``target_positions`` ``[D, S]``.
        subset: int ``[D, m]``, which conditions each row is seen under; None for all K.
        dropout: The LM's own.
        whole_rows: Whether the LM makes hidden states of whole rows, of which the targets' are taken; else of the
            targets alone, see `decode` on its wanted places. The same values.

    Returns:
        ``[D, S, K, M]`` (m in the place of K with a subset).
    """
    text = embed_rows(model, conditions.params, batch["tokens"])
    bank = conditions.bank if subset is None else jnp.take(conditions.bank, subset, axis=0)
    if conditions.prefixes is None:
        num_prompts, front = bank.shape[-3:-1]
        embeddings, cache, first = join(bank, text), None, 0
    else:
        num_prompts, front = bank.shape[-6], bank.shape[-3]
        cache = prefix_cache(model.decoder, _per_row(bank, text.shape[0], 6), front + text.shape[1])
        embeddings, first = repeat(text, "d t m -> (d k) t m", k=num_prompts), front
    if model.decoder.attention_kernel == "cudnn" and cache is None:
        # Its gradient wants rows of an even length. Rows behind prefixes, which fill their cache, go without it.
        embeddings = jnp.pad(embeddings, ((0, 0), (0, embeddings.shape[1] % 2), (0, 0)))
    embeddings = _on_its_devices(model, embeddings)
    rows, length, _ = embeddings.shape
    positions = jnp.broadcast_to(jnp.arange(first, first + length), (rows, length))
    valid = None
    if cache is not None:
        valid = positions < repeat(batch["lengths"], "d -> (d k) 1", k=num_prompts) + front
    at = repeat(batch["target_positions"], "d s -> (d k) s", k=num_prompts) + (front - first)
    wanted = None if whole_rows else at
    hidden, _ = decode(model.decoder, conditions.params, embeddings, positions, valid, cache, dropout, wanted=wanted)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1) if wanted is None else hidden
    return rearrange(hidden, "(d k) s m -> d s k m", k=num_prompts)


def target_turn_onehot(batch: ArrayBatch) -> jax.Array:
    """Which turn each target position belongs to: float32 ``[D, S, N]``, zero rows on padding."""
    slots = batch["context_lengths"].shape[1]
    return jax.nn.one_hot(batch["target_turns"], slots) * batch["target_mask"][..., None]


@jax.named_scope("turn_losses")
def turn_means(values: jax.Array, onehot: jax.Array) -> jax.Array:
    """Means over each turn's targets: ``[D, S, K]`` and ``[D, S, N]`` to ``[D, N, K]``; 0 where there are none."""
    sums = jnp.einsum("dsk,dsn->dnk", values, onehot, precision=jax.lax.Precision.HIGHEST)
    return sums / jnp.maximum(onehot.sum(axis=1), 1.0)[..., None]


def at_targets(per_turn: jax.Array, onehot: jax.Array) -> jax.Array:
    """Spreads turns to their target positions: ``[D, N, K]`` and ``[D, S, N]`` to ``[D, S, K]``; 0 on padding."""
    return jnp.einsum("dnk,dsn->dsk", per_turn, onehot, precision=jax.lax.Precision.HIGHEST)


@jax.named_scope("Retriever")
def batch_contexts(model: SelectiveLM, params: FrozenTree, batch: ArrayBatch) -> Contexts:
    """What the retriever reads of a batch.

    Args:
        model: The description, with a retriever.
        params: The frozen tree.
        batch: Uses ``tokens`` and ``context_lengths``; in the official mode ``retriever_tokens`` ``[D, R]`` and
            ``retriever_widths`` ``[D]``, over how many of them the authors' mean runs.
    """
    if model.official:
        embeddings = embed_rows(model, params, batch["retriever_tokens"])
        return Contexts.of(embeddings, batch["retriever_widths"][:, None])
    contexts = Contexts.of(embed_rows(model, params, batch["tokens"]), batch["context_lengths"])
    assert model.retriever_config is not None
    return contexts if model.retriever_config.kind == "transformer" else contexts._replace(embeddings=None)


def retriever_scores(
    model: SelectiveLM, trainable: Trainable, contexts: Contexts, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Scores of every turn's context against the bank: float32 ``[D, N, K]``.

    Args:
        model: The description, with a retriever.
        trainable: The trainable tree; gradients reach the bank too.
        contexts: See `batch_contexts`.
        dropout_key: In training, the key of the retriever's own dropout.
    """
    variables, prompts = _retriever_inputs(trainable)
    if dropout_key is None:
        return model.retriever.apply(variables, contexts, prompts)  # pyright: ignore[reportReturnType]
    return model.retriever.apply(variables, contexts, prompts, False, rngs={"dropout": dropout_key})  # pyright: ignore[reportReturnType]


def retriever_vectors(
    model: SelectiveLM, params: FrozenTree, trainable: Trainable, batch: ArrayBatch
) -> tuple[jax.Array, jax.Array]:
    """What the retriever compares: float32 ``[D, N, M]`` of a batch's contexts, and ``[K, M]`` of the bank."""
    variables, prompts = _retriever_inputs(trainable)
    contexts = batch_contexts(model, params, batch)
    return model.retriever.apply(variables, contexts, prompts, method="vectors")  # pyright: ignore[reportReturnType]


def _retriever_inputs(trainable: Trainable) -> tuple[dict[str, Any], jax.Array]:
    bank = trainable["bank"]
    prompts = bank["prompts"] if "prompts" in bank else bank["keys"][:, None]
    return {"params": trainable.get("retriever", {})}, prompts


def batch_scores(model: SelectiveLM, params: FrozenTree, trainable: Trainable, batch: ArrayBatch) -> jax.Array:
    """`retriever_scores` of a batch; ones ``[D, N, 1]`` where there is nothing to choose."""
    if model.retriever_config is None:
        return jnp.ones((*batch["context_lengths"].shape, 1), jnp.float32)
    return retriever_scores(model, trainable, batch_contexts(model, params, batch))


def logit_chunks(model: SelectiveLM, rows: int, num_prompts: int, positions: int) -> Chunks:
    """How a batch's target positions are projected, on the devices that own its rows."""
    devices = 1 if model.row_sharding is None else row_devices(model.row_sharding.mesh)
    groups = devices if rows % devices == 0 else 1
    return Chunks(chunk_size(rows, num_prompts, positions, model.max_logit_rows, groups), groups)


def score_turns(model: SelectiveLM, params: FrozenTree, trainable: Trainable, batch: ArrayBatch) -> TurnScores:
    """Every turn's likelihood under every condition and the retriever's scores, forward only.

    Args:
        model: The description.
        params: The frozen tree.
        trainable: What was learned.
        batch: A packed batch.

    Returns:
        See `TurnScores`.
    """
    params = vocabulary_gathered(model, params)
    conditions = model.adapter.conditions(model.decoder, params, trainable)
    # A trained LM's tables are its own, not those of the frozen tree.
    conditions = conditions._replace(params=vocabulary_gathered(model, conditions.params))
    hidden = target_hidden(model, conditions, batch)
    onehot = target_turn_onehot(batch)
    rows, positions, num_prompts, _ = hidden.shape
    losses = target_losses(
        lambda head, h: vocabulary_logits(model.decoder, head, h),
        vocabulary_head(conditions.params),
        hidden,
        None,
        batch["target_ids"],
        batch["target_mask"],
        logit_chunks(model, rows, num_prompts, positions),
    )
    scores = batch_scores(model, params, trainable, batch)
    return TurnScores(turn_means(losses.nll, onehot), scores, onehot.sum(axis=1))
