"""Llama and the families that keep most of it: SmolLM3, Mistral, Qwen, OLMo 2, StableLM 2, Phi-3."""

from __future__ import annotations

from typing import Any

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import LayerKind
from spt_jax.models.families.family import Family
from spt_jax.models.families.gguf_config import GGUFConfig
from spt_jax.models.families.hf_config import HFConfig, layers_of, rotated
from spt_jax.models.families.tensor_tables import OLMO2_NORMS, gguf_tensors, llama_tensors, phi3_tensors

FULL, SLIDING = "full_attention", "sliding_attention"


def llama_like(
    c: HFConfig, theta: float = 10_000.0, *, eps: float = 1e-6, tied: bool = False, partial: bool = False
) -> dict[str, Any]:
    """What most families keep of Llama: RMSNorm, rotary positions, a gated SiLU MLP, one kind of layer.

    Args:
        c: The file.
        theta: The rotation's base where the file names none.
        eps: The norms' epsilon, likewise.
        tied: Whether the head is tied, likewise.
        partial: Whether the family may rotate a part of each head.
    """
    if not partial:
        for fields in (c, c.rope_parameters()):
            fields.refuse_unless("partial_rotary_factor", 1.0)
    rope = c.rope(theta)
    share = c.rope_parameters().number("partial_rotary_factor", c.number("partial_rotary_factor", 1.0))
    sizes = c.sizes()
    return {
        **sizes,
        **rotated(sizes["head_dim"], share),
        "layer_kinds": (LayerKind(rope),),
        "norm_eps": c.number("rms_norm_eps", eps),
        "activation": c.activation("hidden_act", default="silu"),
        "tie_word_embeddings": c.flag("tie_word_embeddings", tied),
    }


def window_of(c: HFConfig, default: float | None = None) -> int | None:
    """``sliding_window``: null is none, absent is transformers' default."""
    if "sliding_window" in c.fields:
        return None if c.fields["sliding_window"] is None else c.integer("sliding_window")
    return None if default is None else int(default)


def biases_of(c: HFConfig) -> dict[str, bool]:
    """Llama's two switches."""
    attention = c.flag("attention_bias", False)
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": c.flag("mlp_bias", False)}


def _llama(c: HFConfig) -> dict[str, Any]:
    c.refuse_unless("sliding_window")
    return {**llama_like(c.with_defaults(max_position_embeddings=2048)), **biases_of(c)}


def gguf_llama(g: GGUFConfig) -> dict[str, Any]:
    """What every architecture of GGUF spells alike, with one rotation for all layers."""
    rope = g.rope()
    return {**g.sizes(), **layers_of([LayerKind(rope, window) for window in g.windows()])}


def _gguf_llama(g: GGUFConfig) -> dict[str, Any]:
    """Mistral's files too; they say nothing of the first release's window, and llama.cpp has none for them."""
    fields = gguf_llama(g)
    # Rows of queries and keys are stored in an order that goes with whole heads rotated.
    g.refuse_unless("rope.dimension_count", fields["head_dim"])
    return fields


LLAMA = Family(
    "Llama",
    ("llama",),
    ("LlamaForCausalLM", "LLaMAForCausalLM"),
    _llama,
    llama_tensors(),
    ("llama",),
    _gguf_llama,
    gguf_tensors(interleaved=True),
)


def _smollm3(c: HFConfig) -> dict[str, Any]:
    fields = {**llama_like(c, 2_000_000.0, tied=True), **biases_of(c)}
    layers, rope = fields["num_layers"], fields["layer_kinds"][0].rope
    every = c.integer("no_rope_layer_interval", 4)
    rotating = c.fields.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if len(rotating) != layers:
        raise UserError(f"{c.where}: no_rope_layers names {len(rotating)} layers; num_hidden_layers is {layers}")
    window = window_of(c) if c.flag("use_sliding_window", False) else None
    types = [FULL if turns or window is None else SLIDING for turns in rotating]
    windows = c.windows(layers, window, types)
    kinds = [LayerKind(rope if turns else None, w) for turns, w in zip(rotating, windows, strict=True)]
    return {**fields, **layers_of(kinds)}


SMOLLM3 = Family("SmolLM3", ("smollm3",), ("SmolLM3ForCausalLM",), _smollm3, llama_tensors())


