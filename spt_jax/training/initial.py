"""The trainable tree before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spt_jax.config import Config
from spt_jax.data.dialogue import Dialogue
from spt_jax.models.decoder import FrozenTree, embed
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.parallel.distributed import on_host
from spt_jax.prompting.adapters import SoftPrompts, Trainable, WholeModel
from spt_jax.prompting.bank import from_clusters, from_file, from_normal, from_token_ids, from_vocabulary
from spt_jax.prompting.peft_prompts import from_peft
from spt_jax.prompting.selective_lm import SelectiveLM


def check_initial(config: Config, model: SelectiveLM) -> None:
    """Reads the bank that ``bank.init_file`` names, where one is asked for: before the LM, which takes longer.

    Raises:
        UserError: It cannot be read, or does not fit the bank.
    """
    if isinstance(model.adapter, SoftPrompts) and config.bank.init in ("file", "peft"):
        _read_prompts(config, _bank_shape(model, model.adapter))


def initial_trainable(
    config: Config,
    model: SelectiveLM,
    params: FrozenTree,
    tokenizer: Tokenizer,
    dialogues: Sequence[Dialogue] = (),
) -> Trainable:
    """The trainable tree before the first step; a function of the configuration, its seed, the LM and the dialogues.

    Args:
        config: The configuration.
        model: Its description.
        params: The frozen tree.
        tokenizer: The LM's.
        dialogues: The training dialogues, whose personas ``bank.init = clusters`` groups.

    Raises:
        UserError: ``bank.init_text``, ``bank.init_file`` or the personas do not fit the bank.
    """
    adapter_key, retriever_key = jax.random.split(jax.random.key(config.seed))
    if isinstance(model.adapter, WholeModel):
        # Not through the host: the tree is as large as the LM, and lies where that lies.
        return jax.tree.map(lambda x: x.astype(jnp.float32), {"lm": params})
    if not isinstance(model.adapter, SoftPrompts):
        tree = model.adapter.init(model.decoder, params, adapter_key) | model.init_retriever(retriever_key)
        return on_host(tree)
    shape = _bank_shape(model, model.adapter)
    prompts = _prompts(config, shape, adapter_key, tokenizer, dialogues, _embedder(model, params))
    return on_host({"bank": {"prompts": prompts}} | model.init_retriever(retriever_key))


def _bank_shape(model: SelectiveLM, adapter: SoftPrompts) -> tuple[int, int, int]:
    return adapter.num_prompts, adapter.prompt_length, model.decoder.hidden_size


def _embedder(model: SelectiveLM, params: FrozenTree) -> Callable[[Any], jax.Array]:
    # Where the table is spread over hosts, no process could read what it takes from it.
    return lambda tokens: jnp.asarray(on_host(embed(model.decoder, params, jnp.asarray(tokens, jnp.int32))))


def _prompts(
    config: Config,
    shape: tuple[int, int, int],
    key: jax.Array,
    tokenizer: Tokenizer,
    dialogues: Sequence[Dialogue],
    embedder: Callable[[Any], jax.Array],
) -> jax.Array:
    b = config.bank
    match b.init:
        case "vocabulary":
            return from_vocabulary(key, tokenizer.text_vocab_size, embedder, shape)
        case "normal":
            return from_normal(key, shape, b.init_stddev)
        case "text":
            return from_token_ids(tokenizer.encode(list(b.init_text)), embedder, shape)
        case "clusters":
            personas = list(dict.fromkeys(" ".join(dialogue.persona) for dialogue in dialogues))
            return from_clusters(key, tokenizer.encode(personas), embedder, shape)
        case _:
            return _read_prompts(config, shape)


def _read_prompts(config: Config, shape: tuple[int, int, int]) -> jax.Array:
    b = config.bank
    return from_peft(b.init_file, shape, config.model.source) if b.init == "peft" else from_file(b.init_file, shape)
