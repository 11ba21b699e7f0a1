"""Random small Llamas: our logits against transformers' torch model, from the files it saves."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.loading import load_lm

pytestmark = pytest.mark.torch
TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
CASES: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2, "shards": True},
    "multi-query, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 2},
    "saved in bfloat16": {"num_key_value_heads": 2, "bfloat16": True, "tie_word_embeddings": True},
}
LENGTHS = (26, 12, 21)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, embeddings, positions, valid, cache=None):
    hidden, cache = decode(config, params, embeddings, positions, valid, cache)
    return vocabulary_logits(config, params, hidden), cache


def random_torch_llama(case: dict[str, Any]) -> tuple[Any, bool]:
    """A model whose every parameter is random (norms and biases too) and whose logits spread by about one."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    case = dict(case)
    shards, half = case.pop("shards", False), case.pop("bfloat16", False)
    sizes = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    config = LlamaConfig(
        **{**sizes, "num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.12, **case}
    )
    torch.manual_seed(11)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    return (model.to(torch.bfloat16) if half else model), shards


def torch_logits(model: Any, embeddings: np.ndarray, positions: np.ndarray, valid: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(
            inputs_embeds=torch.tensor(embeddings),
            attention_mask=torch.tensor(valid.astype(np.int64)),
            position_ids=torch.tensor(positions, dtype=torch.int64),
        ).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(
    name: str, tmp_path: Path, tokenizer_files: Callable[[Path], None], record_property: Callable[[str, object], None]
) -> None:
    model, sharded = random_torch_llama(CASES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "5GB")
    tokenizer_files(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    lm = load_lm(str(tmp_path))
    model = type(model).from_pretrained(tmp_path, dtype="float32").eval()

    generator = np.random.default_rng(5)
    tokens = [generator.integers(0, 261, length) for length in LENGTHS]
    prompts = generator.normal(0, 0.3, (3, 4, 64)).astype(np.float32)
    table = model.get_input_embeddings().weight.detach().numpy()
    differences = {}

    text = generator.integers(0, 261, (3, 30))
    steps = np.tile(np.arange(30), (3, 1))
    expected = torch_logits(model, table[text], steps, steps >= 0)
    assert expected.std() > 0.3, "logits this small would prove nothing"
    found, _ = run(lm.config, lm.params, embed(lm.config, lm.params, jnp.asarray(text)), steps, steps >= 0)
    differences["text"] = np.abs(found - expected).max()

    rows = [np.concatenate([prompt, table[text]]) for prompt, text in zip(prompts, tokens, strict=True)]
    for side in ("right", "left"):
        batch, positions, valid = np.zeros((3, 30, 64), np.float32), np.zeros((3, 30), int), np.zeros((3, 30), bool)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(30 - len(row), 30)
            batch[i, place], positions[i, place], valid[i, place] = row, np.arange(len(row)), True
        expected = torch_logits(model, batch, positions, valid)
        found, _ = run(lm.config, lm.params, batch, positions, valid)
        differences[f"prompts, {side} padding"] = np.abs(np.asarray(found) - expected)[valid].max()
        if side == "left":
            continue
        cache = KVCache.empty(lm.config, 3, 30)
        found, cache = run(lm.config, lm.params, batch[:, :16], positions[:, :16], valid[:, :16], cache)
        worst = np.abs(np.asarray(found) - expected[:, :16])[valid[:, :16]].max()
        for t in range(16, 30):
            now = slice(t, t + 1)
            found, cache = run(lm.config, lm.params, batch[:, now], positions[:, now], valid[:, now], cache)
            worst = max(worst, np.abs(np.asarray(found) - expected[:, now])[valid[:, now]].max(initial=0))
        differences["cached"] = worst

    for what, difference in differences.items():
        record_property(what, float(difference))
    print(f"{name}: {', '.join(f'{what} {difference:.1e}' for what, difference in differences.items())}")
    assert max(differences.values()) <= TOLERANCE


def test_a_config_of_transformers_4_and_of_5_mean_the_same(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig

    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    folder = make_llama(rope_scaling=old, rope_theta=500_000.0).write_folder(tmp_path / "old")
    before = load_lm(str(folder)).config
    LlamaConfig.from_pretrained(folder).save_pretrained(folder)
    assert "rope_parameters" in (folder / "config.json").read_text()
    assert load_lm(str(folder)).config == before
    assert before.rope_scaling is not None and before.rope_scaling.kind == "llama3"