def _mistral(c: HFConfig) -> dict[str, Any]:
    c.refuse_unless("layer_types")
    fields = llama_like(c)
    return {**fields, "layer_kinds": (LayerKind(fields["layer_kinds"][0].rope, window_of(c, 4096)),)}


MISTRAL = Family("Mistral", ("mistral",), ("MistralForCausalLM",), _mistral, llama_tensors())


def _alternating(c: HFConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen's windows: on the layers from ``max_window_layers`` on, when they are in use at all."""
    window = window_of(c, 4096) if c.flag("use_sliding_window", False) else None
    layers, first = fields["num_layers"], c.integer("max_window_layers", 28)
    types = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    rope = fields["layer_kinds"][0].rope
    return layers_of([LayerKind(rope, w) for w in c.windows(layers, window, types)])


def _qwen2(c: HFConfig) -> dict[str, Any]:
    fields = llama_like(c)
    return {**fields, **_alternating(c, fields), "qkv_bias": True}


def _qwen3(c: HFConfig) -> dict[str, Any]:
    fields = llama_like(c.with_defaults(head_dim=128))
    attention = c.flag("attention_bias", False)
    biases = {"qkv_bias": attention, "output_bias": attention}
    return {**fields, **_alternating(c, fields), **biases, "query_key_norm": "head"}


def _gguf_qwen(g: GGUFConfig) -> dict[str, Any]:
    if g.get("attention.sliding_window_pattern") is None:
        g.refuse_unless("attention.sliding_window", 0)  # Qwen's are on some layers, which it alone does not tell
    normed = "head" if "blk.0.attn_q_norm.weight" in g.shapes else None
    return {**gguf_llama(g), "query_key_norm": normed}


QWEN2 = Family(
    "Qwen2",
    ("qwen2",),
    ("Qwen2ForCausalLM",),
    _qwen2,
    llama_tensors(),
    ("qwen2",),
    _gguf_qwen,
    gguf_tensors(),
)
QWEN3 = Family(
    "Qwen3",
    ("qwen3",),
    ("Qwen3ForCausalLM",),
    _qwen3,
    llama_tensors(),
    ("qwen3",),
    _gguf_qwen,
    gguf_tensors(),
)


def _olmo2(c: HFConfig) -> dict[str, Any]:
    fields = {**llama_like(c, eps=1e-5), **biases_of(c), "mlp_bias": False}
    return {**fields, "norm_placement": "output", "query_key_norm": "width"}


OLMO2 = Family("OLMo 2", ("olmo2",), ("Olmo2ForCausalLM",), _olmo2, llama_tensors(OLMO2_NORMS))


def _stablelm(c: HFConfig) -> dict[str, Any]:
    return {
        **llama_like(c.with_defaults(partial_rotary_factor=0.25), partial=True),
        "norm": "layer",
        "norm_eps": c.number("layer_norm_eps", 1e-5),
        "qkv_bias": c.flag("use_qkv_bias", False),
        "query_key_norm": "each head" if c.flag("qk_layernorm", False) else None,
        "parallel_residual": "one norm" if c.flag("use_parallel_residual", False) else None,
    }


STABLELM = Family(
    "StableLM",
    ("stablelm",),
    ("StableLmForCausalLM",),
    _stablelm,
    llama_tensors(query_key_norm="self_attn.{which}_layernorm.norms.{head}"),
)


def _phi3(c: HFConfig) -> dict[str, Any]:
    # A field of the whole file here, which wins over one beside the factors.
    original = {"original_max_position_embeddings": c.integer("original_max_position_embeddings", 4096)}
    rope = {**c.rope_parameters().fields, **original}
    kind = rope.pop("type", None) or rope.get("rope_type", "default")
    rope["rope_type"] = "longrope" if kind in ("su", "yarn") else kind  # names of the first releases
    fields = llama_like(
        HFConfig({**c.fields, "rope_scaling": None, "rope_parameters": rope}, c.where), eps=1e-5, partial=True
    )
    return {**fields, "layer_kinds": (LayerKind(fields["layer_kinds"][0].rope, window_of(c)),)}


PHI3 = Family(
    "Phi-3",
    ("phi3",),
    ("Phi3ForCausalLM",),
    _phi3,
    phi3_tensors(),
    ("phi3",),
    gguf_llama,
    gguf_tensors(joined=True),
)
