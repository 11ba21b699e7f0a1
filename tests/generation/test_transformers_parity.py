from __future__ import annotations

import jax
import numpy as np
import pytest

from spt_jax.generation.engine import GenerationEngine
from spt_jax.models.decoder import random_params
from spt_jax.models.decoder_config import DecoderConfig

NEW = 12
EOS = 5


def torch_llama(config: DecoderConfig, params):
    """The same weights in transformers' Llama."""
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
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=EOS,
            pad_token_id=0,
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
        state[f"{name}.input_layernorm.weight"] = block["input_norm"]["scale"]
        state[f"{name}.post_attention_layernorm.weight"] = block["post_attention_norm"]["scale"]
    model.load_state_dict({key: torch.tensor(np.array(value)) for key, value in state.items()})
    return model


@pytest.mark.torch
def test_greedy_rows_equal_transformers_generate_with_input_embeddings():
    torch = pytest.importorskip("torch")
    config = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    params = random_params(config, jax.random.key(3))
    params = {**params, "embed_tokens": params["embed_tokens"] * 10, "lm_head": params["lm_head"] * 50}
    bank = jax.random.normal(jax.random.key(4), (4, 3, 32))
    generator = np.random.default_rng(0)
    contexts = [generator.integers(6, 97, length).tolist() for length in generator.integers(1, 30, 24)]
    selected = generator.integers(0, 4, 24).tolist()
    model = torch_llama(config, params)

    engine = GenerationEngine(config, params, eos_ids=[EOS], pad_id=0, max_batch=16, length_multiple=32)
    rows = engine.generate(bank, contexts, selected, max_new_tokens=NEW)

    close = 0
    for row, context, prompt in zip(rows, contexts, selected, strict=True):
        text = model.get_input_embeddings()(torch.tensor([context]))
        embeddings = torch.cat([torch.tensor(np.asarray(bank[prompt]))[None], text], dim=1)
        output = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        expected = output.sequences[0].tolist()
        best = torch.stack(output.logits).topk(2, dim=-1).values
        if float((best[..., 0] - best[..., 1]).min()) < 1e-4:
            close += 1
        else:
            assert row == [token for token in expected if token != EOS]
    assert close <= 2, f"{close} of 24 rows have near ties: nothing would be compared"
    assert any(len(row) < NEW for row in rows), "some row should end by itself"
