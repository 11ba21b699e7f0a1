"""Our weights in the reference implementation; torch is imported only when it is asked for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from spt_jax.models.decoder_config import DecoderConfig


def torch_llama(config: DecoderConfig, params: Any, eos_id: int = 2) -> Any:
    """The weights `params` in transformers' Llama, frozen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=eos_id,
            pad_token_id=0,
            attn_implementation="eager",
        )
    ).eval()

    width = config.hidden_size
    layers = jax.tree.map(np.asarray, params["layers"])
    state = {
        "model.embed_tokens.weight": params["embed_tokens"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["lm_head"].T,
    }
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf: leaf[layer], layers)  # noqa: B023 - used at once
        name = f"model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj"):
            state[f"{name}.self_attn.{part}.weight"] = block["attention"][part]["kernel"].reshape(width, -1).T
        state[f"{name}.self_attn.o_proj.weight"] = block["attention"]["o_proj"]["kernel"].reshape(-1, width).T
        for part in ("gate_proj", "up_proj", "down_proj"):
            state[f"{name}.mlp.{part}.weight"] = block["mlp"][part]["kernel"].T
        state[f"{name}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        state[f"{name}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
    model.load_state_dict({key: torch.tensor(np.array(value)) for key, value in state.items()})
    return model.requires_grad_(False)
