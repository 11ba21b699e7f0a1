"""A trained run as adapters that PEFT loads: soft prompts, prefixes, low-rank updates.

`export_peft` writes what ``PeftModel.from_pretrained`` reads, one folder an adapter, beside the retriever, the run's
configuration and a model card. What PEFT could load but would compute otherwise is refused. The way back is
`spt_jax.prompting.peft_prompts`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from safetensors.numpy import save

import spt_jax
from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.interop.model_card import CardFacts, hub_id, model_card
from spt_jax.interop.peft_lora import check_lora, lora_config, lora_tensors
from spt_jax.interop.whole_folder import check_new_folder, write_folder
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.loading import LMIdentity, OpenedLM
from spt_jax.prompting.adapters import EncodedPrompt, LowRank, Prefixes, SoftPrompts, Trainable
from spt_jax.prompting.peft_prompts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PROMPT_FOLDER,
    PROMPT_KEY,
    PROMPT_TUNING,
)
from spt_jax.prompting.selective_lm import SelectiveLM

LORA_FOLDER = "adapter"
RETRIEVER_FILE = "retriever.safetensors"
CONFIG_FILE = "spt_config.json"
CARD_FILE = "README.md"

Files = dict[str, bytes]
"""Content by name below the exported folder."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """What of a run goes out.

    Attributes:
        config: Its configuration.
        identity: The LM that it was trained on.
        opened: That LM without its weights: family, decoder, tokenizer.
        model: The static description of what was learned.
        trainable: What was learned; may be sharded over a mesh.
        step: The checkpoint's step.
    """

    config: Config
    identity: LMIdentity
    opened: OpenedLM
    model: SelectiveLM
    trainable: Trainable
    step: int


def export_peft(run: TrainedRun, out: Path, figures: str = "") -> list[str]:
    """Writes a run as a folder for PEFT, whole or not at all.

    A bank of K prompts (or prefixes) gives ``prompt_0`` … ``prompt_{K-1}``, low-rank updates give ``adapter``; beside
    them ``retriever.safetensors`` (bank and retriever, where there is one), ``spt_config.json`` and ``README.md``.

    Args:
        run: The run.
        out: A new or empty folder.
        figures: The table of its results in Markdown, for the card; empty for none.

    Returns:
        The adapters' names.

    Raises:
        UserError: PEFT cannot carry this run, or the folder cannot be written; nothing is written then.
    """
    check_new_folder(out)
    refuse_what_peft_cannot(run.config, run.opened, run.model)
    adapters = adapter_files(run)
    files = {f"{name}/{file}": content for name, parts in adapters.items() for file, content in parts.items()}
    if "retriever" in run.trainable or len(adapters) > 1:
        kept = {name: _whole(leaf) for name, leaf in flatten_dict(dict(run.trainable), sep="/").items()}
        files[RETRIEVER_FILE] = save(kept)
    record = {
        "spt_jax": spt_jax.__version__,
        "step": run.step,
        "lm": run.identity.to_dict(),
        "config": run.config.to_dict(),
    }
    files[CONFIG_FILE] = _json(record)
    projected = run.opened.config.embedding_size is not None
    facts = CardFacts(
        run.config, run.identity, run.opened.source, run.opened.family.name, tuple(adapters), figures, projected
    )
    files[CARD_FILE] = model_card(facts, run.opened.tokenizer.bos_id).encode()
    write_folder(out, files)
    return list(adapters)


def refuse_what_peft_cannot(config: Config, opened: OpenedLM, model: SelectiveLM) -> None:
    """Raises UserError where PEFT has no such adapter, or would compute something else from it."""
    decoder, adapter, source = model.decoder, model.adapter, config.model.source
    if not isinstance(adapter, SoftPrompts | Prefixes | EncodedPrompt | LowRank):
        raise UserError(
            f"method.kind is {config.method.kind!r}, of which there is no PEFT adapter; allowed: spt, prompt_tuning, "
            "prefix_tuning, p_tuning and lora"
        )
    if opened.source.kind == "shape":
        raise UserError(f"model.source is {source!r}, random weights that no transformers model has; train on an LM")
    if isinstance(adapter, LowRank):
        check_lora(opened, adapter.targets)
    if decoder.embedding_size is not None and isinstance(adapter, SoftPrompts | EncodedPrompt):
        raise UserError(
            f"PEFT cannot carry soft prompts for {source}: it joins them to embeddings of width "
            f"{decoder.embedding_size}, before the projection to M = {decoder.hidden_size} behind which these were "
            "trained"
        )
    original = dataclasses.replace(decoder, context_length=None).longest_row
    if decoder.context_length is not None and decoder.context_length > original:
        raise UserError(
            f"model.context_length is {decoder.context_length}, for which the rotary positions of every row were "
            f"stretched; transformers stretches those of rows beyond {original} tokens alone, so that PEFT would not "
            "compute what was trained"
        )


def adapter_files(run: TrainedRun) -> dict[str, Files]:
    """The files of every adapter by its folder's name; the same bytes however the tree is sharded.

    Raises:
        UserError: A low-rank update of a projection that transformers keeps joined with others.
    """
    decoder, adapter, common = run.model.decoder, run.model.adapter, _common_fields(run)
    if isinstance(adapter, LowRank):
        tree = jax.tree.map(_whole, dict(run.trainable["lora"]))
        return {LORA_FOLDER: _adapter(common | lora_config(adapter, run.opened, tree), lora_tensors(run.opened, tree))}
    # Soft prompts and prefixes do not look at the LM's weights.
    conditions = adapter.conditions(decoder, {}, run.trainable)
    if conditions.prefixes is not None:
        return {
            PROMPT_FOLDER.format(k): _adapter(common | _prefix_fields(decoder, prefix), {PROMPT_KEY: _flat(prefix)})
            for k, prefix in enumerate(_whole(conditions.prefixes))
        }
    return {
        PROMPT_FOLDER.format(k): _adapter(common | prompt_config(decoder, prompt.shape[0]), {PROMPT_KEY: prompt})
        for k, prompt in enumerate(_whole(conditions.prompts))
    }


def prompt_config(decoder: DecoderConfig, prompt_length: int) -> dict[str, Any]:
    """What PEFT must know of a soft prompt ``[P, M]``, beside `peft_type`'s common fields."""
    return {
        "peft_type": PROMPT_TUNING,
        "num_virtual_tokens": prompt_length,
        "token_dim": decoder.hidden_size,
        "num_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def _prefix_fields(decoder: DecoderConfig, prefix: np.ndarray) -> dict[str, Any]:
    heads = decoder.num_key_value_heads
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": prefix.shape[2],
        "token_dim": heads * decoder.head_dim,
        "num_layers": decoder.num_layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }


def _flat(prefix: np.ndarray) -> np.ndarray:
    """``[L, 2, P, G, head_dim]`` to PEFT's ``[P, L·2·G·head_dim]``."""
    return np.ascontiguousarray(prefix.transpose(2, 0, 1, 3, 4)).reshape(prefix.shape[2], -1)


def _common_fields(run: TrainedRun) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": run.config.model.source,
        # The commit of a hub's model; a package's version would mean nothing there.
        "revision": run.identity.revision if hub_id(run.config.model.source) else None,
    }


def _adapter(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Files:
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    return {ADAPTER_CONFIG: _json(fields), ADAPTER_WEIGHTS: save(arrays, metadata={"format": "pt"})}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _whole(leaf: Any) -> np.ndarray:
    """An array on this host, whatever devices and hosts it is spread over."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))
