"""A published ``config.json`` means to us what it means to transformers, in every spelling of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from published_configs import LLAMA2, LLAMA32, PHI3_128K, PUBLISHED, QWEN2, QWEN3, SMOLLM3

from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.registry import family_of_hf


def read(fields: dict[str, Any]) -> DecoderConfig:
    return family_of_hf(fields, "config.json").config_from_hf(fields, "config.json")


def as_transformers_writes_it(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same configuration, read and saved by transformers: new spellings, every default written out."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(fields))
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_and_transformers_own_copy_mean_the_same(name: str, tmp_path: Path) -> None:
    fields = PUBLISHED[name]
    rewritten = as_transformers_writes_it(fields, tmp_path)
    assert rewritten != fields
    assert read(rewritten) == read(fields)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "fields",
    [
        {**LLAMA2, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LLAMA2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {**LLAMA2, "num_key_value_heads": None, "rope_theta": 1e5},
        {**LLAMA32, "head_dim": None},
        {**QWEN2, "rope_scaling": YARN},
        {**QWEN3, "rope_scaling": {**YARN, "rope_type": "yarn"}},
        {**QWEN2, "use_sliding_window": True, "sliding_window": 4096},
        {**SMOLLM3, "no_rope_layers": [1, 0] * 18},
        {**SMOLLM3, "use_sliding_window": True, "sliding_window": 512},
    ],
    ids=["linear", "dynamic", "multi-head", "head_dim", "yarn", "yarn twice", "late windows", "nope", "nope windows"],
)
def test_a_variant_and_transformers_own_copy_mean_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    assert read(as_transformers_writes_it(fields, tmp_path)) == read(fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_left_out_have_transformers_defaults(name: str, tmp_path: Path) -> None:
    """Drops every field that says the default of transformers' class, save those that size the model."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    fields = PUBLISHED[name]
    defaults = type(AutoConfig.for_model(fields["model_type"]))().to_dict()
    sparse = {key: copy.deepcopy(value) for key, value in fields.items() if defaults.get(key, ...) != value}
    sparse |= {key: fields[key] for key in ("model_type", "architectures")}
    sizes = ("size", "heads", "layers", "positions", "ffn_dim", "n_embd", "n_head", "n_layer")
    sparse |= {k: value for k, value in fields.items() if k.endswith(sizes) or k == "max_position_embeddings"}
    assert read(sparse) == read(as_transformers_writes_it(sparse, tmp_path))


@pytest.mark.parametrize("spelling", ["su", "yarn"])
def test_first_names_of_phi3s_longrope_are_known(spelling: str) -> None:
    """Early revisions on the hub say ``su``, the small ones ``yarn``; transformers takes both for longrope."""
    rope = {**PHI3_128K["rope_scaling"], "type": spelling}
    assert read({**PHI3_128K, "rope_scaling": rope}) == read(PHI3_128K)
