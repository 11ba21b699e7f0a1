"""The facts about a frozen LM that ``spt-jax inspect`` shows, from metadata alone."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from spt_jax.config import Config
from spt_jax.models.decoder_config import DecoderConfig, LayerKind
from spt_jax.models.files.hub import HubMetadata, hub_metadata
from spt_jax.models.files.sources import resolve_source
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.loading import OpenedLM, open_lm
from spt_jax.models.quantized import tree_bytes
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.models.weights import check_tensors
from spt_jax.training.description import describe, front_length, remat_of

Facts = dict[str, Any]
"""Nested dicts and lists of text, numbers, truth values and None, as JSON has them."""

MEMORY_KINDS = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
"""Type and quantisation for each line of the memory table; the quantised ones keep the rest in bfloat16."""


@dataclasses.dataclass(frozen=True)
class _Headers:
    """A `Checkpoint` of which the headers alone are known.

    Where a file holds a head that its configuration ties, loading compares the two; here their shapes alone are.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    files: tuple[Path, ...] = ()

    def read(self, name: str) -> np.ndarray:
        return np.zeros((0, *self.shapes[name]), np.bool_)  # no value, so that equal shapes are equal tensors


def inspect_lm(config: Config) -> Facts:
    """Everything that is known of ``config.model.source`` without reading a weight.

    Args:
        config: A validated configuration; its sections ``model``, ``bank`` and ``retriever`` are used.

    Raises:
        UserError: The model would be refused by `spt_jax.models.loading.load_lm`, in the same words. What only the
            weights can show is not checked: a head that should equal the table and does not, and the tensors of a
            ``.bin`` file that is still on the hub.
    """
    found = resolve_source(config.model.source, config.model.revision, weights=False)
    on_hub = found.kind == "folder" and bool(found.revision) and not found.name.startswith("package:")
    opened = open_lm(
        config.model.source,
        dtype=config.model.dtype,
        remat=remat_of(config),
        revision=found.revision if on_hub else config.model.revision,
        context_length=config.model.context_length,
        quantization=config.model.quantization,
        weights=not on_hub,
    )
    hub = hub_metadata(found.name, found.revision) if on_hub else None
    if headers := _headers(opened, hub):
        check_tensors(opened.config, headers, opened.table)
    decoder = opened.config
    return {
        "source": opened.source.name,
        "revision": opened.source.revision,
        "kind": "hub" if hub is not None else opened.source.kind,
        "path": "" if opened.source.kind == "shape" else str(opened.source.path),
        "files": dict(hub.files) if hub is not None else _files(opened),
        "tensor_types": _tensor_types(opened, hub),
        "family": opened.family.name,
        "decoder": _sizes(decoder),
        "context": {"trained": decoder.max_position_embeddings, "longest_row": decoder.longest_row},
        "attention": _attention(decoder),
        "parameters": _parameters(decoder),
        "memory_bytes": {name: frozen_bytes(decoder, *kind) for name, kind in MEMORY_KINDS.items()},
        "cache_bytes_per_token": 2
        * decoder.num_layers
        * decoder.num_key_value_heads
        * decoder.head_dim
        * np.dtype(decoder.jax_dtype).itemsize,
        "tokenizer": _tokenizer(opened.tokenizer),
        "trainable": _trainable(config, decoder),
        "features": _features(config, opened),
    }


def _headers(opened: OpenedLM, hub: HubMetadata | None) -> _Headers | None:
    if hub is not None and hub.shapes is not None:
        shapes = {name: shape for name, (_, shape) in hub.shapes.items()}
        return _Headers(str(hub.folder), shapes, {name: kind for name, (kind, _) in hub.shapes.items()})
    if opened.checkpoint is not None:
        return _Headers(opened.checkpoint.where, opened.checkpoint.shapes, opened.checkpoint.dtypes)
    return None


def frozen_bytes(decoder: DecoderConfig, dtype: str, quantization: str) -> int:
    """Bytes of the frozen tree in a type and a quantisation, over all devices."""
    kind = dataclasses.replace(decoder, dtype=dtype, quantization=quantization)
    return tree_bytes(nn.unbox(abstract_params(kind)))


def _files(opened: OpenedLM) -> dict[str, int]:
    files = () if opened.checkpoint is None else opened.checkpoint.files
    return {file.name: file.stat().st_size for file in files}


