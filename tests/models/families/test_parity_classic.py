"""Families with LayerNorm: our logits against transformers' torch models, from the files it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import VOCABULARY, Fields, check_parity, random_model, reference_logits, save

pytestmark = pytest.mark.torch

FAMILIES: dict[str, tuple[str, Fields]] = {
    "OPT": ("OPTForCausalLM", {"ffn_dim": 112}),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"intermediate_size": 112}),
    "StableLM": ("StableLmForCausalLM", {"intermediate_size": 112, "num_key_value_heads": 4}),
}


def rope(kind: str = "default", share: float = 1.0, **fields: float) -> dict[str, Any]:
    """``rope_parameters`` that turn the first `share` of every head."""
    return {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": share, **fields}


CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("OPT", "125m: norms before"): {},
    ("OPT", "350m: norms after, projections in and out"): {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ("OPT", "norms before, projections, untied, gelu"): {
        "word_embed_proj_dim": 32,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    ("OPT", "no biases, plain norms"): {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ("OPT", "no last norm, shards"): {"_remove_final_layer_norm": True, "shards": True},
    ("OPT", "norms after, saved in bfloat16"): {"do_layer_norm_before": False, "dtype": "bfloat16"},
    ("GPT-2", "gelu_new"): {},
    ("GPT-2", "scaled by layer, untied"): {
        "scale_attn_by_inverse_layer_idx": True,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
    },
    ("GPT-2", "unscaled scores, n_inner, gelu"): {
        "scale_attn_weights": False,
        "n_inner": 96,
        "activation_function": "gelu",
    },
    ("GPT-2", "unscaled scores, scaled by layer, relu"): {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "relu",
        "n_inner": 96,
    },
    ("GPT-2", "reordered, silu, shards, bfloat16"): {
        "reorder_and_upcast_attn": True,
        "activation_function": "silu",
        "shards": True,
        "dtype": "bfloat16",
    },
    ("GPT-NeoX", "parallel residual, a quarter rotary"): {"rope_parameters": rope(share=0.25)},
    ("GPT-NeoX", "residuals in turn, all rotary, tied"): {
        "use_parallel_residual": False,
        "rope_parameters": rope(),
        "tie_word_embeddings": True,
    },
    ("GPT-NeoX", "no attention biases, gelu_new"): {
        "attention_bias": False,
        "rope_parameters": rope(share=0.5),
        "hidden_act": "gelu_new",
    },
    ("GPT-NeoX", "linear rope, quick_gelu, shards"): {
        "rope_parameters": rope("linear", 0.5, factor=4.0),
        "hidden_act": "quick_gelu",
        "shards": True,
    },
    ("GPT-NeoX", "dynamic rope, within its length, bfloat16"): {
        "rope_parameters": rope("dynamic", 0.5, factor=4.0),
        "dtype": "bfloat16",
    },
    ("StableLM", "a quarter rotary"): {},
    ("StableLM", "biases, grouped, half rotary"): {
        "use_qkv_bias": True,
        "num_key_value_heads": 2,
        "rope_parameters": rope(share=0.5),
    },
    ("StableLM", "q/k norms a head, parallel residual, grouped"): {
        "qk_layernorm": True,
        "use_parallel_residual": True,
        "num_key_value_heads": 2,
    },
    ("StableLM", "q/k norms a head, multi-query, tied"): {
        "qk_layernorm": True,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    ("StableLM", "parallel residual, biases, linear rope"): {
        "use_parallel_residual": True,
        "use_qkv_bias": True,
        "rope_parameters": rope("linear", 0.25, factor=4.0),
    },
}


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_equal_transformers(
    family: str, variant: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    architecture, base = FAMILIES[family]
    fields = {**base, **CASES[family, variant]}
    how = {key: fields.pop(key) for key in ("dtype", "shards") if key in fields}
    model = save(random_model(architecture, fields), tmp_path, **how)
    check_parity(family, variant, model, tmp_path, record_property)


@pytest.mark.parametrize("family", ["OPT", "GPT-2"])
def test_the_references_position_ids_count_from_zero(family: str) -> None:
    """OPT's table begins with two rows that no position uses; the ids that its model takes do not count them."""
    architecture, fields = FAMILIES[family]
    model = random_model(architecture, fields)
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (1, 9))
    positions, valid = np.arange(9)[None], np.ones((1, 9), bool)
    import torch

    with torch.no_grad():
        unguided = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_array_equal(reference_logits(model, positions, valid, tokens=tokens), unguided)
    assert np.abs(reference_logits(model, positions + 1, valid, tokens=tokens) - unguided).max() > 0.1
