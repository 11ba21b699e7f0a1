"""What a token's logits owe to the tokens before it: one frozen dataclass a processor, each a pure function.

History is what was generated, never the context or the soft prompt: so transformers' ``generate`` does when it is given
input embeddings, as it must be with a soft prompt, and a persona that asks for a word is no reason to forbid it. Those
that transformers has too, have its semantics (``transformers.generation.logits_process``).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Processor(Protocol):
    """Changes logits by what was generated before."""

    def process(self, logits: jax.Array, history: jax.Array, count: jax.Array) -> jax.Array:
        """Logits, or log-probabilities, of the next token.

        Args:
            logits: float32 ``[B, V]``.
            history: int32 ``[B, R]``, the tokens generated so far in its first `count` columns.
            count: int32 scalar.

        Returns:
            float32 ``[B, V]``.
        """
        ...


def _seen_or_outside(history: jax.Array, count: jax.Array, vocabulary: int) -> jax.Array:
    """`history` with an id that no scatter writes where nothing was generated yet."""
    return jnp.where(jnp.arange(history.shape[1]) < count, history, vocabulary)


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens in the history are divided by the penalty where positive, multiplied where negative (CTRL).

    Source: arXiv 1909.05858; ``RepetitionPenaltyLogitsProcessor``. On log-probabilities, as in beam search, all are
    multiplied.

    Attributes:
        penalty: Above 0; more than 1 discourages repetition, 1 changes nothing.
    """

    penalty: float

    def process(self, logits: jax.Array, history: jax.Array, count: jax.Array) -> jax.Array:
        """See `Processor.process`; a token counts once however often it was generated."""
        tokens = _seen_or_outside(history, count, logits.shape[-1])
        seen = jnp.take_along_axis(logits, jnp.minimum(tokens, logits.shape[-1] - 1), axis=-1)
        penalised = jnp.where(seen < 0, seen * self.penalty, seen / self.penalty)
        return logits.at[jnp.arange(len(logits))[:, None], tokens].set(penalised, mode="drop")


@dataclasses.dataclass(frozen=True)
class PresencePenalty:
    """A constant off the logits of tokens in the history, however often they were generated (OpenAI's API).

    Attributes:
        penalty: More than 0 discourages repetition, 0 changes nothing.
    """

    penalty: float

    def process(self, logits: jax.Array, history: jax.Array, count: jax.Array) -> jax.Array:
        """See `Processor.process`."""
        tokens = _seen_or_outside(history, count, logits.shape[-1])
        seen = jnp.take_along_axis(logits, jnp.minimum(tokens, logits.shape[-1] - 1), axis=-1)
        return logits.at[jnp.arange(len(logits))[:, None], tokens].set(seen - self.penalty, mode="drop")


@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
    """No n-gram of the history occurs again (``NoRepeatNGramLogitsProcessor``; arXiv 1705.04304 for trigrams).

    Attributes:
        size: n, 1 or more.
    """

    size: int

    def process(self, logits: jax.Array, history: jax.Array, count: jax.Array) -> jax.Array:
        """See `Processor.process`; tokens that would complete an n-gram again get -inf."""
        starts = history.shape[1] - self.size + 1
        if starts < 1:
            return logits
        first = jnp.arange(starts)
        repeats = jnp.broadcast_to(first + self.size - 1 < count, (len(history), starts))
        for place in range(self.size - 1):
            last = jnp.take(history, count - self.size + 1 + place, axis=1, mode="clip")
            repeats &= history[:, place : place + starts] == last[:, None]
        tokens = jnp.where(repeats, history[:, self.size - 1 :], logits.shape[-1])
        return logits.at[jnp.arange(len(logits))[:, None], tokens].set(-jnp.inf, mode="drop")


@dataclasses.dataclass(frozen=True)
class MinNewTokens:
    """Nothing ends before so many tokens (``MinNewTokensLengthLogitsProcessor``).

    Attributes:
        count: Tokens.
        eos_ids: What would end a row.
    """

    count: int
    eos_ids: tuple[int, ...]

    def process(self, logits: jax.Array, history: jax.Array, count: jax.Array) -> jax.Array:
        """See `Processor.process`; while too little was generated, `eos_ids` get -inf."""
        del history
        ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(self.eos_ids, jnp.int32))
        return jnp.where(ends & (count < self.count), -jnp.inf, logits)
