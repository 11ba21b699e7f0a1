"""What no family can do is refused by name at load, before any weight file is opened: these folders hold none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_configs import (
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3_TEXT,
    GPT2,
    LLAMA2,
    LLAMA32,
    MISTRAL,
    OLMO2,
    OPT,
    PHI3,
    PHI3_128K,
    PHI4_MINI,
    PUBLISHED,
    PYTHIA,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STABLELM2,
)

from spt_jax.errors import UserError
from spt_jax.models.families.registry import family_of_hf
from spt_jax.models.loading import load_lm
from spt_jax.models.rotary import rotary_frequencies

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 261}


def refusal(fields: dict[str, Any], folder: Path) -> str:
    """The sentence with which a folder that holds this ``config.json`` and nothing else is refused."""
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as caught:
        load_lm(str(folder))
    message = str(caught.value)
    assert str(folder / "config.json") in message, "where"
    for later in ("weight file", "tokenizer that"):
        assert later not in message, "the configuration must be refused first"
    return message


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    "model_type",
    [
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v3", "llama4", "granitemoe"),
        *("falcon", "gptj", "bloom", "mamba", "gemma3n", "gemma3n_text", "cohere", "olmo", "phi"),
        *("t5", "bart", "encoder-decoder", "bert", "vit", "llama2", "", None, 7),
    ],
)
def test_other_model_types_are_refused_with_the_supported_ones(model_type: Any, tmp_path: Path) -> None:
    message = refusal({**SIZES, "model_type": model_type}, tmp_path)
    assert repr(model_type) in message
    for supported in {fields["model_type"] for fields in PUBLISHED.values()}:
        assert supported in message


def test_a_config_without_a_model_type_is_refused(tmp_path: Path) -> None:
    assert "model_type" in refusal(SIZES, tmp_path)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        (LLAMA2, "LlamaForSequenceClassification"),
        (OPT, "OPTForQuestionAnswering"),
        (GPT2, "GPT2DoubleHeadsModel"),
        (PYTHIA, "GPTNeoXForTokenClassification"),
        (GEMMA3, "PaliGemmaForConditionalGeneration"),
        (MISTRAL, "MixtralForCausalLM"),
        (QWEN2, "Qwen2MoeForCausalLM"),
        (QWEN2, "T5ForConditionalGeneration"),
    ],
)
def test_other_architectures_of_a_model_type_are_refused(
    fields: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    message = refusal({**fields, "architectures": [architecture]}, tmp_path)
    assert repr(architecture) in message and fields["architectures"][0] in message


ACTIVATION_FIELD = {"opt": "activation_function", "gpt2": "activation_function"}
ACTIVATION_FIELD |= dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "hidden_activation")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "Gemma 3 4B"])
def test_unknown_activations_are_refused_in_every_family(name: str, tmp_path: Path) -> None:
    fields = PUBLISHED[name]
    key = ACTIVATION_FIELD.get(fields["model_type"], "hidden_act")
    message = refusal({**without(fields, "hidden_act"), key: "mish"}, tmp_path)
    assert "'mish'" in message and key in message and ("silu" in message or "gelu" in message)


@pytest.mark.parametrize("name", PUBLISHED)
def test_quantised_folders_are_refused_in_every_family(name: str, tmp_path: Path) -> None:
    for method in ("gptq", "awq", "bitsandbytes", "fp8"):
        message = refusal({**PUBLISHED[name], "quantization_config": {"quant_method": method}}, tmp_path)
        assert repr(method) in message and "quantis" in message and "GGUF" in message


ROTARY = [name for name, fields in PUBLISHED.items() if fields["model_type"] not in ("opt", "gpt2", "gemma3")]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROTARY)
def test_unknown_rope_types_are_refused_in_every_family(name: str, key: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4}
    if key == "rope_parameters" and PUBLISHED[name]["model_type"] == "gemma3_text":
        rope = {"sliding_attention": {"rope_type": "default"}, "full_attention": rope}
    message = refusal({**without(PUBLISHED[name], "rope_scaling"), key: rope}, tmp_path)
    assert "'spiral'" in message and "rope_type" in message and "linear" in message


def scaled(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**fields, "rope_scaling": {**fields["rope_scaling"], **changes}}


@pytest.mark.parametrize("name", ["Qwen 2.5 0.5B", "Qwen 3 0.6B", "SmolLM3 3B", "Gemma 2 2B", "Gemma 3 1B"])
def test_unknown_layer_types_are_refused(name: str, tmp_path: Path) -> None:
    fields = PUBLISHED[name]
    types = ["full_attention"] * fields["num_hidden_layers"]
    changes = {"layer_types": [*types[1:], "chunked_attention"], "sliding_window": 8, "use_sliding_window": True}
    message = refusal({**fields, **changes}, tmp_path)
    assert "'chunked_attention'" in message and "full_attention" in message and "sliding_attention" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**QWEN3, "layer_types": ["full_attention"] * 3}, ("layer_types", "3", "28")),
        ({**GEMMA3_TEXT, "layer_types": ["full_attention"] * 3}, ("layer_types", "3", "26")),
        ({**SMOLLM3, "no_rope_layers": [1, 0]}, ("no_rope_layers", "2", "36")),
        ({**GPT2, "add_cross_attention": True}, ("add_cross_attention", "True")),
        ({**GEMMA3_TEXT, "use_bidirectional_attention": True}, ("use_bidirectional_attention", "True")),
        ({**GEMMA2, "use_bidirectional_attention": True}, ("use_bidirectional_attention", "True")),
        ({**GEMMA, "use_bidirectional_attention": True}, ("use_bidirectional_attention", "True")),
        (scaled(PHI3_128K, short_factor=[1.0, 2.0]), ("short_factor", "2", "48")),
        (scaled(PHI4_MINI, long_factor=[1.0] * 64), ("long_factor", "64", "48")),
        ({**LLAMA32, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("low_freq_factor",)),
        ({**LLAMA2, "rope_scaling": {"rope_type": "linear"}}, ("factor",)),
        ({**LLAMA2, "rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ("factor",)),
        ({**LLAMA2, "num_key_value_heads": 5}, ("num_key_value_heads", "5", "32")),
        ({**STABLELM2, "num_key_value_heads": 7}, ("num_key_value_heads", "7", "32")),
        ({**STABLELM2, "partial_rotary_factor": 0.0}, ("0 features", "even number")),
        ({**MISTRAL, "sliding_window": 0}, ("window", "1 or more")),
        ({**GEMMA2, "final_logit_softcapping": 0.0}, ("logit_softcap", "above 0")),
        ({**LLAMA2, "tie_word_embeddings": "false"}, ("tie_word_embeddings", "true or false")),
        ({**LLAMA2, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ("full_attention", "same for all")),
        (without(OPT, "ffn_dim"), ("ffn_dim",)),
        (without(PYTHIA, "intermediate_size"), ("intermediate_size",)),
        (without(OLMO2, "hidden_size"), ("hidden_size",)),
        (without(PHI3, "num_hidden_layers"), ("num_hidden_layers",)),
        (without(GEMMA3, "text_config"), ("hidden_size",)),
        ({**GEMMA3, "text_config": {"model_type": "gemma3_text"}}, ("hidden_size",)),
    ],
)
def test_what_a_family_cannot_do_is_named(fields: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    message = refusal(fields, tmp_path)
    for word in words:
        assert word in message, message


WRONG = st.one_of(
    st.sampled_from([0, -1, 0.5, 1e400, -1e400, float("nan"), 10**400, 2**31 - 1, 2**32 - 1, True, "", "x", None]),
    st.sampled_from([[], {}, [1], ["x"], [[]], {"x": 1}, {"full_attention": 3}, {"type": "linear", "factor": 0}]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_of_any_field_is_refused_in_a_sentence_or_describes_a_decoder(
    tmp_path: Path, data: st.DataObject
) -> None:
    """The folder holds no weights, so what describes a decoder is refused for that, and by nothing but a sentence."""
    fields = data.draw(st.sampled_from([*PUBLISHED.values()]))
    section = data.draw(st.sampled_from([k for k, v in fields.items() if isinstance(v, dict)] or [""]))
    field = data.draw(st.sampled_from([*fields, "rope_parameters", "quantization_config", "layer_types"]))
    value = data.draw(WRONG)
    if section and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from([*fields[section]] or ["factor"]))
        fields = {**fields, section: {**fields[section], inner: value}}
    else:
        fields = {**fields, field: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    try:
        with pytest.raises(UserError, match="no weight file"):
            load_lm(str(tmp_path))
    except AssertionError as refused:  # another sentence
        assert str(tmp_path) in str(refused)
        return
    fields = json.loads((tmp_path / "config.json").read_text())
    config = family_of_hf(fields, "here").config_from_hf(fields, "here")
    for kind in config.layer_kinds:
        frequencies = rotary_frequencies(config, kind.rope) if kind.rope else np.zeros(())
        assert np.isfinite(frequencies).all()
