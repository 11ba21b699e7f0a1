"""GGUF files of every supported architecture: our logits against the torch models they were made from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import ARCHITECTURES, write_gguf
from parity import WIDTH, Fields, check_parity, random_model, reference_logits

pytestmark = pytest.mark.torch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 1.9, 2.4, 3.0],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0, 16.0],
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 48,
}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
}
GROUPED = {"intermediate_size": 96, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8}

BASES: dict[str, Fields] = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": None},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 24},
    "Gemma2": {**GEMMA, "num_hidden_layers": 3, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "Gemma3": {**GEMMA, "num_hidden_layers": 7},
    "Phi3": {**GROUPED, "tie_word_embeddings": False},
}
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("Llama", "grouped"): {},
    ("Llama", "Q8_0, multi-query, tied"): {"num_key_value_heads": 1, "tie_word_embeddings": True, "as": "Q8_0"},
    ("Llama", "llama3 rope as a tensor"): {"rope_parameters": LLAMA3},
    ("Llama", "linear rope"): {"rope_parameters": LINEAR},
    ("Llama", "yarn rope, biases"): {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True},
    ("Llama", "yarn rope, every field"): {
        "rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.6}
    },
    ("Llama", "yarn rope, attention factor"): {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    ("Llama", "wide heads, multi-head"): {"head_dim": 24, "num_key_value_heads": 4},
    ("Mistral", "Q5_1, under llama's name"): {"as": "Q5_1"},
    ("Qwen2", "grouped"): {},
    ("Qwen2", "Q4_0, tied, yarn rope"): {"tie_word_embeddings": True, "rope_parameters": YARN, "as": "Q4_0"},
    ("Qwen3", "grouped"): {},
    ("Qwen3", "Q5_0, tied, multi-query, biases"): {
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "as": "Q5_0",
    },
    ("Gemma2", "caps, alternating windows"): {},
    ("Gemma2", "Q8_0, multi-query"): {"num_key_value_heads": 1, "as": "Q8_0"},
    ("Gemma3", "5 local : 1 global"): {},
    ("Gemma3", "Q8_0, two bases, linear on global layers"): {"rope_parameters": TWO_BASES, "as": "Q8_0"},
    ("Gemma3", "untied, capped"): {
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 2.0,
    },
    ("Phi3", "joined tensors"): {},
    ("Phi3", "Q4_1, multi-head, window"): {"num_key_value_heads": 4, "sliding_window": 8, "as": "Q4_1"},
    ("Phi3", "partial longrope, tied"): {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 48,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_equal_the_model_the_file_was_made_from(
    family: str, variant: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    fields = {**BASES[family], **CASES[family, variant]}
    quantisation = fields.pop("as", "F32")
    model = random_model(f"{family}ForCausalLM", fields)
    model.set_attn_implementation("eager")
    path = write_gguf(model, tmp_path / "model.gguf", quantisation=quantisation)
    check_parity(f"{family} GGUF", variant, model, path, record_property)


READ_IN_PART = {"Qwen3", "Gemma2", "Gemma3"}
"""Families whose head width, caps or scale transformers does not take from the file; it is handed the true ones."""


@pytest.mark.parametrize("family", BASES)
def test_transformers_reads_the_written_file_as_the_same_model(family: str, tmp_path: Path) -> None:
    import torch

    pytest.importorskip("accelerate", reason="transformers reads GGUF weights with accelerate alone")
    model = random_model(f"{family}ForCausalLM", {**BASES[family], "tie_word_embeddings": True})
    write_gguf(model, tmp_path / "model.gguf", quantisation="Q8_0")
    given = {"config": model.config} if family in READ_IN_PART else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = type(model).from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **given).eval()
    tokens = np.arange(3, 3 + WIDTH)[None]
    logits = [reference_logits(m, tokens - 3, tokens > 0, tokens=tokens) for m in (model, theirs)]
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "types"),
    [
        ("Gemma3", {"attention.sliding_window_pattern": 2}, "sfs"),
        ("Gemma2", {"attention.sliding_window_pattern": [False, True, True]}, "fss"),
        ("Qwen3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True, False]}, "fsf"),
        ("Gemma3", {"attention.sliding_window": None}, "fff"),
    ],
)
def test_a_pattern_in_the_file_says_which_layers_have_windows(
    family: str, changes: dict[str, Any], types: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    names = {"s": "sliding_attention", "f": "full_attention"}
    fields = {**BASES[family], "num_hidden_layers": 3, "layer_types": [names[kind] for kind in types]}
    if family == "Qwen3":
        fields |= {"use_sliding_window": True, "sliding_window": 8}
    model = random_model(f"{family}ForCausalLM", fields)
    model.set_attn_implementation("eager")
    path = write_gguf(model, tmp_path / "model.gguf", changes=changes)
    check_parity(f"{family} GGUF", f"windows {types}", model, path, record_property)


def test_every_architecture_has_a_case() -> None:
    assert {f"{family}ForCausalLM" for family, _ in CASES} == set(ARCHITECTURES)
