"""One jitted prefill and one jitted loop; every row of a batch stands behind a soft prompt of its own.

Positions count from the soft prompt: its tokens hold 0 … P-1, the text of row b holds P … P+lengths[b]-1, and the
j-th generated token holds P+lengths[b]+j. Slots of the cache are another thing: text is padded on the right to T, so
the j-th generated token of every row is written to slot P+T+j, and only positions decide what is visible.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

from spt_jax.generation.sampling import SamplingRule
from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.prompting.prefixes import prefix_cache

_Carry: TypeAlias = tuple["DecodeState", jax.Array, jax.Array]


@flax.struct.dataclass
class DecodeState:
    """Where a batch of B rows stands between two tokens.

    Attributes:
        cache: Keys and values of everything before `tokens`.
        tokens: int32 ``[B]``, the tokens chosen last, not yet in the cache; repeated where a row is finished.
        positions: int32 ``[B]``, the positions that `tokens` hold.
        finished: bool ``[B]``, whether a row has chosen an end-of-sequence token (that one included).
        keys: ``[B]`` random keys, one a row; the j-th token of a row is drawn with ``fold_in(key, j)``.
        step: int32 scalar, how many tokens have been chosen in every row.
    """

    cache: KVCache
    tokens: jax.Array
    positions: jax.Array
    finished: jax.Array
    keys: jax.Array
    step: jax.Array


def _chosen(rule: SamplingRule, logits: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
    return rule.choose(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step))


def _ends(tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
    return (tokens[:, None] == eos_ids[None, :]).any(axis=-1)


# config: decides the program; rule: every rule is another program; room: cache slots are array shapes.
@functools.partial(jax.jit, static_argnames=("config", "rule", "room"))
def prefill(
    config: DecoderConfig,
    params: FrozenTree,
    prompts: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    eos_ids: jax.Array,
    *,
    rule: SamplingRule,
    room: int,
) -> DecodeState:
    """Reads soft prompts and text in one pass and chooses the first token of every row.

    Args:
        config: The decoder.
        params: The frozen tree.
        prompts: ``[B, P, M]``, the soft prompt of each row; P = 0 is the LM alone. Or its prefix,
            ``[B, L, 2, P, G, head_dim]``: keys and values of every layer.
        tokens: int32 ``[B, T]``, padded on the right.
        lengths: int32 ``[B]``, real tokens in each row; a row of length 0 is padding of the batch, finished at once.
        keys: ``[B]`` random keys.
        eos_ids: int32 ``[E]``, the tokens that end a row.
        rule: Chooses tokens.
        room: How many tokens may be generated.
    """
    rows, width = tokens.shape
    text = embed(config, params, tokens)
    if prompts.ndim == 3:
        prompt_length, first = prompts.shape[1], 0
        embeddings = jnp.concatenate([prompts.astype(text.dtype), text], axis=1)
        cache = KVCache.empty(config, rows, prompt_length + width + room)
    else:
        prompt_length = first = prompts.shape[3]
        embeddings, cache = text, prefix_cache(config, prompts, prompt_length + width + room)
    slots = jnp.arange(first, prompt_length + width, dtype=jnp.int32)[None, :]
    positions = jnp.broadcast_to(slots, (rows, slots.shape[1]))
    valid = positions < prompt_length + lengths[:, None]
    hidden, cache = decode(config, params, embeddings, positions, valid, cache)
    assert cache is not None
    last = jnp.maximum(prompt_length - first + lengths - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    chosen = _chosen(rule, vocabulary_logits(config, params, hidden), keys, jnp.int32(0))
    return DecodeState(
        cache=cache,
        tokens=chosen,
        positions=prompt_length + lengths,
        finished=(lengths == 0) | _ends(chosen, eos_ids),
        keys=keys,
        step=jnp.int32(1),
    )


def advance(
    config: DecoderConfig, params: FrozenTree, state: DecodeState, eos_ids: jax.Array, *, rule: SamplingRule
) -> DecodeState:
    """Feeds the tokens chosen last and chooses the next ones."""
    embeddings = embed(config, params, state.tokens[:, None])
    valid = jnp.ones_like(state.finished)[:, None]
    hidden, cache = decode(config, params, embeddings, state.positions[:, None], valid, state.cache)
    assert cache is not None
    chosen = _chosen(rule, vocabulary_logits(config, params, hidden[:, 0]), state.keys, state.step)
    chosen = jnp.where(state.finished, state.tokens, chosen)
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=chosen,
        positions=state.positions + 1,
        finished=state.finished | _ends(chosen, eos_ids),
        step=state.step + 1,
    )


advance_jitted = jax.jit(advance, static_argnames=("config", "rule"), donate_argnames=("state",))
"""`advance` as one compiled program for token-by-token use; the state goes in and must not be used again."""


# max_new_tokens: the width of the output, an array shape; the others as in `prefill`.
@functools.partial(jax.jit, static_argnames=("config", "rule", "max_new_tokens"), donate_argnames=("state",))
def decode_loop(
    config: DecoderConfig,
    params: FrozenTree,
    state: DecodeState,
    eos_ids: jax.Array,
    *,
    rule: SamplingRule,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array, DecodeState]:
    """Generates until every row has ended or holds `max_new_tokens` tokens.

    Args:
        config: The decoder.
        params: The frozen tree.
        state: What `prefill` gave, with at least `max_new_tokens` of room; it is donated.
        eos_ids: int32 ``[E]``.
        rule: Chooses tokens.
        max_new_tokens: At least 1.

    Returns:
        Tokens int32 ``[B, max_new_tokens]``; how many of them count, int32 ``[B]``, end-of-sequence left out; the state
        after the last token, which takes over the donated buffers.
    """

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry[0].step < max_new_tokens) & ~carry[0].finished.all()

    def body(carry: _Carry) -> _Carry:
        state, output, counts = carry
        state = advance(config, params, state, eos_ids, rule=rule)
        output = jax.lax.dynamic_update_slice(output, state.tokens[:, None], (0, state.step - 1))
        return state, output, counts + ~state.finished

    output = jnp.zeros((state.tokens.shape[0], max_new_tokens), jnp.int32).at[:, 0].set(state.tokens)
    counts = (~state.finished).astype(jnp.int32)
    state, output, counts = jax.lax.while_loop(unfinished, body, (state, output, counts))
    return output, counts, state
