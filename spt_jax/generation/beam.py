"""Beam search as one jitted loop, with the semantics of transformers' ``generate(num_beams=N)``.

Beams are strands of a row: they share its context, and stay where they are while a table says who descends from whom.
Every row ends by itself, as it does alone; a batch ends with its last row.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.generation.decode import ends
from spt_jax.generation.sampling import Rule
from spt_jax.models.continuation import Context, Continuation, extend
from spt_jax.models.decoder import FrozenTree, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.parallel.distributed import on_host

# What stands for "impossible" in sums and comparisons; transformers' number, so that ties fall as they do there.
_NEVER = -1e9
_CHUNK = 128


class Search(NamedTuple):
    """How a search is made; hashable, a static argument.

    Attributes:
        beams: N.
        room: R, tokens at most.
        length_penalty: A hypothesis' score is its log-probability / length ** length_penalty.
        early_stopping: ``"true"``, ``"false"`` or ``"never"``, see `spt_jax.generation.decoding.Decoding`.
    """

    beams: int
    room: int
    length_penalty: float = 1.0
    early_stopping: str = "false"

    @property
    def divisors(self) -> np.ndarray:
        """``length ** length_penalty`` for lengths 0 … R; float32."""
        with np.errstate(divide="ignore"):
            return (np.arange(self.room + 1, dtype=np.float64) ** self.length_penalty).astype(np.float32)


@flax.struct.dataclass
class Hypotheses:
    """The best N finished sequences of each row, best first.

    Attributes:
        tokens: int32 ``[B, N, R]``.
        lengths: int32 ``[B, N]``, end-of-sequence counted.
        scores: float32 ``[B, N]``.
        finished: bool ``[B, N]``, False where fewer were found.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finished: jax.Array

    def joined(self, others: Hypotheses) -> Hypotheses:
        """The best N of both."""
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, others)
        _, best = jax.lax.top_k(both.scores, self.scores.shape[1])
        return jax.tree.map(lambda leaf: _picked(leaf, best), both)


@flax.struct.dataclass
class BeamState:
    """A search between two steps.

    Attributes:
        past: Keys and values of what was generated before the last tokens.
        tokens: int32 ``[B, N, R]`` of the running beams.
        scores: float32 ``[B, N]``, their log-probabilities, best first.
        finished: Hypotheses that ended.
        improvable: bool ``[B]``, whether a running beam might still better the finished ones.
        running: bool ``[B]``, whether the search of a row goes on.
        step: int32 scalar, tokens of the running beams.
    """

    past: Continuation
    tokens: jax.Array
    scores: jax.Array
    finished: Hypotheses
    improvable: jax.Array
    running: jax.Array
    step: jax.Array


@flax.struct.dataclass
class Proposal:
    """The best C continuations of each row's beams by one token, best first.

    Attributes:
        sequences: int32 ``[B, C, R]``, the new token in column `BeamState.step`.
        tokens: int32 ``[B, C]``, that token.
        parents: int32 ``[B, C]``, the beam that each continues.
        scores: float32 ``[B, C]``, log-probabilities.
    """

    sequences: jax.Array
    tokens: jax.Array
    parents: jax.Array
    scores: jax.Array


Found = tuple[jax.Array, jax.Array, jax.Array]
"""Tokens int32 ``[B, N, R]``, best first; how many of them count, int32 ``[B, N]``, end-of-sequence left out; and
scores float32 ``[B, N]``."""


@functools.partial(jax.jit, static_argnames=("config", "rule", "search"))
def beam_search(
    config: DecoderConfig,
    params: FrozenTree,
    context: Context,
    logits: jax.Array,
    real: jax.Array,
    eos_ids: jax.Array,
    *,
    rule: Rule,
    search: Search,
) -> Found:
    """The best N continuations of every row.

    Args:
        config: The decoder.
        params: The frozen tree.
        context: Of `spt_jax.generation.decode.prefill`.
        logits: ``[B, V]`` behind it.
        real: bool ``[B]``, False for rows that are padding of the batch.
        eos_ids: int32 ``[E]``, the tokens that end a hypothesis.
        rule: Its processors change the log-probabilities, which are not normalised again, as in transformers.
        search: How.
    """

    def settled(state: BeamState, proposal: Proposal) -> BeamState:
        return _settled(state, proposal, ends(proposal.tokens, eos_ids), search)

    def advance(state: BeamState) -> BeamState:
        return settled(*_extended(config, params, context, state, eos_ids, rule))

    state = settled(*_begun(config, logits, real, eos_ids, rule, search, context.apart))
    return _found(jax.lax.while_loop(lambda state: state.running.any(), advance, state), eos_ids)


