"""How the next token is chosen from its logits: processors, then warpers, then the likeliest token or a draw.

A rule is hashable, so that it may be a static argument of a jitted function: every rule is another program.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from spt_jax.generation.processors import Processor
from spt_jax.generation.warpers import Warper


@dataclasses.dataclass(frozen=True)
class Rule:
    """What chooses the next token of every row; made by `spt_jax.generation.decoding.Decoding.rule`.

    Attributes:
        processors: Change the logits by the history, in order.
        warpers: Cut the distribution before a draw, in order.
        draws: Whether a token is drawn; else the most likely one is taken, the lowest id among equals.
        vocab_size: How many leading tokens may be chosen: tables are padded beyond what a tokenizer can spell. None for
            all.
    """

    processors: tuple[Processor, ...] = ()
    warpers: tuple[Warper, ...] = ()
    draws: bool = False
    vocab_size: int | None = None

    def within(self, logits: jax.Array) -> jax.Array:
        """The logits of the tokens that may be chosen: ``[B, V]`` to ``[B, vocab_size]``."""
        return logits[:, : self.vocab_size]

    def processed(self, logits: jax.Array, history: jax.Array, count: jax.Array) -> jax.Array:
        """Behind all processors; arguments as `Processor.process`."""
        for processor in self.processors:
            logits = processor.process(logits, history, count)
        return logits

    def choose(self, logits: jax.Array, history: jax.Array, count: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids int32 ``[B]``.

        Args:
            logits: float32 ``[B, V]``.
            history: int32 ``[B, R]``, the tokens generated so far in its first `count` columns.
            count: int32 scalar.
            keys: ``[B]`` random keys, one a row, so that neighbours have no say.
        """
        logits = self.processed(self.within(logits), history, count)
        if not self.draws:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        for warper in self.warpers:
            logits = warper.warp(logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
