"""OPT (arXiv 2205.01068), GPT-2 and GPT-NeoX (arXiv 2204.06745): LayerNorm, plain MLPs, biases."""

from __future__ import annotations

from typing import Any

from spt_jax.models.decoder_config import LayerKind
from spt_jax.models.families.family import Family
from spt_jax.models.families.hf_config import HFConfig
from spt_jax.models.families.llama import llama_like
from spt_jax.models.families.tensor_tables import gpt2_tensors, neox_tensors, opt_tensors


def _opt(c: HFConfig) -> dict[str, Any]:
    heads, hidden_size = c.integer("num_attention_heads"), c.integer("hidden_size")
    width = c.integer("word_embed_proj_dim", hidden_size)
    before, biased = c.flag("do_layer_norm_before", True), c.flag("enable_bias", True)
    return {
        "vocab_size": c.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": c.integer("ffn_dim"),
        "num_layers": c.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "max_position_embeddings": c.integer("max_position_embeddings"),
        "embedding_size": None if width == hidden_size else width,
        "position_embedding": "learned",
        "position_offset": 2,
        "layer_kinds": (LayerKind(rope=None),),
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_affine": c.flag("layer_norm_elementwise_affine", True),
        "norm_placement": "input" if before else "sum",
        "final_norm": before and not c.flag("_remove_final_layer_norm", False),
        "activation": c.activation("activation_function", default="relu"),
        "gated_mlp": False,
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": biased,
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
    }


OPT = Family("OPT", ("opt",), ("OPTForCausalLM",), _opt, opt_tensors())


def _gpt2(c: HFConfig) -> dict[str, Any]:
    heads, hidden_size = c.integer("n_head"), c.integer("n_embd")
    return {
        "vocab_size": c.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": c.integer("n_inner", 4 * hidden_size),
        "num_layers": c.layers("n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "max_position_embeddings": c.integer("n_positions"),
        "embedding_dropout": True,
        "position_embedding": "learned",
        "layer_kinds": (LayerKind(rope=None),),
        "norm": "layer",
        "norm_eps": c.number("layer_norm_epsilon", 1e-5),
        "attention_scale": None if c.flag("scale_attn_weights", True) else 1.0,
        "attention_scale_by_layer": c.flag("scale_attn_by_inverse_layer_idx", False),
        "activation": c.activation("activation_function", default="gelu_new"),
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
    }


GPT2 = Family("GPT-2", ("gpt2",), ("GPT2LMHeadModel",), _gpt2, gpt2_tensors())


def _neox(c: HFConfig) -> dict[str, Any]:
    biased = c.flag("attention_bias", True)
    theta, share = c.number("rotary_emb_base", 10_000.0), c.number("rotary_pct", 0.25)
    return {
        **llama_like(c.with_defaults(partial_rotary_factor=share), theta, partial=True),
        "embedding_dropout": True,
        "norm": "layer",
        "norm_eps": c.number("layer_norm_eps", 1e-5),
        "parallel_residual": "two norms" if c.flag("use_parallel_residual", True) else None,
        "activation": c.activation("hidden_act", default="gelu"),
        "gated_mlp": False,
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": True,
    }


NEOX = Family("GPT-NeoX", ("gpt_neox",), ("GPTNeoXForCausalLM",), _neox, neox_tensors())
