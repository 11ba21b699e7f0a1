"""Batched and streaming generation over a bank of soft prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import UserError
from spt_jax.generation.batch import Batch, Continued
from spt_jax.generation.decode import prefill, prefill_on_one_cpu, read_prompts
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.seeds import row_keys, strand_keys
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.layers_apart import layers_apart, on_one_cpu
from spt_jax.parallel.rules import place_whole, replicated, row_devices

# Larger banks are mixtures, a prompt for every row: nothing of them would be used again.
_KEPT_PROMPTS = 64


class GenerationEngine:
    """Continues contexts behind soft prompts, many rows at a time.

    Rows of one batch use different prompts of the bank, whose keys and values are computed once and kept until another
    bank comes. Contexts go through in order of length, so that a batch pads little, and in few shapes, so that little
    is compiled: text widths are multiples of `length_multiple`, and all batches of a call have the same number of rows.
    A row's result depends on nothing but the row.

    Args:
        config: The frozen LM's shape.
        params: The frozen tree; every compiled function takes it as an argument.
        eos_ids: Tokens that end a row; they are not part of its result.
        pad_id: Fills the rows; never seen by the LM's other tokens.
        vocab_size: How many leading tokens of the LM's vocabulary may be chosen: those that the tokenizer can spell;
            None for all.
        max_batch: Rows in a batch, at most.
        length_multiple: Tokens; the text's width is rounded up to it.
        row_sharding: How the rows of batches that devices can share evenly lie on them; others lie on each of its
            devices whole. None for one device. Of several processes every one makes the same calls.

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
        row_sharding: jax.sharding.NamedSharding | None = None,
    ) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; allowed: 1 or more rows")
        if length_multiple < 1:
            raise UserError(f"length_multiple is {length_multiple}; allowed: 1 or more tokens")
        self.config = config
        self.params = params
        self.pad_id = pad_id
        self.vocab_size = None if vocab_size is None or vocab_size >= config.vocab_size else vocab_size
        self.max_batch = max_batch
        self.length_multiple = length_multiple
        self._row_sharding = row_sharding
        self._eos_ids = np.asarray(tuple(eos_ids), np.int32)
        self._kept: tuple[jax.Array, jax.Array] | None = None
        # Layers that lie apart are for the steps of decoding, whose rows are few.
        self._apart = on_one_cpu(params)
        self._step_params = params | {"layers": layers_apart(params["layers"])} if self._apart else params

    def generate(
        self,
        bank: jax.Array,
        contexts: Sequence[Sequence[int]],
        selected: Sequence[int],
        *,
        max_new_tokens: int = 32,
        decoding: Decoding | None = None,
        seed: int | Sequence[int] = 0,
        ended: Callable[[Sequence[int]], bool] | None = None,
        stopped: Callable[[Sequence[int]], bool] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        on_rows: Callable[[Sequence[int], Sequence[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """Continues every context behind its prompt.

        Args:
            bank: Soft prompts ``[K, P, M]``; P may be 0, the LM without soft prompts. Or prefixes
                ``[K, L, 2, P, G, head_dim]``.
            contexts: n rows of token ids, none empty.
            selected: n indices into the bank.
            max_new_tokens: Tokens, at most, for each row.
            decoding: How tokens are chosen; greedy by default.
            seed: One for all rows (row i draws with key i of it), or one a row: then a row draws as it does alone
                with that seed, wherever it stands.
            ended: Whether nothing behind these new tokens matters; a row goes no further than the first of its
                beginnings for which this holds. Called now and then, with more and more tokens of each row. What beam
                search found it cuts.
            stopped: Of beam search: whether these new tokens are a whole hypothesis though no token among them ends
                one. Called for every hypothesis of every step, which takes time.
            on_batch: Called with (rows done, rows in all) after every batch.
            on_rows: Called before that with the numbers of the batch's rows, and what each of them became.

        Returns:
            n rows of new token ids, in the order of `contexts`, without the end-of-sequence token: the first of each
            row's continuations.

        Raises:
            UserError: If the arguments do not fit one another, or a row does not fit the LM's context.
        """
        found = self.continuations(
            bank,
            contexts,
            selected,
            max_new_tokens=max_new_tokens,
            decoding=decoding,
            seed=seed,
            ended=ended,
            stopped=stopped,
            on_batch=on_batch,
            on_rows=None
            if on_rows is None
            else lambda rows, found: on_rows(rows, [continued[0].tokens for continued in found]),
        )
        return [row[0].tokens for row in found]

    def continuations(
        self,
        bank: jax.Array,
        contexts: Sequence[Sequence[int]],
        selected: Sequence[int],
        *,
        max_new_tokens: int = 32,
        decoding: Decoding | None = None,
        seed: int | Sequence[int] = 0,
        ended: Callable[[Sequence[int]], bool] | None = None,
        stopped: Callable[[Sequence[int]], bool] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        on_rows: Callable[[Sequence[int], Sequence[list[Continued]]], None] | None = None,
    ) -> list[list[Continued]]:
        """As `generate`, with all ``decoding.samples`` continuations of each row; of beam search the best, in order.

        A context is read once, however many there are, and the first of several samples is what one alone would be.
        """
        decoding = decoding or Decoding()
        self._check(bank, contexts, selected, max_new_tokens, decoding)
        keys = strand_keys(row_keys(seed, len(contexts)), decoding.samples if decoding.draws else 1)
        # Longest first: what does not fit in memory fails at once, and time left is never underestimated.
        order = sorted(range(len(contexts)), key=lambda row: (-len(contexts[row]), row))
        size = min(self.max_batch, _power_of_two_above(len(contexts)))
        results: list[list[Continued]] = [[] for _ in contexts]
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = self._prefill(bank, contexts, selected, rows, size)
            if decoding.beams > 1:
                found = batch.search(decoding, max_new_tokens, ended, stopped)
            else:
                found = batch.sample(decoding, max_new_tokens, keys[np.resize(rows, size)], ended)
            del batch  # it is as large as the next one
            for row, continued in zip(rows, found, strict=False):
                results[row] = continued
            if on_rows is not None:
                on_rows(rows, [results[row] for row in rows])
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
        decoding: Decoding | None = None,
        seed: int = 0,
        stopped: Callable[[Sequence[int]], bool] | None = None,
    ) -> Iterator[int]:
        """The tokens that `generate` gives for this one row, each as soon as it is chosen; of beam search, at its end.

        Raises:
            UserError: As `generate`, when the stream is made, not when it is first read.
        """
        decoding = decoding or Decoding()
        self._check(bank, [context], [selected], max_new_tokens, decoding)
        keys = strand_keys(row_keys(seed, 1), 1)

        def read_then_go_on() -> Iterator[int]:
            batch = self._prefill(bank, [context], [selected], [0], 1)
            yield from batch.stream(decoding, max_new_tokens, keys, stopped)

        return read_then_go_on()

    def _prefill(
        self,
        bank: jax.Array,
        contexts: Sequence[Sequence[int]],
        selected: Sequence[int],
        rows: Sequence[int],
        size: int,
    ) -> Batch:
        """Reads a batch of `size` rows; those behind `rows` are padding, with the prompt of its first."""
        width = max(len(contexts[row]) for row in rows)
        width = -(-width // self.length_multiple) * self.length_multiple
        tokens = np.full((size, width), self.pad_id, np.int32)
        lengths = np.zeros(size, np.int32)
        prompts = np.full(size, selected[rows[0]], np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(contexts[row])] = contexts[row]
            lengths[place] = len(contexts[row])
            prompts[place] = selected[row]
        sharding = self._sharding_of(size)
        placed: Any = (self._prefixes(bank, prompts), tokens, lengths)
        if sharding is not None:
            placed = jax.device_put(placed[0], sharding), *(place_whole(x, sharding) for x in placed[1:])
        read = prefill_on_one_cpu if self._apart else prefill
        context, logits = read(self.config, self.params, *placed)
        real = np.arange(size) < len(rows)
        context = context.taken_apart() if self._apart else context
        return Batch(self.config, self._step_params, self._eos_ids, self.vocab_size, context, logits, real, sharding)

    def _sharding_of(self, size: int) -> jax.sharding.NamedSharding | None:
        """Of a batch of `size` rows: spread over the devices where they can be; a row never leaves its device."""
        sharding = self._row_sharding
        if sharding is None or size % row_devices(sharding.mesh) == 0:
            return sharding
        return replicated(sharding.mesh)

    def _prefixes(self, bank: jax.Array, prompts: np.ndarray) -> jax.Array:
        """Keys and values of each row's prompt, ``[B, L, 2, P, G, head_dim]``."""
        if bank.ndim == 6:
            return jnp.take(bank, prompts, axis=0)
        # What is no jax.Array may have changed since.
        if bank.shape[0] > _KEPT_PROMPTS or not isinstance(bank, jax.Array):
            return read_prompts(self.config, self.params, jnp.take(jnp.asarray(bank), prompts, axis=0))
        if self._kept is None or self._kept[0] is not bank:
            self._kept = bank, read_prompts(self.config, self.params, bank)
        return jnp.take(self._kept[1], prompts, axis=0)

    def _check(
        self,
        bank: jax.Array,
        contexts: Sequence[Sequence[int]],
        selected: Sequence[int],
        max_new_tokens: int,
        decoding: Decoding,
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
        if decoding.min_new_tokens > max_new_tokens:
            raise UserError(
                f"min_new_tokens is {decoding.min_new_tokens}; allowed: up to max_new_tokens ({max_new_tokens})"
            )
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
