"""Writes transformers' torch models as GGUF files the way llama.cpp's converter does (its folder ``conversion/``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_files import TOKENS, interleaved

Metadata = dict[str, Any]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
TOKENIZER: Metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * 257,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}


def write_gguf(model: Any, path: Path, *, quantisation: str = "F32", changes: Metadata | None = None) -> Path:
    """Writes `model` and gives its parameters the values that the file has.

    Args:
        model: A torch model of transformers; left with what quantisation, and Gemma's one added to norms, keep of it.
        path: The file.
        quantisation: The type of every matrix; vectors stay F32.
        changes: Metadata, without the architecture that starts a key, to add, replace or (None) drop.
    """
    architecture = ARCHITECTURES[type(model).__name__]
    tensors = _tensors(model, architecture, gguf.GGMLQuantizationType[quantisation])
    tensors |= _rope_tensors(model.config)
    fields = {f"{architecture}.{key}": value for key, value in {**_metadata(model), **(changes or {})}.items()}
    return write_file(path, architecture, fields | TOKENIZER, tensors)


def write_file(path: Path, architecture: str, fields: Metadata, tensors: dict[str, Any]) -> Path:
    """One file; `tensors` are arrays, or pairs of stored bytes and their type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case str():
                writer.add_string(key, value)
            case float():
                writer.add_float32(key, value)
            case int():
                writer.add_uint32(key, value)
            case _:
                writer.add_array(key, value)
    for name, tensor in tensors.items():
        stored, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: Any, architecture: str, kind: gguf.GGMLQuantizationType) -> dict[str, Any]:
    import torch

    config = model.config
    [arch] = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        stored = parameter.detach().numpy().copy()
        plus = float(architecture.startswith("gemma") and name.endswith("norm.weight"))
        stored = stored + np.float32(plus)
        quantised = kind != gguf.GGMLQuantizationType.F32 and stored.ndim == 2
        kept = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind) if quantised else stored
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(kept - np.float32(plus)))
        if architecture == "llama" and ".q_proj." in name:
            stored = interleaved(stored, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            stored = interleaved(stored, config.num_key_value_heads)
        base, _, suffix = name.rpartition(".")
        theirs = f"{names.get_name(base)}.{suffix}"
        tensors[theirs] = (gguf.quants.quantize(stored, kind), kind) if quantised else stored
    return tensors


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def _metadata(model: Any) -> Metadata:
    c, rope = model.config, _rope(model.config)
    architecture, head_dim = ARCHITECTURES[type(model).__name__], _head_dim(c)
    fields: Metadata = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "vocab_size": c.vocab_size,
    }
    lengths = {"attention.key_length": head_dim, "attention.value_length": head_dim}
    base = {"rope.freq_base": float(rope["rope_theta"])}
    match architecture:
        case "llama":
            explicit = lengths if head_dim * c.num_attention_heads != c.hidden_size else {}
            return {**fields, **base, **explicit, "rope.dimension_count": head_dim, **_scaling(rope)}
        case "qwen2":
            return {**fields, **base, **_scaling(rope)}
        case "qwen3":
            return {**fields, **base, **lengths, **_scaling(rope)}
        case "gemma2":
            return {
                **fields,
                **lengths,
                "attn_logit_softcapping": float(c.attn_logit_softcapping),
                "final_logit_softcapping": float(c.final_logit_softcapping),
                "attention.sliding_window": c.sliding_window,
            }
        case "gemma3":
            capped = c.final_logit_softcapping
            local = c.rope_parameters["sliding_attention"]["rope_theta"]
            return {
                **fields,
                **lengths,
                **base,
                **_scaling(rope),
                **({"rope.freq_base_swa": float(local)} if local != 1e4 else {}),
                **({"final_logit_softcapping": float(capped)} if capped else {}),
                "attention.sliding_window": c.sliding_window,
            }
        case _:
            original = rope.get("original_max_position_embeddings", c.max_position_embeddings)
            longer = c.max_position_embeddings / original
            stretched = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
            return {
                **fields,
                **base,
                "rope.scaling.original_context_length": original,
                "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * c.hidden_size)
                // c.num_attention_heads,
                "attention.sliding_window": c.sliding_window or 0,
                **({"rope.scaling.attn_factor": stretched} if "long_factor" in rope else {}),
            }


def _scaling(rope: dict[str, Any]) -> Metadata:
    if rope["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] != "yarn":
        return {}  # llama3 is a tensor
    names = {
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "yarn_attn_factor",
        "mscale_all_dim": "yarn_log_multiplier",
    }
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        **{f"rope.scaling.{theirs}": float(rope[name]) for name, theirs in names.items() if rope.get(name) is not None},
    }


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    rope = _rope(config)
    if "long_factor" in rope:
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    divisors = []
    for i in range(_head_dim(config) // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / _head_dim(config))
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            turns = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth = turns / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(divisors, np.float32)}