def _tensor_types(opened: OpenedLM, hub: HubMetadata | None) -> dict[str, int] | None:
    """How many tensors of each type the files hold; None where only the weights could tell."""
    if hub is not None:
        types = None if hub.shapes is None else [kind for kind, _ in hub.shapes.values()]
    else:
        types = () if opened.checkpoint is None else opened.checkpoint.dtypes.values()
    return None if types is None else dict(collections.Counter(types).most_common())


def _sizes(decoder: DecoderConfig) -> Facts:
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_key_value_heads,
        "head_dim": decoder.head_dim,
        "norm": decoder.norm,
        "activation": decoder.activation,
        "gated_mlp": decoder.gated_mlp,
        "position_embedding": decoder.position_embedding,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "attention_softcap": decoder.attention_softcap,
        "logit_softcap": decoder.logit_softcap,
    }


def _attention(decoder: DecoderConfig) -> list[Facts]:
    counts = collections.Counter(decoder.layer_pattern or [0] * decoder.num_layers)
    return [{"layers": counts[i], **_layer_kind(decoder, kind)} for i, kind in enumerate(decoder.layer_kinds)]


def _layer_kind(decoder: DecoderConfig, kind: LayerKind) -> Facts:
    facts: Facts = {"window": kind.window, "rope_theta": None, "rope_scaling": None, "rotary_dim": None}
    if kind.rope is not None and decoder.position_embedding == "rotary":
        scaling = kind.rope.scaling
        facts["rope_theta"] = kind.rope.theta
        facts["rope_scaling"] = None if scaling is None else scaling.kind
        facts["rotary_dim"] = decoder.rotary_dim or decoder.head_dim
    return facts


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(tree)))


def _parameters(decoder: DecoderConfig) -> Facts:
    tree = abstract_params(dataclasses.replace(decoder, quantization="none"))
    blocks = _count(tree["layers"])
    tables = {name: _count(tree[name]) for name in ("embed_tokens", "embed_positions", "lm_head") if name in tree}
    return {
        "total": _count(tree),
        "embedding": tables["embed_tokens"],
        "positions": tables.get("embed_positions", 0),
        "head": tables.get("lm_head", 0),
        "blocks": blocks,
        "block": blocks // decoder.num_layers,
    }


def _tokenizer(tokenizer: Tokenizer) -> Facts:
    def token(number: int | None) -> Facts | None:
        return None if number is None else {"id": number, "text": tokenizer.backend.id_to_token(number)}

    return {
        "vocab_size": tokenizer.vocab_size,
        "bos": token(tokenizer.bos_id),
        "eos": token(tokenizer.eos_id),
        "pad": token(tokenizer.pad_id),
        "stop": [token(number) for number in tokenizer.stop_ids],
        "chat_template": tokenizer.chat_template is not None,
        "fingerprint": tokenizer.fingerprint,
    }


def _trainable(config: Config, decoder: DecoderConfig) -> Facts:
    model = describe(config, decoder)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    return {
        "num_prompts": model.num_prompts,
        "prompt_length": front_length(config),
        **{name: _count(part) for name, part in tree.items()},
        "total": _count(tree),
    }


def _features(config: Config, opened: OpenedLM) -> dict[str, Facts]:
    """Whether each feature applies, and what there is to know about it."""
    decoder = opened.config
    row = front_length(config) + config.data.max_length
    windows = [kind.window for kind in decoder.layer_kinds if kind.window is not None]
    narrow = [f"layers with a window of {w} tokens lose the soft prompt in longer rows" for w in windows if w < row]
    needed = row + config.evaluation.max_new_tokens
    fits = needed <= decoder.longest_row
    length = f"soft prompt, data.max_length and reply take {needed} tokens of {decoder.longest_row}"
    return {
        "soft prompts": _applies(True, f"each virtual token is {decoder.hidden_size} wide"),
        "dialogue packing": _applies(True, narrow[0] if narrow else "the LM is causal"),
        "cached generation": _applies(True, "prompt and text share one cache"),
        "row and reply fit": _applies(fits, length),
        "quantisation": _applies(True, "int8 or int4 for the blocks' kernels (model.quantization)"),
        "chat template": _applies(opened.tokenizer.chat_template is not None, "used with data.template = chat alone"),
    }


def _applies(applies: bool, note: str) -> Facts:
    return {"applies": applies, "note": note}