def watched_beam_search(
    config: DecoderConfig,
    params: FrozenTree,
    context: Context,
    logits: jax.Array,
    real: jax.Array | np.ndarray,
    eos_ids: jax.Array | np.ndarray,
    stopped: Callable[[Sequence[int]], bool],
    *,
    rule: Rule,
    search: Search,
) -> Found:
    """As `beam_search`, where a hypothesis also ends with the first token that makes `stopped` true of its tokens.

    The host looks at every proposal, so each token takes a round trip that `beam_search` does without.
    """
    state, proposal = _begun_jitted(config, logits, real, eos_ids, rule, search, context.apart)
    running = np.asarray(real)
    for length in itertools.count(1):
        sequences, tokens = on_host((proposal.sequences, proposal.tokens))
        over = (tokens[..., None] == np.asarray(eos_ids)).any(axis=-1)
        for row, place in np.argwhere(running[:, None] & ~over):
            over[row, place] = stopped(sequences[row, place, :length].tolist())
        state = _settled_jitted(state, proposal, over, search)
        running = on_host(state.running)
        if not running.any():
            break
        state, proposal = _extended_jitted(config, params, context, state, eos_ids, rule)
    return _found_jitted(state, eos_ids)


def _begun(
    config: DecoderConfig,
    logits: jax.Array,
    real: jax.Array,
    eos_ids: jax.Array,
    rule: Rule,
    search: Search,
    apart: bool,
) -> tuple[BeamState, Proposal]:
    """Before the first token, with the proposals for it from logits ``[B, V]``."""
    rows, n, room = len(logits), search.beams, search.room
    zeros = functools.partial(jnp.zeros, (rows, n))
    nothing = Hypotheses(
        jnp.zeros((rows, n, room), jnp.int32), zeros(jnp.int32), jnp.full((rows, n), _NEVER), zeros(bool)
    )
    first = BeamState(
        past=Continuation.empty(config, rows, n, room, apart=apart),
        tokens=nothing.tokens,
        # All beams are the same still: only the first may go on.
        scores=jnp.broadcast_to(jnp.where(jnp.arange(n) == 0, 0.0, _NEVER), (rows, n)),
        finished=nothing,
        improvable=jnp.ones(rows, bool),
        running=real,
        step=jnp.int32(0),
    )
    return first, _proposed(first, jnp.repeat(logits, n, axis=0), eos_ids, rule)


def _extended(
    config: DecoderConfig, params: FrozenTree, context: Context, state: BeamState, eos_ids: jax.Array, rule: Rule
) -> tuple[BeamState, Proposal]:
    """The running beams with the keys and values of their last tokens, and the proposals for the next."""
    rows, n, _ = state.tokens.shape
    last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
    hidden, past = extend(config, params, embed(config, params, last), context, state.past)
    following = vocabulary_logits(config, params, hidden.reshape(rows * n, -1))
    return state.replace(past=past), _proposed(state, following, eos_ids, rule)  # pyright: ignore[reportAttributeAccessIssue]


def _proposed(state: BeamState, logits: jax.Array, eos_ids: jax.Array, rule: Rule) -> Proposal:
    """The continuations by one more token, from logits ``[B · N, V]``."""
    rows, n, room = state.tokens.shape
    log_p = jax.nn.log_softmax(rule.within(logits))
    log_p = rule.processed(log_p, state.tokens.reshape(-1, room), state.step).reshape(rows, n, -1)
    # Enough that n of them do not end, though every beam may end with each of the eos tokens.
    scores, parents, tokens = _best(log_p + state.scores[..., None], n * max(2, 1 + len(eos_ids)))
    sequences = _picked(state.tokens, parents)
    sequences = jax.lax.dynamic_update_slice(sequences, tokens[..., None], (0, 0, state.step))
    return Proposal(sequences, tokens, parents, scores)


