"""What is learned before a frozen LM: soft prompts, prefixes, an encoder of prompts, low-rank updates, everything.

An adapter is a small frozen dataclass, a static argument of jit: how its parameters look, and what they make of the
LM (`Conditions`). Whoever scores or generates reads the conditions and never asks which method they come from, so every
rival is trained, decoded and evaluated by the same code as Selective Prompt Tuning.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.prompting.bank import from_normal
from spt_jax.prompting.lora import init_lora, merge_lora, with_lora
from spt_jax.prompting.p_tuning import PromptEncoder
from spt_jax.prompting.prefixes import PrefixEncoder, init_prefixes

Trainable = dict[str, Any]
"""A tree of what is learned, all float32: the adapter's parameters and, with a bank, ``retriever``'s."""


class Conditions(NamedTuple):
    """An LM under K conditions.

    Attributes:
        params: The LM's tree, changed where the method changes it.
        prompts: Soft prompts ``[K, P, M]``; P is 0 where there are none.
        prefixes: Keys and values of every layer before the text, ``[K, L, 2, P, G, head_dim]``; None for none.
    """

    params: FrozenTree
    prompts: jax.Array
    prefixes: jax.Array | None = None

    @property
    def bank(self) -> jax.Array:
        """What stands before the text: the prefixes where there are some, else the soft prompts."""
        return self.prompts if self.prefixes is None else self.prefixes


class Adapter(Protocol):
    """How something learned conditions a frozen LM."""

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """Fresh parameters; `params` may be None where only their shapes matter."""
        ...

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The LM under what `trainable` holds; `dropout_key` is given in training."""
        ...


def _no_prompts(decoder: DecoderConfig, num_prompts: int = 1) -> jax.Array:
    return jnp.zeros((num_prompts, 0, decoder.hidden_size), jnp.float32)


@dataclasses.dataclass(frozen=True)
class SoftPrompts:
    """A bank of soft prompts ``{"bank": {"prompts": [K, P, M]}}`` (arXiv 2104.08691 with K = 1).

    Attributes:
        num_prompts: K.
        prompt_length: P.
        stddev: Standard deviation of `init`; the other initialisations are in `spt_jax.prompting.bank`.
    """

    num_prompts: int
    prompt_length: int
    stddev: float = 1.0

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """Normal prompts."""
        del params
        shape = (self.num_prompts, self.prompt_length, decoder.hidden_size)
        return {"bank": {"prompts": from_normal(key, shape, self.stddev)}}

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The bank before the LM as it is."""
        del decoder, dropout_key
        return Conditions(params, trainable["bank"]["prompts"])


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Keys and values before every layer (arXiv 2101.00190).

    Without an encoder ``{"bank": {"prefixes": [K, L, 2, P, G, head_dim]}}``, and ``keys`` ``[K, M]`` for the retriever
    where there is one; with an encoder ``{"prefix_encoder": …}`` (`PrefixEncoder`).

    Attributes:
        num_prompts: K.
        prompt_length: P.
        stddev: Standard deviation of the first prefixes and keys.
        encoder_width: Width of the encoder; 0 for none.
        keys: Whether a retriever chooses among them.
    """

    num_prompts: int
    prompt_length: int
    stddev: float = 1.0
    encoder_width: int = 0
    keys: bool = False

    def _encoder(self, decoder: DecoderConfig) -> PrefixEncoder:
        return PrefixEncoder(decoder, self.prompt_length, self.encoder_width, self.num_prompts)

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """Normal prefixes, as PEFT starts them, and keys."""
        del params
        if self.encoder_width:
            return {"prefix_encoder": self._encoder(decoder).init(key)["params"]}
        prefix_key, key_key = jax.random.split(key)
        prefixes = self.stddev * init_prefixes(decoder, prefix_key, self.num_prompts, self.prompt_length)
        if not self.keys:
            return {"bank": {"prefixes": prefixes}}
        keys = from_normal(key_key, (self.num_prompts, 1, decoder.hidden_size), self.stddev)[:, 0]
        return {"bank": {"prefixes": prefixes, "keys": keys}}

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The prefixes before the LM as it is."""
        del dropout_key
        if self.encoder_width:
            prefixes: Any = self._encoder(decoder).apply({"params": trainable["prefix_encoder"]})
        else:
            prefixes = trainable["bank"]["prefixes"]
        return Conditions(params, _no_prompts(decoder, self.num_prompts), prefixes)


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """One soft prompt as the output of a small MLP (P-tuning, arXiv 2103.10385): ``{"prompt_encoder": …}``.

    Attributes:
        prompt_length: P.
        width: Of the MLP; 0 for M.
    """

    prompt_length: int
    width: int = 0

    def _encoder(self, decoder: DecoderConfig) -> PromptEncoder:
        return PromptEncoder(self.prompt_length, decoder.hidden_size, self.width or decoder.hidden_size)

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """A fresh encoder."""
        del params
        return {"prompt_encoder": self._encoder(decoder).init(key)["params"]}

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The encoder's prompt before the LM as it is."""
        del dropout_key
        prompts: Any = self._encoder(decoder).apply({"params": trainable["prompt_encoder"]})
        return Conditions(params, prompts)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank updates of projections (LoRA, arXiv 2106.09685): ``{"lora": {"q_proj": {"down", "up"}, …}}``.

    Attributes:
        rank: r.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Of the update's input in training.
        targets: Which projections of every block.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """Updates of zero."""
        del params
        return {"lora": init_lora(decoder, key, self.rank, self.targets)}

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The LM with its updates beside the frozen kernels."""
        changed = with_lora(params, trainable["lora"], self.alpha / self.rank, dropout_key, self.dropout)
        return Conditions(changed, _no_prompts(decoder))

    def merged(self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable) -> Conditions:
        """The LM with its updates added to the kernels: the same LM at the speed of the frozen one."""
        return Conditions(merge_lora(params, trainable["lora"], self.alpha / self.rank), _no_prompts(decoder))


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """Fine-tuning of every weight: ``{"lm": the LM's tree}`` in float32, cast to the LM's type where it is used."""

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """The LM itself; where `params` is None, random weights of its shapes."""
        from spt_jax.models.frozen_tree import random_params

        tree = random_params(decoder, key) if params is None else params
        return {"lm": jax.tree.map(lambda x: x.astype(jnp.float32), tree)}

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The trained LM; the frozen one is not looked at and may be empty."""
        del params, dropout_key
        return Conditions(jax.tree.map(lambda x: x.astype(decoder.jax_dtype), trainable["lm"]), _no_prompts(decoder))


@dataclasses.dataclass(frozen=True)
class Nothing:
    """The LM as it is: textual prompting, and the column without a soft prompt. Its tree is empty."""

    def init(self, decoder: DecoderConfig, params: FrozenTree | None, key: jax.Array) -> Trainable:
        """Nothing."""
        del decoder, params, key
        return {}

    def conditions(
        self, decoder: DecoderConfig, params: FrozenTree, trainable: Trainable, dropout_key: jax.Array | None = None
    ) -> Conditions:
        """The LM as it is."""
        del trainable, dropout_key
        return Conditions(params, _no_prompts(decoder))


def num_conditions(adapter: Adapter) -> int:
    """K, the conditions that the LM is seen under."""
    return adapter.num_prompts if isinstance(adapter, SoftPrompts | Prefixes) else 1
