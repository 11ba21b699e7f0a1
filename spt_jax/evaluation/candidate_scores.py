"""Likelihood of every candidate of a turn, the dialogue before it read once.

A row is read behind each prompt that one of its turns selects, and its keys and values are kept. All candidates of a
turn then stand side by side in one row, each at the positions it would have behind the context alone; they see the kept
keys and values up to the end of the context, and each sees itself. So a candidate costs its own tokens, not those of
its context, and equals a row of its own to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spt_jax.data.buckets import MULTIPLE, best_bounds, choose_buckets
from spt_jax.data.packing import Row
from spt_jax.evaluation.candidates import RankedTurn, check_room
from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, vocabulary_head, vocabulary_logits
from spt_jax.parallel.rules import place_whole_batch, replicated, row_devices
from spt_jax.prompting.adapters import Conditions
from spt_jax.prompting.losses import target_losses
from spt_jax.prompting.prefixes import prefix_cache
from spt_jax.prompting.selective_lm import SelectiveLM, embed_rows, logit_chunks

_ROWS_A_TURN = 4
"""One turn is scored at once for so many rows that are read at once: each takes a copy of its row's keys and values,
and few at once fill the last batch of some rows' turns better."""


@dataclasses.dataclass(frozen=True)
class CandidateScores:
    """Of one turn's N candidates.

    Attributes:
        nll: float64 ``[N]``, total negative log likelihood in nats, the end of sequence included.
        tokens: int64 ``[N]``, target tokens, the end of sequence included.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def mean_nll(self) -> np.ndarray:
        """float64 ``[N]``, nats a token."""
        return self.nll / self.tokens


class _Read(NamedTuple):
    """D rows as they were read, each behind one prompt: ``[L, D, P+T, G, head_dim]`` and ``[D, T, M]``."""

    key: jax.Array
    value: jax.Array
    hidden: jax.Array


def score_candidates(
    model: SelectiveLM,
    conditions: Conditions,
    rows: Sequence[Row],
    turns: Sequence[RankedTurn],
    selected: Sequence[int],
    *,
    mesh: Mesh,
    batch_size: int,
    pad_id: int,
    max_buckets: int = 4,
    on_turns: Callable[[int], None] | None = None,
) -> list[CandidateScores]:
    """Scores every candidate of every turn behind the turn's selected prompt; batches and padding change nothing.

    Args:
        model: The description.
        conditions: The LM under what was learned (`spt_jax.prompting.selective_lm.inference_conditions`).
        rows: Packed rows that hold the turns' contexts.
        turns: The turns.
        selected: The prompt of each turn.
        mesh: The mesh of the LM.
        batch_size: Rows read at once, rounded up to a multiple of the devices that share rows.
        pad_id: Fills rows.
        max_buckets: Lengths of rows, and of rows of candidates; each pair of them is a compilation.
        on_turns: Called with the number of turns done after each batch.

    Returns:
        One entry a turn, in the order of `turns`.

    Raises:
        UserError: A candidate does not fit into the LM's context.
    """
    front = conditions.bank.shape[1] if conditions.prefixes is None else conditions.bank.shape[3]
    check_room(turns, front, model.decoder.longest_row)
    if not turns:
        return []
    devices = row_devices(mesh)
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (turn, prompt) in enumerate(zip(turns, selected, strict=True)):
        groups.setdefault((turn.row, int(prompt)), []).append(number)
    read = list(groups)
    at_once = _multiple(min(batch_size, len(read)), devices)
    turns_at_once = _multiple(-(-min(batch_size, len(turns)) // _ROWS_A_TURN), devices)
    buckets = choose_buckets([rows[row] for row, _ in read], at_once, max_buckets)
    widths = best_bounds(np.asarray([_multiple(max(1, turn.tokens), MULTIPLE) for turn in turns]), max_buckets)[-1]
    places = max(len(turn.ids) for turn in turns)
    found: list[CandidateScores | None] = [None] * len(turns)
    for bucket, members in buckets.deal(at_once, None):
        batch = _rows_batch([(rows[read[i][0]], read[i][1]) for i in members if i >= 0], at_once, pad_id)
        length = buckets.shapes[bucket].length
        batch["tokens"] = np.pad(
            batch["tokens"], [(0, 0), (0, length - batch["tokens"].shape[1])], constant_values=pad_id
        )
        cached = _read_jitted(model, conditions, place_whole_batch(mesh, batch))
        numbers = [(number, place) for place, i in enumerate(members) if i >= 0 for number in groups[read[i]]]
        for block, width in _blocks(turns, numbers, turns_at_once, widths):
            candidates = _turns_batch([(turns[n], place) for n, place in block], turns_at_once, width, places, pad_id)
            nll = jax.device_get(_scorer(mesh)(model, conditions, cached, place_whole_batch(mesh, candidates)))
            for place, (number, _) in enumerate(block):
                lengths = np.asarray([len(ids) + 1 for ids in turns[number].ids], np.int64)
                found[number] = CandidateScores(nll[place, : len(lengths)].astype(np.float64), lengths)
            if on_turns is not None:
                on_turns(len(block))
    return [scores for scores in found if scores is not None]


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _blocks(
    turns: Sequence[RankedTurn], numbers: Sequence[tuple[int, int]], size: int, widths: Sequence[int]
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Turns of a batch of rows, those with as many tokens together, and the shortest width that holds them."""
    ordered = sorted(numbers, key=lambda pair: (turns[pair[0]].tokens, pair))
    for start in range(0, len(ordered), size):
        block = ordered[start : start + size]
        most = max(turns[number].tokens for number, _ in block)
        yield block, next(width for width in widths if width >= most)


