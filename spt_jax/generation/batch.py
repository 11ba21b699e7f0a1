"""A batch of contexts that was read, and the ways to go on from there: draws, a search, a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.generation.beam import Search, beam_search, watched_beam_search
from spt_jax.generation.decode import DecodeState, begin, decode_loop
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.sampling import Rule
from spt_jax.models.continuation import Context
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.parallel.distributed import on_host

# Tokens between two looks at the text: a look costs little, and so do a few tokens behind the end of a reply.
_SEGMENT = 8


@dataclasses.dataclass(frozen=True)
class Continued:
    """One continuation of a context.

    Attributes:
        tokens: New token ids, without the end-of-sequence token.
        score: Of beam search, see `Decoding.length_penalty`; None elsewhere.
    """

    tokens: list[int]
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows behind their soft prompts.

    Attributes:
        config: The decoder.
        params: The frozen tree.
        eos_ids: int32 ``[E]``, the tokens that end a row.
        vocab_size: How many leading tokens may be chosen; None for all.
        context: Keys and values.
        logits: float32 ``[B, V]`` behind each row.
        real: bool ``[B]``, False for rows that are padding.
        row_sharding: How the rows lie on several devices.
    """

    config: DecoderConfig
    params: FrozenTree
    eos_ids: np.ndarray
    vocab_size: int | None
    context: Context
    logits: jax.Array
    real: np.ndarray
    row_sharding: jax.sharding.NamedSharding | None = None

    def sample(
        self,
        decoding: Decoding,
        max_new_tokens: int,
        keys: jax.Array,
        ended: Callable[[Sequence[int]], bool] | None,
    ) -> list[list[Continued]]:
        """N continuations of each row, greedy or drawn with keys ``[B, N]``; see `GenerationEngine.generate`."""
        rule = self._rule(decoding)
        state = self._begun(rule, max_new_tokens, keys)
        lengths = np.full(keys.shape, max_new_tokens)
        step = looked = 0
        while True:
            # The first segment ends with a full one behind the token that is there already.
            step = max_new_tokens if ended is None else min(max(step, 1) + _SEGMENT, max_new_tokens)
            state = self._advanced(state, step, rule)
            tokens, counts, finished = on_host((state.tokens, state.counts, state.finished))
            if ended is None:
                break
            finished = finished.copy()
            for row, strand in np.argwhere(self.real[:, None] & (lengths == max_new_tokens)):
                end = _first_end(tokens[row, strand, : counts[row, strand]].tolist(), looked, ended)
                if end is not None:
                    lengths[row, strand], finished[row, strand] = end, True
            if step >= max_new_tokens or finished.all():
                break
            looked = step
            # Where the array lay, not where a new one would: the program would be compiled once more for that.
            state = dataclasses.replace(state, finished=state.finished | finished)
        counts = np.minimum(counts, lengths)
        return [
            [Continued(ids[:count].tolist()) for ids, count in zip(*row, strict=True)]
            for row in zip(tokens, counts, strict=True)
        ]

    def search(
        self,
        decoding: Decoding,
        max_new_tokens: int,
        ended: Callable[[Sequence[int]], bool] | None,
        stopped: Callable[[Sequence[int]], bool] | None,
    ) -> list[list[Continued]]:
        """The best `decoding.samples` hypotheses of each row; see `GenerationEngine.generate`."""
        search = Search(decoding.beams, max_new_tokens, decoding.length_penalty, str(decoding.early_stopping))
        batch = self.config, self.params, self.context, self.logits, self.real, self.eos_ids
        if stopped is None:
            found = beam_search(*batch, rule=self._rule(decoding), search=search)
        else:
            found = watched_beam_search(*batch, stopped, rule=self._rule(decoding), search=search)
        rows = []
        for row in zip(*on_host(found), strict=True):
            continued = []
            for ids, count, score in list(zip(*row, strict=True))[: decoding.samples]:
                kept = ids[:count].tolist()
                end = None if ended is None else _first_end(kept, 0, ended)
                continued.append(Continued(kept[:end], float(score)))
            rows.append(continued)
        return rows

    def stream(
        self,
        decoding: Decoding,
        max_new_tokens: int,
        keys: jax.Array,
        stopped: Callable[[Sequence[int]], bool] | None,
    ) -> Iterator[int]:
        """The tokens of a batch of one row, each as soon as it is chosen; of beam search, at its end."""
        if decoding.beams > 1:
            yield from self.search(decoding, max_new_tokens, None, stopped)[0][0].tokens
            return
        rule = self._rule(decoding)
        state = self._begun(rule, max_new_tokens, keys)
        for step in range(max_new_tokens):
            token, finished = on_host((state.tokens[0, 0, step], state.finished[0, 0]))
            if finished:
                return
            yield int(token)
            if step + 1 < max_new_tokens:
                state = self._advanced(state, step + 2, rule)

    def _begun(self, rule: Rule, room: int, keys: jax.Array) -> DecodeState:
        layout = {"apart": self.context.apart, "row_sharding": self.row_sharding}
        return begin(self.config, self.logits, self.real, keys, self.eos_ids, rule=rule, room=room, **layout)

    def _rule(self, decoding: Decoding) -> Rule:
        return decoding.rule(self.eos_ids.tolist(), self.vocab_size)

    def _advanced(self, state: DecodeState, until: int, rule: Rule) -> DecodeState:
        batch = self.config, self.params, self.context
        options = {"rule": rule, "row_sharding": self.row_sharding}
        return decode_loop(*batch, state, self.eos_ids, jnp.int32(until), **options)


def _first_end(ids: Sequence[int], looked: int, ended: Callable[[Sequence[int]], bool]) -> int | None:
    """How many of `ids` a row keeps that has ended; None where it has not, as is known of the first `looked` ids."""
    if len(ids) <= looked or not ended(ids):
        return None
    return next(end for end in range(looked + 1, len(ids) + 1) if ended(ids[:end]))
