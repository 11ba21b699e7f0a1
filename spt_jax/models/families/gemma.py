"""Gemma 1, 2 and 3 (arXiv 2403.08295, 2408.00118, 2503.19786)."""

from __future__ import annotations

from typing import Any

from spt_jax.models.decoder_config import LayerKind, Rope
from spt_jax.models.families.family import Family
from spt_jax.models.families.gguf_config import GGUFConfig
from spt_jax.models.families.hf_config import HFConfig, layers_of
from spt_jax.models.families.llama import FULL, SLIDING, biases_of, llama_like, window_of
from spt_jax.models.families.tensor_tables import GEMMA2_NORMS, gguf_tensors, llama_tensors


def _gemma(c: HFConfig) -> dict[str, Any]:
    activation = c.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    fields = {**llama_like(c.with_defaults(head_dim=256), tied=True), **biases_of(c), "mlp_bias": False}
    return {
        **fields,
        "activation": "gelu_tanh" if activation == "gelu" else activation,  # the first release misnamed it
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "norm_plus_one": True,
    }


def _gemma2(c: HFConfig) -> dict[str, Any]:
    c = c.with_defaults(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    fields = {**_gemma(c), "activation": c.activation("hidden_activation", default="gelu_pytorch_tanh")}
    rope, layers = fields["layer_kinds"][0].rope, fields["num_layers"]
    types = [FULL if i % 2 else SLIDING for i in range(layers)]
    return {
        **fields,
        **layers_of([LayerKind(rope, w) for w in c.windows(layers, window_of(c, 4096), types)]),
        "norm_placement": "both",
        "attention_scale": c.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": c.optional("attn_logit_softcapping"),
        "logit_softcap": c.optional("final_logit_softcapping"),
    }


def _gemma3(c: HFConfig) -> dict[str, Any]:
    if "text_config" in c.fields:  # the language model inside a multimodal one
        c = c.section("text_config")
        c.refuse_what_no_family_can()
    c = c.with_defaults(
        vocab_size=262_208,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        final_logit_softcapping=None,
    )
    c.refuse_unless("attn_logit_softcapping")
    fields = _gemma2(HFConfig({**c.fields, "rope_parameters": None, "rope_scaling": None}, c.where))
    layers, every = fields["num_layers"], c.integer("sliding_window_pattern", 6)
    types = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    windows = c.windows(layers, window_of(c, 4096), types)
    kinds = {FULL: c.rope(1_000_000.0, layer_type=FULL), SLIDING: _local_rope(c)}
    types = c.fields.get("layer_types") or types
    return {
        **fields,
        **layers_of([LayerKind(kinds[kind], w) for kind, w in zip(types, windows, strict=True)]),
        "query_key_norm": "head",
        "attention_softcap": None,
    }


def _local_rope(c: HFConfig) -> Rope:
    """Gemma 3's local layers: a base of their own and no scaling, however the file spells it."""
    base = c.number("rope_local_base_freq", 10_000.0)
    nested = c.section("rope_parameters").fields.get(SLIDING)
    return HFConfig({**c.fields, "rope_scaling": nested, "rope_theta": base, "rope_parameters": None}, c.where).rope()


def _gguf_gemma(g: GGUFConfig, theta: float, window: int, period: int, *, widest: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share.

    Args:
        g: The metadata.
        theta: Base of the rotation where the file names none.
        window: The window where the file names none.
        period: Every n-th layer sees everything.
        widest: The layers of the 27B model: its queries are scaled by M / H, the others' by the head's width. The
            files do not say; llama.cpp knows it by the layers too.
    """
    fields, whole = g.sizes(), g.rope(theta)
    by_width = fields["num_layers"] == widest
    scale = fields["hidden_size"] // fields["num_attention_heads"] if by_width else fields["head_dim"]
    local = _gguf_local_rope(g, whole)
    kinds = [LayerKind(whole if seen is None else local, seen) for seen in g.windows(window, period)]
    return {
        **fields,
        **layers_of(kinds),
        "activation": "gelu_tanh",
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "norm_plus_one": True,
        "norm_placement": "both",
        "attention_scale": scale**-0.5,
    }


def _gguf_local_rope(g: GGUFConfig, whole: Rope) -> Rope:
    """The rotation of layers with a window: Gemma 3's has a base of its own and no scaling."""
    if g.architecture == "gemma3":
        return Rope(float(g.get("rope.freq_base_swa", 10_000.0)))
    return Rope(float(g.get("rope.freq_base_swa", whole.theta)), whole.scaling)


def _gguf_gemma2(g: GGUFConfig) -> dict[str, Any]:
    return {
        **_gguf_gemma(g, 10_000.0, 4096, 2, widest=46),
        "attention_softcap": g.get("attn_logit_softcapping", 50.0) or None,
        "logit_softcap": g.get("final_logit_softcapping", 30.0) or None,
    }


def _gguf_gemma3(g: GGUFConfig) -> dict[str, Any]:
    g.refuse_unless("attn_logit_softcapping", 0.0)
    return {
        **_gguf_gemma(g, 1_000_000.0, 0, 6, widest=62),
        "query_key_norm": "head",
        "logit_softcap": g.get("final_logit_softcapping") or None,
    }


GEMMA = Family("Gemma", ("gemma",), ("GemmaForCausalLM",), _gemma, llama_tensors())
GEMMA2 = Family(
    "Gemma 2",
    ("gemma2",),
    ("Gemma2ForCausalLM",),
    _gemma2,
    llama_tensors(GEMMA2_NORMS),
    ("gemma2",),
    _gguf_gemma2,
    gguf_tensors(plus_one=True),
)
GEMMA3 = Family(
    "Gemma 3",
    ("gemma3_text", "gemma3"),
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    _gemma3,
    llama_tensors(
        GEMMA2_NORMS,
        prefixes=("model.", "language_model.model.", "model.language_model.", ""),
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        heads=("lm_head.weight", "language_model.lm_head.weight"),
    ),
    ("gemma3",),
    _gguf_gemma3,
    gguf_tensors(plus_one=True),
)