def _settled(state: BeamState, proposal: Proposal, ended: jax.Array, search: Search) -> BeamState:
    """One more token in every beam; `ended`, bool ``[B, C]``, says which proposals are whole hypotheses."""
    n, room, step = search.beams, search.room, state.step
    scores = proposal.scores
    over = ended | (step + 1 == room)

    going, kept = jax.lax.top_k(jnp.where(over, scores + _NEVER, scores), n)
    divisors = jnp.asarray(search.divisors)
    whole = over & (jnp.arange(scores.shape[1]) < n)
    # What may not join gets the impossible score once for each reason, as in transformers.
    against = (~whole).astype(jnp.float32) + ~state.improvable[:, None]
    candidates = Hypotheses(
        proposal.sequences,
        jnp.full(proposal.tokens.shape, step + 1),
        scores / divisors[step + 1] + _NEVER * against,
        whole,
    )
    finished = state.finished.joined(candidates)

    hypothetical = room if search.early_stopping == "never" and search.length_penalty > 0 else step + 1
    possible = going[:, :1] / divisors[hypothetical]
    worst = jnp.where(finished.finished, finished.scores.min(axis=1, keepdims=True), _NEVER)
    improvable = state.improvable & (possible > worst).any(axis=1)
    stopped = finished.finished.all(axis=1) & (search.early_stopping == "true")
    after = BeamState(
        past=state.past.descended(_picked(proposal.parents, kept)),
        tokens=_picked(proposal.sequences, kept),
        scores=going,
        finished=finished,
        improvable=improvable,
        running=state.running & improvable & ~stopped & ~over.all(axis=1),
        step=step + 1,
    )
    # A row whose search is over keeps what it found, whatever the others do.
    frozen = jax.tree.map(
        lambda new, old: jnp.where(state.running.reshape(-1, *[1] * (new.ndim - 1)), new, old), finished, state.finished
    )
    return after.replace(finished=frozen)  # pyright: ignore[reportAttributeAccessIssue]


def _found(state: BeamState, eos_ids: jax.Array) -> Found:
    found = state.finished
    last = jnp.take_along_axis(found.tokens, jnp.maximum(found.lengths - 1, 0)[..., None], axis=2)[..., 0]
    return found.tokens, found.lengths - (ends(last, eos_ids) & (found.lengths > 0)), found.scores


_begun_jitted = jax.jit(_begun, static_argnames=("config", "rule", "search", "apart"))
_extended_jitted = jax.jit(_extended, static_argnames=("config", "rule"), donate_argnames="state")
_settled_jitted = jax.jit(_settled, static_argnames="search", donate_argnames="state")
_found_jitted = jax.jit(_found)


def _picked(leaf: jax.Array, places: jax.Array) -> jax.Array:
    """``leaf[b, places[b, i]]``: ``[B, N, ...]`` and int ``[B, I]`` to ``[B, I, ...]``."""
    return jnp.take_along_axis(leaf, places.reshape(*places.shape, *[1] * (leaf.ndim - 2)), axis=1)


def _best(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` largest of each row of ``[B, N, V]``, with their places in N and in V; each ``[B, count]``.

    They lie in the `count` chunks with the largest maxima, so that little is sorted.
    """
    rows, n, vocabulary = scores.shape
    chunks = -(-vocabulary // _CHUNK)
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, chunks * _CHUNK - vocabulary)), constant_values=-jnp.inf)
    padded = padded.reshape(rows, n * chunks, _CHUNK)
    _, chosen = jax.lax.top_k(padded.max(axis=-1), min(count, n * chunks))
    values, within = jax.lax.top_k(_picked(padded, chosen).reshape(rows, -1), count)
    chunk = jnp.take_along_axis(chosen, within // _CHUNK, axis=1)
    return values, chunk // chunks, (chunk % chunks * _CHUNK + within % _CHUNK).astype(jnp.int32)
