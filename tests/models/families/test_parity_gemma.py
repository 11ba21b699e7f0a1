"""Gemma 1, 2 and 3: our logits against transformers' torch models, from the files it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import SIZES, Fields, check_parity, random_model, reference_logits, reread, save
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.torch

WIDTHS = {"intermediate_size": 112, "head_dim": 24}
FAMILIES: dict[str, tuple[str, Fields]] = {
    "Gemma": ("GemmaForCausalLM", {**WIDTHS, "num_key_value_heads": 1}),
    # Caps near the spread of what they cap, and a query scale that is not the head's width.
    "Gemma 2": (
        "Gemma2ForCausalLM",
        {
            **WIDTHS,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "sliding_window": 8,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {
            **WIDTHS,
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "sliding_window": 8,
            "query_pre_attn_scalar": 10,
        },
    ),
}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
}
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("Gemma", "multi-query"): {},
    ("Gemma", "multi-head, untied"): {"num_key_value_heads": 4, "tie_word_embeddings": False},
    ("Gemma", "biases, saved in bfloat16"): {
        "attention_bias": True,
        "num_key_value_heads": 2,
        "dtype": "bfloat16",
    },
    ("Gemma 2", "caps, alternating windows, grouped"): {},
    ("Gemma 2", "no caps, multi-head, untied"): {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    ("Gemma 2", "listed windows, multi-query, shards"): {
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "shards": True,
    },
    ("Gemma 3", "5 local : 1 global, grouped"): {},
    ("Gemma 3", "two rope bases, linear on global layers"): {"rope_parameters": TWO_BASES},
    ("Gemma 3", "listed windows, multi-query, untied, capped"): {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": False,
    },
    ("Gemma 3", "biases, multi-head, saved in bfloat16"): {
        "num_hidden_layers": 2,
        "attention_bias": True,
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
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


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
HUB, LATER = "language_model.model.", "model.language_model."  # the text model's prefix in transformers 4.50 and 4.52


@pytest.mark.parametrize("prefix", [HUB, LATER])
def test_text_part_of_a_multimodal_folder_equals_transformers(
    prefix: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    text = {**SIZES, **FAMILIES["Gemma 3"][1], "rope_parameters": TWO_BASES}
    parts = {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}
    model = save(random_model("Gemma3ForConditionalGeneration", parts), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {_spelled(name, prefix): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert sum(name.startswith(prefix) for name in tensors) == 13 * text["num_hidden_layers"] + 2
    assert any("vision_tower." in name for name in tensors) and any("projector." in name for name in tensors)

    tokens = np.arange(3, 15)[None]
    again = reread(type(model), tmp_path)  # transformers reads both spellings as the same model
    first, second = (reference_logits(m, tokens - 3, tokens > 0, tokens=tokens) for m in (model, again))
    np.testing.assert_array_equal(first, second)
    check_parity("Gemma 3", f"multimodal folder, `{prefix}*`", model, tmp_path, record_property)


def _spelled(name: str, prefix: str) -> str:
    plain = name.replace(HUB, "language_model.").removeprefix("model.")
    return plain.replace("language_model.", HUB) if prefix == HUB else f"model.{plain}"