def _rows_batch(chosen: Sequence[tuple[Row, int]], size: int, pad_id: int) -> dict[str, np.ndarray]:
    """``tokens`` ``[D, T]``, ``lengths`` ``[D]`` and ``prompts`` ``[D]``; rows of length 0 fill the batch."""
    tokens = np.full((size, max(len(row) for row, _ in chosen)), pad_id, np.int32)
    lengths, prompts = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for place, (row, prompt) in enumerate(chosen):
        tokens[place, : len(row)] = row.tokens
        lengths[place], prompts[place] = len(row), prompt
    return {"tokens": tokens, "lengths": lengths, "prompts": prompts}


def _turns_batch(
    chosen: Sequence[tuple[RankedTurn, int]], size: int, width: int, places: int, pad_id: int
) -> dict[str, np.ndarray]:
    """B turns with their candidates side by side, Q tokens.

    Fields: ``rows`` ``[B]``, the place of the context's row; ``context_lengths`` ``[B]``; for every token ``tokens``,
    ``targets``, ``candidates`` (whose it is; -1 on padding) and ``offsets`` (its number in its candidate), ``[B, Q]``;
    ``first`` ``[B, N]``, what each candidate begins with, -1 where there is none.
    """
    fields = {name: np.zeros((size, width), np.int32) for name in ("targets", "offsets")}
    fields["tokens"], fields["candidates"] = np.full((size, width), pad_id, np.int32), np.full((size, width), -1)
    rows, lengths, first = np.zeros(size, np.int32), np.ones(size, np.int32), np.full((size, places), -1, np.int32)
    for b, (turn, row) in enumerate(chosen):
        rows[b], lengths[b] = row, turn.context_length
        start = 0
        for number, ids in enumerate(turn.ids):
            span, following = slice(start, start + len(ids)), (*ids, turn.end_id)
            fields["tokens"][b, span], fields["targets"][b, span] = ids, following[1:]
            fields["candidates"][b, span], fields["offsets"][b, span] = number, np.arange(len(ids))
            first[b, number] = following[0]
            start += len(ids)
    return {name: array.astype(np.int32) for name, array in fields.items()} | {
        "rows": rows,
        "context_lengths": lengths,
        "first": first,
    }


@cache
def _scorer(mesh: Mesh) -> Any:
    return jax.jit(_score, static_argnums=0, out_shardings=replicated(mesh))


def _read(model: SelectiveLM, conditions: Conditions, batch: dict[str, jax.Array]) -> _Read:
    """Reads each row behind its prompt."""
    text = embed_rows(model, conditions.params, batch["tokens"])
    count, length, _ = text.shape
    chosen = jnp.take(conditions.bank, batch["prompts"], axis=0)
    if conditions.prefixes is None:
        front, first = chosen.shape[1], 0
        embeddings = jnp.concatenate([chosen.astype(text.dtype), text], axis=1)
        cache = KVCache.empty(model.decoder, count, front + length)
    else:
        front = first = chosen.shape[3]
        embeddings, cache = text, prefix_cache(model.decoder, chosen, front + length)
    positions = jnp.broadcast_to(jnp.arange(first, front + length), (count, front + length - first))
    valid = positions < front + batch["lengths"][:, None]
    hidden, cache = decode(model.decoder, conditions.params, embeddings, positions, valid, cache)
    assert cache is not None
    return _Read(cache.key, cache.value, hidden[:, front - first :])


_read_jitted = jax.jit(_read, static_argnums=0)


def _score(model: SelectiveLM, conditions: Conditions, read: _Read, batch: dict[str, jax.Array]) -> jax.Array:
    """Total nll of every candidate, float32 ``[B, N]``; 0 where there is none."""
    decoder, params = model.decoder, conditions.params
    rows, lengths, whose = batch["rows"], batch["context_lengths"], batch["candidates"]
    count, width = whose.shape
    slots = read.key.shape[2]
    front = slots - read.hidden.shape[1]
    room = [(0, 0), (0, 0), (0, width), (0, 0), (0, 0)]
    places = jnp.broadcast_to(jnp.arange(slots + width, dtype=jnp.int32), (count, slots + width))
    cache = KVCache(
        key=jnp.pad(jnp.take(read.key, rows, axis=1), room),
        value=jnp.pad(jnp.take(read.value, rows, axis=1), room),
        positions=places,
        valid=places < front + lengths[:, None],
        length=jnp.asarray(slots, jnp.int32),
    )
    positions = front + lengths[:, None] + batch["offsets"]
    own = whose[:, :, None] == whose[:, None, :]
    visible = jnp.concatenate([jnp.ones((count, width, slots), bool), own], axis=2)
    embeddings, present = embed_rows(model, params, batch["tokens"]), whose >= 0
    hidden, _ = decode(decoder, params, embeddings, positions, present, cache, visible=visible)
    head = vocabulary_head(params)
    chunks = logit_chunks(model, count, 1, width)
    project = partial(vocabulary_logits, decoder)
    losses = target_losses(project, head, hidden[:, :, None], None, batch["targets"], present, chunks)
    # What a candidate begins with is said by the context's last token.
    last = read.hidden[rows, lengths - 1]
    beginnings = jax.nn.log_softmax(project(head, last))
    exists = batch["first"] >= 0
    begun = -jnp.take_along_axis(beginnings, jnp.maximum(batch["first"], 0), axis=1)
    of_candidate = jax.nn.one_hot(whose, batch["first"].shape[1])
    rest = jnp.einsum("bq,bqn->bn", losses.nll[..., 0], of_candidate, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(exists, begun + rest, 0.0)
