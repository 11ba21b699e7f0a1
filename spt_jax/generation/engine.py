"""Batched and streaming generation over a bank of soft prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import UserError
from spt_jax.generation.decode import DecodeState, advance_jitted, decode_loop, prefill
from spt_jax.generation.sampling import Greedy, SamplingRule, Within
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig


class GenerationEngine:
    """Continues contexts behind soft prompts, many rows at a time.

    Rows of one batch use different prompts of the bank. Contexts go through in order of length, so that a batch pads
    little, and in few shapes, so that little is compiled: text widths are multiples of `length_multiple`, and all
    batches of a call have the same number of rows. A row's result depends on nothing but the row.

    Args:
        config: The frozen LM's shape.
        params: The frozen tree; every compiled function takes it as an argument.
        eos_ids: Tokens that end a row; they are not part of its result.
        pad_id: Fills the rows; never seen by the LM's other tokens.
        vocab_size: How many leading tokens of the LM's vocabulary may be chosen: those that the tokenizer can spell;
            None for all.
        max_batch: Rows in a batch, at most.
        length_multiple: Tokens; the text's width is rounded up to it.

    Raises:
        UserError: If `max_batch` or `length_multiple` is below 1.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: FrozenTree,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        vocab_size: int | None = None,
        max_batch: int = 16,
        length_multiple: int = 32,
    ) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; allowed: 1 or more rows")
        if length_multiple < 1:
            raise UserError(f"length_multiple is {length_multiple}; allowed: 1 or more tokens")
        self.config = config
        self.params = params
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self.max_batch = max_batch
        self.length_multiple = length_multiple
        self._eos_ids = np.asarray(tuple(eos_ids), np.int32)

    def generate(
        self,
        bank: jax.Array,
        contexts: Sequence[Sequence[int]],
        selected: Sequence[int],
        *,
        max_new_tokens: int = 32,
        rule: SamplingRule | None = None,
        seed: int | Sequence[int] = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continues every context behind its prompt.

        Args:
            bank: Soft prompts ``[K, P, M]``; P may be 0, the LM without soft prompts. Or prefixes
                ``[K, L, 2, P, G, head_dim]``.
            contexts: n rows of token ids, none empty.
            selected: n indices into the bank.
            max_new_tokens: Tokens, at most, for each row.
            rule: Chooses tokens; greedy by default.
            seed: One for all rows (row i draws with key i of it), or one a row: then a row draws as it does alone
                with that seed, wherever it stands.
            on_batch: Called with (rows done, rows in all) after every batch.

        Returns:
            n rows of new token ids, in the order of `contexts`, without the end-of-sequence token.

        Raises:
            UserError: If the arguments do not fit one another, or a row does not fit the LM's context.
        """
        self._check(bank, contexts, selected, max_new_tokens)
        rule = self._rule(rule)
        keys = _row_keys(seed, len(contexts))
        # Longest first: what does not fit in memory fails at once, and time left is never underestimated.
        order = sorted(range(len(contexts)), key=lambda row: (-len(contexts[row]), row))
        size = min(self.max_batch, _power_of_two_above(len(contexts)))
        results: list[list[int]] = [[] for _ in contexts]
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            state = self._prefill(bank, contexts, selected, keys, rows, size, rule, max_new_tokens)
            tokens, counts, state = decode_loop(
                self.config, self.params, state, self._eos_ids, rule=rule, max_new_tokens=max_new_tokens
            )
            del state  # its cache is as large as the next batch's
            tokens, counts = jax.device_get((tokens, counts))
            for place, row in enumerate(rows):
                results[row] = tokens[place, : counts[place]].tolist()
            if on_batch is not None:
                on_batch(start + len(rows), len(order))
        return results

    def stream(
        self,
        bank: jax.Array,
        context: Sequence[int],
        selected: int,
        *,
        max_new_tokens: int = 32,
        rule: SamplingRule | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """The tokens that `generate` gives for this one row, each as soon as it is chosen.

        Raises:
            UserError: As `generate`, when the stream is made, not when it is first read.
        """
        self._check(bank, [context], [selected], max_new_tokens)
        rule = self._rule(rule)
        return self._stream(bank, context, selected, max_new_tokens, rule, _row_keys(seed, 1))

    def _stream(
        self,
        bank: jax.Array,
        context: Sequence[int],
        selected: int,
        max_new_tokens: int,
        rule: SamplingRule,
        keys: jax.Array,
    ) -> Iterator[int]:
        state = self._prefill(bank, [context], [selected], keys, [0], 1, rule, max_new_tokens)
        for left in reversed(range(max_new_tokens)):
            token, finished = jax.device_get((state.tokens[0], state.finished[0]))
            if finished:
                return
            yield int(token)
            if left:
                state = advance_jitted(self.config, self.params, state, self._eos_ids, rule=rule)

    def _rule(self, rule: SamplingRule | None) -> SamplingRule:
        rule = Greedy() if rule is None else rule
        if self.vocab_size is None or self.vocab_size >= self.config.vocab_size:
            return rule
        return Within(rule, self.vocab_size)

    def _prefill(
        self,
        bank: jax.Array,
        contexts: Sequence[Sequence[int]],
        selected: Sequence[int],
        keys: jax.Array,
        rows: Sequence[int],
        size: int,
        rule: SamplingRule,
        room: int,
    ) -> DecodeState:
        width = max(len(contexts[row]) for row in rows)
        width = -(-width // self.length_multiple) * self.length_multiple
        tokens = np.full((size, width), self.pad_id, np.int32)
        lengths = np.zeros(size, np.int32)
        source = np.full(size, rows[0], np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(contexts[row])] = contexts[row]
            lengths[place] = len(contexts[row])
            source[place] = row
        prompts = jnp.take(bank, np.asarray(selected, np.int32)[source], axis=0)
        return prefill(
            self.config, self.params, prompts, tokens, lengths, keys[source], self._eos_ids, rule=rule, room=room
        )

    def _check(
        self, bank: jax.Array, contexts: Sequence[Sequence[int]], selected: Sequence[int], max_new_tokens: int
    ) -> None:
        c = self.config
        prefix = (c.num_layers, 2, c.num_key_value_heads, c.head_dim)
        as_prefixes = bank.ndim == 6 and (*bank.shape[1:3], *bank.shape[4:]) == prefix
        if not as_prefixes and (bank.ndim != 3 or bank.shape[-1] != c.hidden_size):
            raise UserError(
                f"the bank has shape {tuple(bank.shape)}; this LM needs [K, P, M] with M = {c.hidden_size}, or "
                f"prefixes [K, {prefix[0]}, 2, P, {prefix[2]}, {prefix[3]}]"
            )
        front = bank.shape[3 if as_prefixes else 1]
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
        if len(contexts) != len(selected):
            raise UserError(f"{len(contexts)} contexts came with {len(selected)} selected prompts; give one for each")
        limit = self.config.longest_row
        for row, (context, prompt) in enumerate(zip(contexts, selected, strict=True)):
            if not 0 <= prompt < bank.shape[0]:
                raise UserError(f"row {row} selects prompt {prompt}; this bank has prompts 0 to {bank.shape[0] - 1}")
            if not len(context):
                raise UserError(f"the context of row {row} is empty; give at least one token")
            if min(context) < 0 or max(context) >= self.config.vocab_size:
                raise UserError(f"row {row} has a token outside the LM's vocabulary of {self.config.vocab_size}")
            needed = front + len(context) + max_new_tokens
            if needed > limit:
                raise UserError(
                    f"row {row} needs {needed} positions ({front} of its soft prompt, {len(context)} of its "
                    f"context, {max_new_tokens} new), but this LM has {limit}"
                )


def _power_of_two_above(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _row_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """One key a row, ``[n]``."""
    seeds = [seed] if isinstance(seed, int) else list(seed)
    for value in seeds:
        if not 0 <= value < 2**32:
            raise UserError(f"seed is {value}; allowed: 0 to {2**32 - 1}")
    fold_in = jax.vmap(jax.random.fold_in)
    if isinstance(seed, int):
        bases = jnp.full(count, seed, jnp.uint32)
        return fold_in(jax.vmap(jax.random.key)(bases), jnp.arange(count))
    if len(seeds) != count:
        raise UserError(f"{count} contexts came with {len(seeds)} seeds; give one for each, or one for all")
    return fold_in(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)), jnp.zeros(count, jnp.int32))
