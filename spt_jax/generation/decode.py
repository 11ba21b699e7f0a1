"""One jitted prefill and one jitted loop; every row of a batch stands behind a soft prompt of its own.

Positions count from the soft prompt: its tokens hold 0 … P-1, the text of row b holds P … P+lengths[b]-1, and the
j-th generated token holds P+lengths[b]+j. Text is padded on the right, and what is generated lies in slots of its own
(`spt_jax.models.continuation`), so padding leaves no trace. A row may be continued in N ways, its strands.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from spt_jax.generation.sampling import Rule
from spt_jax.models.continuation import Context, Continuation, extend, read
from spt_jax.models.cpu_products import options_for_many_rows
from spt_jax.models.decoder import FrozenTree, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.parallel.rules import cache_sharding, replicated


@flax.struct.dataclass
class DecodeState:
    """Where N strands of each of B rows stand between two tokens.

    Attributes:
        past: Keys and values of everything generated before the tokens chosen last.
        tokens: int32 ``[B, N, R]``, what was generated in the first `step` columns; nothing behind a strand's end.
        counts: int32 ``[B, N]``, how many of a strand's tokens count, end-of-sequence left out.
        finished: bool ``[B, N]``.
        keys: ``[B, N]`` random keys, one a strand; its j-th token is drawn with ``fold_in(key, j)``.
        step: int32 scalar, how many tokens have been chosen in every strand.
    """

    past: Continuation
    tokens: jax.Array
    counts: jax.Array
    finished: jax.Array
    keys: jax.Array
    step: jax.Array


def ends(tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """bool ``[...]``, whether tokens ``[...]`` are among `eos_ids` ``[E]``."""
    return (tokens[..., None] == eos_ids).any(axis=-1)


@functools.partial(jax.jit, static_argnames="config")
def read_prompts(config: DecoderConfig, params: FrozenTree, prompts: jax.Array) -> jax.Array:
    """Soft prompts ``[K, P, M]`` as prefixes: keys and values ``[K, L, 2, P, num_key_value_heads, head_dim]``.

    An LM is causal: what it makes of a soft prompt does not depend on the text behind it, nor on the row.
    """
    c = config
    count, length = prompts.shape[:2]
    nothing = jnp.zeros((count, c.num_layers, 2, 0, c.num_key_value_heads, c.head_dim), c.jax_dtype)
    if length == 0:
        return nothing
    _, context = read(c, params, prompts, jnp.full(count, length, jnp.int32), nothing)
    pair: Any = context.key, context.value
    return jnp.stack(pair).transpose(2, 1, 0, 4, 3, 5)


def _prefill(
    config: DecoderConfig, params: FrozenTree, prefixes: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> tuple[Context, jax.Array]:
    """Reads texts behind their prefixes in one pass.

    Args:
        config: The decoder.
        params: The frozen tree.
        prefixes: ``[B, L, 2, P, num_key_value_heads, head_dim]``, keys and values of each row's soft prompt.
        tokens: int32 ``[B, T]``, padded on the right.
        lengths: int32 ``[B]``, real tokens in each row, 0 for a row that is padding of the batch.

    Returns:
        The context, and float32 logits ``[B, V]`` behind the last token of each row.
    """
    last = jnp.maximum(lengths - 1, 0)[:, None]
    hidden, context = read(config, params, embed(config, params, tokens), lengths, prefixes, last)
    return context, vocabulary_logits(config, params, hidden[:, 0])


prefill = jax.jit(_prefill, static_argnames="config")


def prefill_on_one_cpu(
    config: DecoderConfig, params: FrozenTree, prefixes: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> tuple[Context, jax.Array]:
    """`prefill` of arrays that lie on one CPU, compiled for it (`spt_jax.models.cpu_products`)."""
    return _prefill_compiled_for_cpu()(config, params, prefixes, tokens, lengths)


@functools.cache
def _prefill_compiled_for_cpu() -> Any:
    return jax.jit(_prefill, static_argnames="config", compiler_options=options_for_many_rows())


# rule: every rule is another program; room: the width of the output, an array shape; apart: the state's structure.
@functools.partial(jax.jit, static_argnames=("config", "rule", "room", "apart", "row_sharding"))
def begin(
    config: DecoderConfig,
    logits: jax.Array,
    real: jax.Array,
    keys: jax.Array,
    eos_ids: jax.Array,
    *,
    rule: Rule,
    room: int,
    apart: bool = False,
    row_sharding: NamedSharding | None = None,
) -> DecodeState:
    """Chooses the first token of every strand.

    Args:
        config: The decoder.
        logits: ``[B, V]`` of `prefill`.
        real: bool ``[B]``, False for rows that are padding of the batch; they are finished at once.
        keys: ``[B, N]`` random keys.
        eos_ids: int32 ``[E]``, the tokens that end a row.
        rule: Chooses tokens.
        room: R, how many tokens may be generated.
        apart: Whether the layers lie apart in the context and in the frozen tree that go on with it.
        row_sharding: How the context's rows lie on several devices.
    """
    rows, strands = keys.shape
    shape = (rows, strands, room)
    state = DecodeState(
        past=Continuation.empty(config, rows, strands, room, apart=apart),
        tokens=jnp.zeros(shape, jnp.int32),
        counts=jnp.zeros((rows, strands), jnp.int32),
        finished=jnp.broadcast_to(~real[:, None], (rows, strands)),
        # An output that is an input lies where that lay: not where the others do, so that `decode_loop`, whose own
        # outputs lie there, would be compiled twice.
        keys=jax.lax.optimization_barrier(keys),
        step=jnp.int32(0),
    )
    return _on_its_devices(_chosen(state, jnp.repeat(logits, strands, axis=0), eos_ids, rule), row_sharding)


# config: decides the program; rule: as in `begin`; row_sharding: a layout.
@functools.partial(jax.jit, static_argnames=("config", "rule", "row_sharding"), donate_argnames="state")
def decode_loop(
    config: DecoderConfig,
    params: FrozenTree,
    context: Context,
    state: DecodeState,
    eos_ids: jax.Array,
    until: jax.Array,
    *,
    rule: Rule,
    row_sharding: NamedSharding | None = None,
) -> DecodeState:
    """Generates until every strand is finished or holds `until` tokens.

    Args:
        config: The decoder.
        params: The frozen tree.
        context: Of `prefill`.
        state: Of `begin`, or what an earlier call gave; it is donated.
        eos_ids: int32 ``[E]``.
        until: int32 scalar, R at most. Not static: one program serves the whole reply, a part, and a single token.
        rule: Chooses tokens.
        row_sharding: As in `begin`.
    """

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < until) & ~state.finished.all()

    def advance(state: DecodeState) -> DecodeState:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        hidden, past = extend(config, params, embed(config, params, last), context, state.past)
        logits = vocabulary_logits(config, params, hidden.reshape(-1, hidden.shape[-1]))
        return _chosen(state.replace(past=past), logits, eos_ids, rule)  # pyright: ignore[reportAttributeAccessIssue]

    return _on_its_devices(jax.lax.while_loop(unfinished, advance, state), row_sharding)


def _on_its_devices(state: DecodeState, row_sharding: NamedSharding | None) -> DecodeState:
    """Every row's part on the devices that own the row, so that what `decode_loop` gives lies as what it took."""
    key = state.past.key
    if row_sharding is None or isinstance(key, tuple):  # layers lie apart on one CPU alone
        return state
    rows: Any = row_sharding
    whole: Any = replicated(rows.mesh)
    pair: Any = cache_sharding(rows, key.shape)
    past = Continuation(key=pair, value=pair, ancestors=rows, length=whole)
    shardings = DecodeState(past=past, tokens=rows, counts=rows, finished=rows, keys=rows, step=whole)
    return jax.lax.with_sharding_constraint(state, shardings)


def _chosen(state: DecodeState, logits: jax.Array, eos_ids: jax.Array, rule: Rule) -> DecodeState:
    """One more token in every strand, from logits ``[B · N, V]``."""
    shape = state.finished.shape
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys.reshape(-1), state.step)
    chosen = rule.choose(logits, state.tokens.reshape(-1, state.tokens.shape[-1]), state.step, keys).reshape(shape)
    finished = state.finished | ends(chosen, eos_ids)
    return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        tokens=jax.lax.dynamic_update_slice(state.tokens, chosen[..., None], (0, 0, state.step)),
        counts=state.counts + ~finished,
        finished=finished,
        step=state.step + 1,
    )
