"""The Llama family (arXiv 2302.13971, 2307.09288, 2407.21783; SmolLM2): RMSNorm, rotary positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig, RopeScaling
from spt_jax.models.family import (
    AS_STORED,
    FLAT,
    Family,
    Layout,
    Shape,
    TensorRule,
    TensorTable,
    linear,
    refuse_unless,
    required,
)

_ROPE_TYPES = ("default", "linear", "llama3")


def _rope_scaling(rope: Mapping[str, Any], max_positions: int, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UserError(f"{where}: rope_type is {kind!r}, which is not supported; supported: {', '.join(_ROPE_TYPES)}")
    refuse_unless(rope, "partial_rotary_factor", (None, 1, 1.0), where)
    if kind == "default":
        return None
    factor = float(required(rope, "factor", where))
    if kind == "linear":
        return RopeScaling("linear", factor)
    return RopeScaling(
        "llama3",
        factor,
        low_freq_factor=float(required(rope, "low_freq_factor", where)),
        high_freq_factor=float(required(rope, "high_freq_factor", where)),
        original_max_position_embeddings=int(rope.get("original_max_position_embeddings") or max_positions),
    )


def config_from_hf(fields: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads a ``config.json`` of transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``).

    Raises:
        UserError: A field is missing, or says something the decoder cannot do.
    """
    refuse_unless(fields, "hidden_act", ("silu", "swish"), where)
    refuse_unless(fields, "partial_rotary_factor", (None, 1, 1.0), where)
    refuse_unless(fields, "sliding_window", (None,), where)
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unnamed")
        raise UserError(
            f"{where}: the weights are quantised by {method!r}, which is not supported; "
            "give the unquantised folder or a GGUF file"
        )
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    max_positions = int(required(fields, "max_position_embeddings", where))
    heads = int(required(fields, "num_attention_heads", where))
    hidden_size = int(required(fields, "hidden_size", where))
    return DecoderConfig(
        vocab_size=int(required(fields, "vocab_size", where)),
        hidden_size=hidden_size,
        intermediate_size=int(required(fields, "intermediate_size", where)),
        num_layers=int(required(fields, "num_hidden_layers", where)),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("num_key_value_heads") or heads),
        head_dim=int(fields.get("head_dim") or hidden_size // heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope, max_positions, where),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        attention_bias=bool(fields.get("attention_bias", False)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


def config_from_gguf(fields: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> DecoderConfig:
    """Reads the ``llama.*`` metadata; ties and biases show in which tensors the file holds.

    Llama 3's scaled frequencies are not described in a GGUF file but stored as the tensor ``rope_freqs.weight``: its
    reader puts the values into the metadata as ``rope_freqs``.

    Raises:
        UserError: A field is missing, or says something the decoder cannot do.
    """
    refuse_unless(fields, "llama.expert_count", (0,), where)
    refuse_unless(fields, "llama.attention.sliding_window", (0,), where)
    heads = int(required(fields, "llama.attention.head_count", where))
    hidden_size = int(required(fields, "llama.embedding_length", where))
    head_dim = int(fields.get("llama.attention.key_length") or hidden_size // heads)
    refuse_unless(fields, "llama.attention.value_length", (head_dim,), where)
    refuse_unless(fields, "llama.rope.dimension_count", (head_dim,), where)
    table = shapes.get("token_embd.weight")
    if table is None:
        raise UserError(f"{where} holds no tensor 'token_embd.weight'; the file is incomplete")
    scaling = None
    kind = fields.get("llama.rope.scaling.type", "none")
    if "rope_freqs" in fields:
        scaling = RopeScaling("factors", 1.0, factors=tuple(float(x) for x in fields["rope_freqs"]))
    elif kind == "linear":
        scaling = RopeScaling("linear", float(required(fields, "llama.rope.scaling.factor", where)))
    if kind not in ("none", "linear") or (kind == "linear" and "rope_freqs" in fields):
        raise UserError(f"{where}: rope scaling is {kind!r}, which is not supported here; supported: none, linear")
    return DecoderConfig(
        vocab_size=table[0],
        hidden_size=hidden_size,
        intermediate_size=int(required(fields, "llama.feed_forward_length", where)),
        num_layers=int(required(fields, "llama.block_count", where)),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("llama.attention.head_count_kv") or heads),
        head_dim=head_dim,
        max_position_embeddings=int(required(fields, "llama.context_length", where)),
        rms_norm_eps=float(required(fields, "llama.attention.layer_norm_rms_epsilon", where)),
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
    )


def _rotate_half_rows(stored: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's order of a head's rows (pairs interleaved) for the rotate-half order (pairs half a head apart)."""
    rows, *rest = stored.shape
    return stored.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(stored.shape)


_LINEAR = linear()
_GGUF_ROTATED = Layout(
    _LINEAR.stored_shape, lambda array, ours: _LINEAR.arrange(_rotate_half_rows(array, ours[-2]), ours)
)
_GGUF_ROTATED_BIAS = Layout(
    FLAT.stored_shape, lambda array, ours: FLAT.arrange(_rotate_half_rows(array, ours[-2]), ours)
)

_BLOCK = (  # our module, transformers' name, GGUF's name, layout of the kernel
    ("attention/q_proj", "self_attn.q_proj", "attn_q", _LINEAR),
    ("attention/k_proj", "self_attn.k_proj", "attn_k", _LINEAR),
    ("attention/v_proj", "self_attn.v_proj", "attn_v", _LINEAR),
    ("attention/o_proj", "self_attn.o_proj", "attn_output", linear(num_inputs=2)),
    ("mlp/gate_proj", "mlp.gate_proj", "ffn_gate", _LINEAR),
    ("mlp/up_proj", "mlp.up_proj", "ffn_up", _LINEAR),
    ("mlp/down_proj", "mlp.down_proj", "ffn_down", _LINEAR),
)
_NORMS = (
    ("input_norm", "input_layernorm", "attn_norm"),
    ("post_attention_norm", "post_attention_layernorm", "ffn_norm"),
)


def _hf_rules() -> tuple[TensorRule, ...]:
    block = "model.layers.{layer}."
    return (
        TensorRule("embed_tokens", "model.embed_tokens.weight", AS_STORED),
        *(TensorRule(f"layers/{ours}/scale", f"{block}{hf}.weight", AS_STORED) for ours, hf, _ in _NORMS),
        *(TensorRule(f"layers/{ours}/kernel", f"{block}{hf}.weight", layout) for ours, hf, _, layout in _BLOCK),
        *(TensorRule(f"layers/{ours}/bias", f"{block}{hf}.bias", FLAT) for ours, hf, _, _ in _BLOCK),
        TensorRule("final_norm/scale", "model.norm.weight", AS_STORED),
        TensorRule("lm_head", "lm_head.weight", _LINEAR),
    )


def _gguf_rules() -> tuple[TensorRule, ...]:
    rotated = ("attn_q", "attn_k")
    block = "blk.{layer}."
    rules = [
        TensorRule("embed_tokens", "token_embd.weight", AS_STORED),
        *(TensorRule(f"layers/{ours}/scale", f"{block}{gguf}.weight", AS_STORED) for ours, _, gguf in _NORMS),
    ]
    for ours, _, gguf, layout in _BLOCK:
        kernel, bias = (_GGUF_ROTATED, _GGUF_ROTATED_BIAS) if gguf in rotated else (layout, FLAT)
        rules.append(TensorRule(f"layers/{ours}/kernel", f"{block}{gguf}.weight", kernel))
        rules.append(TensorRule(f"layers/{ours}/bias", f"{block}{gguf}.bias", bias))
    rules.append(TensorRule("final_norm/scale", "output_norm.weight", AS_STORED))
    rules.append(TensorRule("lm_head", "output.weight", _LINEAR))
    return tuple(rules)


LLAMA = Family(
    name="Llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    gguf_architectures=("llama",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    hf=TensorTable(
        rules=_hf_rules(),
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
        tied_head=("lm_head.weight", "model.embed_tokens.weight"),
    ),
    gguf=TensorTable(
        rules=_gguf_rules(),
        ignored=(r"rope_freqs\.weight",),
        tied_head=("output.weight", "token_embd.weight"),
    ),
)
