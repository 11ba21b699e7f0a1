"""Families of the Llama kind: our logits against transformers' torch models, from the files it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import WIDTH, Fields, check_parity, random_model, save

pytestmark = pytest.mark.torch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 24}
YARN_DETAILS = {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.9, "mscale_all_dim": 0.6}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0],
    "original_max_position_embeddings": 48,
}
PARTIAL = {**LONGROPE, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.2, 1.5, 1.9, 2.4, 3.0]}
PARTIAL["long_factor"] = [1.0, 2.0, 3.0, 5.0, 9.0, 16.0]
BEYOND = {"max_position_embeddings": 16, "context_length": WIDTH}  # rows of up to WIDTH tokens, pre-trained on 16

FAMILIES: dict[str, tuple[str, Fields]] = {
    "Llama": ("LlamaForCausalLM", {"intermediate_size": 112}),
    "SmolLM3": ("SmolLM3ForCausalLM", {"intermediate_size": 112, "num_hidden_layers": 4, "num_key_value_heads": 2}),
    "Mistral": ("MistralForCausalLM", {"intermediate_size": 112, "num_key_value_heads": 2}),
    "Qwen2": ("Qwen2ForCausalLM", {"intermediate_size": 112, "num_key_value_heads": 2}),
    "Qwen3": ("Qwen3ForCausalLM", {"intermediate_size": 112, "num_key_value_heads": 2, "head_dim": 24}),
    "Phi-3": ("Phi3ForCausalLM", {"intermediate_size": 112, "num_key_value_heads": 2}),
    "OLMo 2": ("Olmo2ForCausalLM", {"intermediate_size": 112}),
}
LATE_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}

CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("Llama", "multi-head"): {"num_key_value_heads": 4},
    ("Llama", "grouped, shards"): {"num_key_value_heads": 2, "shards": True},
    ("Llama", "multi-query, tied"): {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ("Llama", "llama3 rope"): {"rope_parameters": LLAMA3},
    ("Llama", "linear rope"): {"rope_parameters": LINEAR},
    ("Llama", "dynamic rope, within its length"): {"rope_parameters": DYNAMIC},
    ("Llama", "dynamic rope, beyond its length"): {"rope_parameters": DYNAMIC, **BEYOND},
    ("Llama", "yarn rope"): {"rope_parameters": YARN},
    ("Llama", "yarn rope, every field"): {"rope_parameters": YARN_DETAILS},
    ("Llama", "longrope, short factors"): {"rope_parameters": LONGROPE},
    ("Llama", "biases, gelu"): {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    ("Llama", "wide heads"): {"head_dim": 24, "num_key_value_heads": 2},
    ("Llama", "saved in bfloat16"): {"num_key_value_heads": 2, "dtype": "bfloat16", "tie_word_embeddings": True},
    ("SmolLM3", "every 4th layer without rope, tied"): {"tie_word_embeddings": True},
    ("SmolLM3", "listed layers without rope"): {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False},
    ("SmolLM3", "windows without rope"): {
        "use_sliding_window": True,
        "sliding_window": 8,
        "no_rope_layer_interval": 2,
        "num_key_value_heads": 4,
    },
    ("SmolLM3", "biases, yarn rope"): {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    ("Mistral", "window"): {"sliding_window": 8},
    ("Mistral", "no window, wide heads"): {"sliding_window": None, "head_dim": 24},
    ("Mistral", "multi-query, tied, yarn rope"): {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_parameters": YARN,
    },
    ("Qwen2", "grouped"): {},
    ("Qwen2", "tied, multi-head"): {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ("Qwen2", "late layers with a window"): LATE_WINDOW,
    ("Qwen2", "window given, not used"): {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    ("Qwen2", "multi-query, yarn rope, bfloat16"): {
        "num_key_value_heads": 1,
        "rope_parameters": YARN,
        "dtype": "bfloat16",
    },
    ("Qwen3", "grouped"): {},
    ("Qwen3", "tied, multi-query"): {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ("Qwen3", "biases, multi-head"): {"attention_bias": True, "num_key_value_heads": 4},
    ("Qwen3", "late layers with a window"): LATE_WINDOW,
    ("Qwen3", "yarn rope, shards"): {"rope_parameters": YARN, "shards": True},
    ("Phi-3", "grouped"): {},
    ("Phi-3", "multi-head, window"): {"num_key_value_heads": 4, "sliding_window": 8},
    ("Phi-3", "longrope, short factors"): {"rope_parameters": LONGROPE},
    ("Phi-3", "longrope, long factors"): {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 16,
        "context_length": WIDTH,
    },
    ("Phi-3", "longrope, partial rotary, tied"): {
        "rope_parameters": PARTIAL,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 48,
    },
    ("Phi-3", "multi-query, partial rotary"): {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    ("OLMo 2", "multi-head"): {},
    ("OLMo 2", "grouped"): {"num_key_value_heads": 2},
    ("OLMo 2", "multi-query, tied"): {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ("OLMo 2", "biases, yarn rope"): {"attention_bias": True, "rope_parameters": YARN},
}


COVERED_ELSEWHERE = {
    ("Llama", "multi-head"),
    ("Llama", "yarn rope"),
    ("Llama", "saved in bfloat16"),
    ("SmolLM3", "biases, yarn rope"),
    ("Mistral", "multi-query, tied, yarn rope"),
    ("Qwen2", "grouped"),
    ("Qwen2", "tied, multi-head"),
    ("Qwen3", "grouped"),
    ("Qwen3", "tied, multi-query"),
    ("Qwen3", "biases, multi-head"),
    ("Phi-3", "grouped"),
    ("Phi-3", "longrope, partial rotary, tied"),
    ("OLMo 2", "multi-head"),
    ("OLMo 2", "biases, yarn rope"),
}
"""Each of their parts is in another case too; they are for ``--all``."""


@pytest.mark.parametrize(
    ("family", "variant"),
    [pytest.param(*case, marks=[pytest.mark.campaign] if case in COVERED_ELSEWHERE else []) for case in CASES],
)
def test_logits_equal_transformers(
    family: str, variant: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    architecture, base = FAMILIES[family]
    fields = {**base, **CASES[family, variant]}
    how = {key: fields.pop(key) for key in ("dtype", "shards") if key in fields}
    context_length = fields.pop("context_length", 0)
    model = save(random_model(architecture, fields), tmp_path, **how)
    check_parity(family, variant, model, tmp_path, record_property, context_length)
