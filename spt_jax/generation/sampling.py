"""How the next token is chosen from its logits: one frozen dataclass a rule, each a pure function.

A rule is hashable, so that it may be a static argument of a jitted function: every rule is another program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from spt_jax.errors import UserError


class SamplingRule(Protocol):
    """What chooses the next token of every row."""

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids int32 ``[B]`` from float32 logits ``[B, V]`` and one random key a row ``[B]``."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; the lowest id among equals."""

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Argmax over the vocabulary: ``[B, V]`` to ``[B]``; `keys` are not used."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A draw from ``softmax(logits / temperature)``, cut to its head.

    The cuts follow one another: the `top_k` most likely tokens are kept, and of their renormalised distribution the
    smallest head that holds at least `top_p` (nucleus sampling, arXiv 1904.09751). Equal logits go by the lowest id.

    Attributes:
        temperature: Above 0; 1 leaves the distribution as the LM gives it, less sharpens it.
        top_k: How many tokens are kept; 0 keeps all.
        top_p: The probability that is kept, in (0, 1]; 1 keeps all.

    Raises:
        UserError: If a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature is {self.temperature}; allowed: a finite number above 0 (greedy has none)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; allowed: 0 (keep every token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; allowed: above 0, up to 1 (keep every token)")

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """One draw a row with the row's own key, so that neighbours have no say: ``[B, V]``, ``[B]`` to ``[B]``."""
        draw = jax.vmap(jax.random.categorical)
        scaled = logits / self.temperature
        vocabulary = logits.shape[-1]
        kept = min(self.top_k, vocabulary) if self.top_k else vocabulary
        if kept == vocabulary and self.top_p == 1:
            return draw(keys, scaled).astype(jnp.int32)
        values, ids = jax.lax.top_k(scaled, kept)
        if self.top_p < 1:
            probabilities = jax.nn.softmax(values, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            # The first token stays whatever top_p is: rounding may leave its `before` a hair above 0.
            inside = (before < self.top_p).at[:, 0].set(True)
            values = jnp.where(inside, values, -jnp.inf)
        choice = draw(keys, values)
        return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def sampling_rule(temperature: float, top_k: int = 0, top_p: float = 1.0) -> Greedy | Temperature:
    """The rule that command-line flags mean: greedy at temperature 0, a draw otherwise.

    Raises:
        UserError: If a value is outside its range, or `top_k` or `top_p` are given without a temperature.
    """
    if temperature == 0:
        if top_k != 0 or top_p != 1:
            raise UserError("top_k and top_p cut a draw, but temperature is 0 (greedy); give a temperature above 0")
        return Greedy()
    return Temperature(temperature, top_k, top_p)


@dataclasses.dataclass(frozen=True)
class Within:
    """Another rule over the first tokens of the vocabulary: tables are padded beyond what a tokenizer can spell.

    Attributes:
        rule: What chooses.
        vocab_size: How many leading tokens may be chosen.
    """

    rule: SamplingRule
    vocab_size: int

    def choose(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """As `rule`, on ``[B, vocab_size]``."""
        return self.rule.choose(logits[:, : self.vocab_size], keys)
