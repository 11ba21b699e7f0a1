"""The shapes of well-known LMs, so that ``shape:NAME`` is a model of that size without its files.

Each entry holds the fields of the published model's ``config.json`` that describe its decoder, as its authors wrote
them (https://huggingface.co); they pass through the same reader as a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spt_jax.errors import UserError, nearest

PREFIX = "shape:"
_OVERRIDE = re.compile(r"layers=([1-9]\d*)")
_PER_LAYER = ("layer_types", "no_rope_layers")


def _sizes(
    base: Mapping[str, Any], columns: tuple[str, ...], rows: Mapping[str, tuple[Any, ...]]
) -> dict[str, dict[str, Any]]:
    """One entry a row: the family's fields, then the row's own by column."""
    return {name: {**base, **dict(zip(columns, row, strict=True))} for name, row in rows.items()}


_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_GROUPED = (*_WIDTHS, "num_key_value_heads")

_OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 50_272,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_OPT_COLUMNS = (
    *("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads"),
    *("word_embed_proj_dim", "do_layer_norm_before"),
)
_OPT_SIZES = {
    "opt-125m": (768, 3072, 12, 12, 768, True),
    "opt-350m": (1024, 4096, 24, 16, 512, False),
    "opt-1.3b": (2048, 8192, 24, 32, 2048, True),
    "opt-2.7b": (2560, 10_240, 32, 32, 2560, True),
    "opt-6.7b": (4096, 16_384, 32, 32, 4096, True),
    "opt-13b": (5120, 20_480, 40, 40, 5120, True),
    "opt-30b": (7168, 28_672, 48, 56, 7168, True),
    "opt-66b": (9216, 36_864, 64, 72, 9216, True),
}

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA1 = {**_LLAMA, "rms_norm_eps": 1e-6, "vocab_size": 32_000, "max_position_embeddings": 2048}
_LLAMA2 = {**_LLAMA, "vocab_size": 32_000, "max_position_embeddings": 4096}
_LLAMA3 = {**_LLAMA, "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}


def _llama3_scaled(factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {**_LLAMA3, "max_position_embeddings": 131_072, "rope_scaling": scaling}


_SMOLLM2 = {
    **_LLAMA,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_SMOLLM3 = {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "vocab_size": 128_256,
    "max_position_embeddings": 65_536,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "layer_types": ["full_attention"] * 36,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
_QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
}
_QWEN2_COLUMNS = (*_GROUPED, "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")
_QWEN2_SIZES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, 32_768, True, 1e-6),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936, 131_072, True, 1e-6),
    "qwen2.5-3b": (2048, 11_008, 36, 16, 2, 151_936, 32_768, True, 1e-6),
    "qwen2.5-7b": (3584, 18_944, 28, 28, 4, 152_064, 131_072, False, 1e-6),
    "qwen2.5-14b": (5120, 13_824, 48, 40, 8, 152_064, 131_072, False, 1e-5),
    "qwen2.5-32b": (5120, 27_648, 64, 40, 8, 152_064, 131_072, False, 1e-5),
    "qwen2.5-72b": (8192, 29_568, 80, 64, 8, 152_064, 131_072, False, 1e-5),
}
_QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "use_sliding_window": False,
}
_QWEN3_SIZES = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True),
    "qwen3-8b": (4096, 12_288, 36, 32, 8, False),
    "qwen3-14b": (5120, 17_408, 40, 40, 8, False),
    "qwen3-32b": (5120, 25_600, 64, 64, 8, False),
}
_GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "vocab_size": 256_000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
_GEMMA2 = {
    **_GEMMA,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
_GEMMA2_COLUMNS = (*_GROUPED, "head_dim", "query_pre_attn_scalar")
_GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
}
_GEMMA3_COLUMNS = (*_GEMMA2_COLUMNS, "vocab_size", "sliding_window", "max_position_embeddings", "rope_scaling")
_EIGHTFOLD = {"rope_type": "linear", "factor": 8.0}
_GEMMA3_SIZES = {  # from 4B on, the text part of a model that also sees pictures
    "gemma3-270m": (640, 2048, 18, 4, 1, 256, 256, 262_144, 512, 32_768, None),
    "gemma3-1b": (1152, 6912, 26, 4, 1, 256, 256, 262_144, 512, 32_768, None),
    "gemma3-4b": (2560, 10_240, 34, 8, 4, 256, 256, 262_208, 1024, 131_072, _EIGHTFOLD),
    "gemma3-12b": (3840, 15_360, 48, 16, 8, 256, 256, 262_208, 1024, 131_072, _EIGHTFOLD),
    "gemma3-27b": (5376, 21_504, 62, 32, 16, 128, 168, 262_208, 1024, 131_072, _EIGHTFOLD),
}
_MISTRAL = {
    **_LLAMA,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
}
_PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_PHI3_COLUMNS = (
    *_GROUPED,
    *("vocab_size", "max_position_embeddings", "original_max_position_embeddings", "rope_theta", "sliding_window"),
    "pad_token_id",
)
_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_ctx": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
_PYTHIA = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
_PYTHIA_SIZES = {
    "pythia-70m": (512, 2048, 6, 8, 50_304),
    "pythia-160m": (768, 3072, 12, 12, 50_304),
    "pythia-410m": (1024, 4096, 24, 16, 50_304),
    "pythia-1b": (2048, 8192, 16, 8, 50_304),
    "pythia-1.4b": (2048, 8192, 24, 16, 50_304),
    "pythia-2.8b": (2560, 10_240, 32, 32, 50_304),
    "pythia-6.9b": (4096, 16_384, 32, 32, 50_432),
    "pythia-12b": (5120, 20_480, 36, 40, 50_688),
}
_OLMO2 = {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "vocab_size": 100_352,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 500_000,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_STABLELM2 = {
    "model_type": "stablelm",
    "architectures": ["StableLmForCausalLM"],
    "vocab_size": 100_352,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 10_000,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
}
_STABLELM2_COLUMNS = (*_GROUPED, "use_qkv_bias", "qk_layernorm", "use_parallel_residual")

_LLAMA2_SIZES = {
    "llama2-7b": (4096, 11_008, 32, 32, 32),
    "llama2-13b": (5120, 13_824, 40, 40, 40),
    "llama2-70b": (8192, 28_672, 80, 64, 8),
}
_LLAMA3_SIZES = {
    "llama3-8b": (4096, 14_336, 32, 32, 8),
    "llama3-70b": (8192, 28_672, 80, 64, 8),
}
_LLAMA32_SIZES = {
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 64),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, 128),
}
_SMOLLM2_SIZES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 100_000.0),
    "smollm2-360m": (960, 2560, 32, 15, 5, 100_000.0),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 130_000.0),
}
_GEMMA_SIZES = {
    "gemma-2b": (2048, 16_384, 18, 8, 1),
    "gemma-7b": (3072, 24_576, 28, 16, 16),
}
_GEMMA2_SIZES = {
    "gemma2-2b": (2304, 9216, 26, 8, 4, 256, 256),
    "gemma2-9b": (3584, 14_336, 42, 16, 8, 256, 256),
    "gemma2-27b": (4608, 36_864, 46, 32, 16, 128, 144),
}
_PHI3_SIZES = {
    "phi3-mini": (3072, 8192, 32, 32, 32, 32_064, 4096, 4096, 10_000.0, 2047, 32_000),
    "phi4": (5120, 17_920, 40, 40, 10, 100_352, 16_384, 16_384, 250_000.0, None, 100_349),
}
_GPT2_SIZES = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
_OLMO2_SIZES = {
    "olmo2-1b": (2048, 8192, 16, 16, 16),
    "olmo2-7b": (4096, 11_008, 32, 32, 32),
    "olmo2-13b": (5120, 13_824, 40, 40, 40),
}
_STABLELM2_SIZES = {
    "stablelm2-1.6b": (2048, 5632, 24, 32, 32, True, False, False),
    "stablelm2-12b": (5120, 13_824, 40, 32, 8, False, True, True),
}

SHAPES: dict[str, dict[str, Any]] = {
    **_sizes(_OPT, _OPT_COLUMNS, _OPT_SIZES),
    **_sizes(_LLAMA1, _GROUPED, {"llama-7b": (4096, 11_008, 32, 32, 32)}),
    **_sizes(_LLAMA2, _GROUPED, _LLAMA2_SIZES),
    **_sizes(_LLAMA3, _GROUPED, _LLAMA3_SIZES),
    **_sizes(_llama3_scaled(8.0), _GROUPED, {name.replace("3-", "3.1-"): row for name, row in _LLAMA3_SIZES.items()}),
    **_sizes({**_llama3_scaled(32.0), "tie_word_embeddings": True}, (*_GROUPED, "head_dim"), _LLAMA32_SIZES),
    **_sizes(_SMOLLM2, (*_GROUPED, "rope_theta"), _SMOLLM2_SIZES),
    **_sizes(_SMOLLM3, _GROUPED, {"smollm3-3b": (2048, 11_008, 36, 16, 4)}),
    **_sizes(_QWEN2, _QWEN2_COLUMNS, _QWEN2_SIZES),
    **_sizes(_QWEN3, (*_GROUPED, "tie_word_embeddings"), _QWEN3_SIZES),
    **_sizes(_GEMMA, _GROUPED, _GEMMA_SIZES),
    **_sizes(_GEMMA2, _GEMMA2_COLUMNS, _GEMMA2_SIZES),
    **_sizes(_GEMMA3, _GEMMA3_COLUMNS, _GEMMA3_SIZES),
    **_sizes(_MISTRAL, _GROUPED, {"mistral-7b": (4096, 14_336, 32, 32, 8)}),
    **_sizes(_PHI3, _PHI3_COLUMNS, _PHI3_SIZES),
    **_sizes(_GPT2, ("n_embd", "n_layer", "n_head"), _GPT2_SIZES),
    **_sizes(_PYTHIA, (*_WIDTHS, "vocab_size"), _PYTHIA_SIZES),
    **_sizes(_OLMO2, _GROUPED, _OLMO2_SIZES),
    **_sizes(_STABLELM2, _STABLELM2_COLUMNS, _STABLELM2_SIZES),
}
"""``config.json`` fields by name."""


def shape_fields(source: str) -> dict[str, Any]:
    """The ``config.json`` fields of ``shape:NAME``; ``shape:NAME?layers=2`` keeps the first two blocks.

    Raises:
        UserError: No such name, an override other than ``layers``, or more layers than the model has.
    """
    name, query, override = source.removeprefix(PREFIX).partition("?")
    if name not in SHAPES:
        raise UserError(
            f"model source {source!r}: there is no shape {name!r}; allowed: {', '.join(SHAPES)}.{nearest(name, SHAPES)}"
        )
    fields = dict(SHAPES[name])
    if not query:
        return fields
    key = "n_layer" if "n_layer" in fields else "num_hidden_layers"
    match = _OVERRIDE.fullmatch(override)
    if match is None or int(match[1]) > fields[key]:
        raise UserError(
            f"model source {source!r}: {override!r} is no override of a shape; allowed: layers=N with N from 1 to "
            f"{fields[key]}, as in {PREFIX}{name}?layers=2"
        )
    layers = int(match[1])
    return {**fields, key: layers, **{kind: fields[kind][:layers] for kind in _PER_LAYER if kind in fields}}
