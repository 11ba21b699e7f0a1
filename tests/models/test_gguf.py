"""GGUF files give the same LM as the folder they were made from; what cannot be read is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.gguf_file import GGUFFile
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.models.rotary import rotary_frequencies

Make = Callable[..., Any]


@functools.partial(jax.jit, static_argnums=0)
def forward(config: DecoderConfig, params: FrozenTree, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decode(config, params, embed(config, params, tokens), positions, positions >= 0)
    return vocabulary_logits(config, params, hidden)


def logits(lm: LanguageModel) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 259, (2, 24))
    return np.asarray(forward(lm.config, lm.params, jnp.asarray(tokens)))


def frequencies(lm: Any) -> np.ndarray:
    [kind] = lm.config.layer_kinds
    return rotary_frequencies(lm.config, kind.rope)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_float32_gguf_gives_the_folders_logits(changes: dict[str, Any], make_llama: Make, tmp_path: Path) -> None:
    files = make_llama(**changes)
    folder = load_lm(str(files.write_folder(tmp_path / "hf")))
    single = load_lm(str(files.write_gguf(tmp_path / "m.gguf")))
    assert single.config == folder.config
    np.testing.assert_array_equal(logits(single), logits(folder))
    assert single.tokenizer.encode(["héllo abc 12"]) == folder.tokenizer.encode(["héllo abc 12"])
    assert single.tokenizer.fingerprint == folder.tokenizer.fingerprint


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_quantised_gguf_gives_the_dequantised_folders_logits(
    quantisation: str, make_llama: Make, tmp_path: Path
) -> None:
    files = make_llama()
    single = load_lm(str(files.write_gguf(tmp_path / "m.gguf", quantisation=quantisation)))
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, value in files.tensors.items():  # rows are quantised one by one, so their order does not matter
        if value.ndim == 2:
            files.tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
    folder = load_lm(str(files.write_folder(tmp_path / "hf")))
    np.testing.assert_array_equal(logits(single), logits(folder))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_types_the_package_only_dequantises_are_read(kind: str, tmp_path: Path) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    stored = np.random.default_rng(0).integers(0, 64, (3, 2 * 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.shapes["x"] == (3, 512)
    np.testing.assert_array_equal(file.read("x"), gguf.quants.dequantize(stored, quantisation))


def test_stored_rope_factors_stretch_the_frequencies(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    }
    plain = load_lm(str(files.write_folder(tmp_path / "plain")))
    scaled = load_lm(str(make_llama(rope_scaling=llama3).write_folder(tmp_path / "scaled")))
    files.tensors["rope_freqs.weight"] = (frequencies(plain) / frequencies(scaled)).astype(np.float32)
    single = load_lm(str(files.write_gguf(tmp_path / "m.gguf")))
    [kind] = single.config.layer_kinds
    assert kind.rope is not None and kind.rope.scaling is not None and kind.rope.scaling.kind == "factors"
    np.testing.assert_allclose(frequencies(single), frequencies(scaled), rtol=1e-6)
    np.testing.assert_allclose(logits(single), logits(scaled), atol=1e-4)


def test_linear_rope_scaling_is_read(make_llama: Make, tmp_path: Path) -> None:
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    single = load_lm(str(make_llama().write_gguf(tmp_path / "m.gguf", changes=changes)))
    folder = make_llama(rope_scaling={"type": "linear", "factor": 4.0}).write_folder(tmp_path / "hf")
    assert single.config == load_lm(str(folder)).config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.rope.scaling.type": "yarn"}, ("rope scaling", "'yarn'", "linear")),
        ({"llama.expert_count": 8}, ("llama.expert_count", "8")),
        ({"llama.rope.dimension_count": 8}, ("llama.rope.dimension_count", "8", "16")),
        ({"llama.attention.value_length": 8}, ("llama.attention.value_length",)),
        ({"llama.block_count": None}, ("llama.block_count", "incomplete")),
        ({"llama.attention.head_count_kv": [2, 1]}, ("does not describe a model",)),
        ({"llama.block_count": 3}, ("lacks tensors", "blk.2.attn_q.weight")),
        ({"llama.embedding_length": 32}, ("wrong shape", "token_embd.weight", "(264, 64)", "(264, 32)")),
        ({"tokenizer.ggml.pre": "smolm"}, ("pre-tokenizer", "'smolm'", "Did you mean 'smollm'?")),
        ({"tokenizer.ggml.model": "t5"}, ("tokenizer kind", "'t5'", "gpt2, llama")),
        ({"tokenizer.ggml.merges": ["a q"]}, ("tokenizer", "damaged", "out of vocabulary")),
        ({"tokenizer.ggml.eos_token_id": None}, ("tokenizer.ggml.eos_token_id",)),
        ({"tokenizer.ggml.token_type": [1, 1]}, ("token types", "damaged")),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    changes: dict[str, Any], words: tuple[str, ...], make_llama: Make, tmp_path: Path
) -> None:
    path = make_llama().write_gguf(tmp_path / "m.gguf", changes=changes)
    with pytest.raises(UserError) as caught:
        load_lm(str(path))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_an_unknown_architecture_is_refused_by_name(make_llama: Make, tmp_path: Path) -> None:
    path = make_llama().write_gguf(tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(UserError, match=r"architecture is 'mamba'.*supported: llama"):
        load_lm(str(path))


def test_damaged_files_are_refused(make_llama: Make, tmp_path: Path) -> None:
    path = make_llama().write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    for size in (6, 30, 700, len(content) // 2, len(content) - 64):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"m\.gguf cannot be read as GGUF: it is truncated"):
            load_lm(str(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"m\.gguf is empty"):
        load_lm(str(path))
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(UserError, match=r"m\.gguf is not a GGUF file"):
        load_lm(str(path))
