"""GGUF files give the same LM as the folder they were made from; what cannot be read is refused by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_writer import write_file
from hypothesis import strategies

from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree, decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.registry import family_of_gguf
from spt_jax.models.files.gguf_file import GGUFFile
from spt_jax.models.files.gguf_header import read_header
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
        ({"llama.rope.scaling.type": "yarn"}, ("llama.rope.scaling.type", "'yarn'", "rope.scaling.factor")),
        ({"llama.rope.scaling.type": "longrope"}, ("'longrope'", "rope_factors_short")),
        ({"llama.rope.scaling.type": "ntk"}, ("llama.rope.scaling.type is 'ntk'", "none, linear, yarn")),
        ({"llama.rope.scaling.alpha": 1000.0}, ("llama.rope.scaling.alpha", "1000.0")),
        ({"llama.expert_count": 8}, ("llama.expert_count", "8")),
        ({"llama.attention.temperature_scale": 0.1}, ("llama.attention.temperature_scale", "0.1")),
        ({"llama.attention.kv_lora_rank": 512}, ("llama.attention.kv_lora_rank", "512")),
        ({"llama.attention.clamp_kqv": 8.0}, ("llama.attention.clamp_kqv", "8.0")),
        ({"llama.logit_scale": 0.5}, ("llama.logit_scale", "0.5", "1.0")),
        ({"llama.rope.dimension_count": 8}, ("llama.rope.dimension_count", "8", "16")),
        ({"llama.attention.sliding_window_pattern": [1, 0, 1]}, ("sliding_window_pattern names 3 layers", "is 2")),
        ({"llama.attention.value_length": 8}, ("llama.attention.value_length",)),
        ({"llama.block_count": None}, ("llama.block_count", "incomplete")),
        ({"llama.attention.head_count_kv": [2, 1]}, ("llama.attention.head_count_kv", "layer to layer", "[1, 2]")),
        ({"llama.embedding_length": [64]}, ("does not describe a model",)),
        ({"general.alignment": 24}, ("cannot be read as GGUF",)),
        ({"llama.block_count": 3}, ("lacks tensors", "blk.2.attn_q.weight")),
        ({"llama.embedding_length": 32}, ("wrong shape", "token_embd.weight", "(264, 64)", "(264, 32)")),
        ({"tokenizer.ggml.pre": "smolm"}, ("pre-tokenizer", "'smolm'", "Did you mean 'smollm'?")),
        ({"tokenizer.ggml.model": "t5"}, ("tokenizer kind", "'t5'", "gpt2, llama")),
        ({"tokenizer.ggml.merges": ["a q"]}, ("tokenizer", "damaged", "out of vocabulary")),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]},
        {"llama.expert_count": 0, "llama.attention.causal": True, "llama.logit_scale": 1.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear"},
        {"llama.attention.sliding_window": 0, "llama.attention.sliding_window_pattern": 1},
    ],
)
def test_fields_that_change_nothing_change_nothing(changes: dict[str, Any], make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    plain, spelled = files.write_gguf(tmp_path / "a.gguf"), files.write_gguf(tmp_path / "b.gguf", changes=changes)
    assert load_lm(str(spelled)).config == load_lm(str(plain)).config


def test_a_factor_without_a_type_is_linear(make_llama: Make, tmp_path: Path) -> None:
    [new, old] = [
        load_lm(str(make_llama().write_gguf(tmp_path / f"{i}.gguf", changes={key: 4.0})))
        for i, key in enumerate(("llama.rope.scaling.factor", "llama.rope.scale_linear"))
    ]
    folder = make_llama(rope_scaling={"type": "linear", "factor": 4.0}).write_folder(tmp_path / "hf")
    assert new.config == old.config == load_lm(str(folder)).config


@pytest.mark.parametrize(
    ("architecture", "layers", "heads", "width", "scale"),
    [
        ("gemma2", 46, 32, 4608, 144.0),  # 27B: query_pre_attn_scalar of its config.json
        ("gemma2", 42, 16, 3584, 256.0),
        ("gemma3", 62, 32, 5376, 168.0),
        ("gemma3", 34, 8, 2560, 256.0),
    ],
)
def test_gemmas_queries_have_the_published_scale(
    architecture: str, layers: int, heads: int, width: int, scale: float
) -> None:
    fields = {
        "block_count": layers,
        "attention.head_count": heads,
        "embedding_length": width,
        "attention.key_length": 128 if scale < 256 else 256,
        "feed_forward_length": 8,
        "context_length": 8192,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 1024,
    }
    metadata = {"general.architecture": architecture, **{f"{architecture}.{key}": v for key, v in fields.items()}}
    config = family_of_gguf(metadata, "x").config_from_gguf(metadata, {"token_embd.weight": (8, width)}, "x")
    assert config.attention_scale == scale**-0.5
    full = [config.layer_kinds[kind].window is None for kind in config.layer_pattern]
    every = 2 if architecture == "gemma2" else 6
    assert full == [(layer + 1) % every == 0 for layer in range(layers)]


def in_parts(files: Any, folder: Path, count: int, **changes: Any) -> list[Path]:
    """The file cut as ``llama-gguf-split`` does it: fields in the first part, tensors in the others."""
    whole = read_header(files.write_gguf(folder / "whole.gguf"))
    names = list(whole[1])
    paths = [folder / f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for number, path in enumerate(paths):
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(names), **changes}
        fields = {k: v for k, v in whole[0].items() if k != "general.architecture"} if number == 0 else {}
        mine = [] if number == 0 else names[number - 1 :: count - 1]
        write_file(
            path,
            "llama",
            fields | split,
            {n: whole[1][n].data.view(np.float32).reshape(whole[1][n].shape) for n in mine},
        )
    (folder / "whole.gguf").unlink()
    return paths


def test_a_file_in_parts_is_the_whole_file_from_any_of_its_parts(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama(num_key_value_heads=1)
    whole = load_lm(str(files.write_gguf(tmp_path / "one.gguf")))
    parts = in_parts(files, tmp_path, 3)
    for part in parts:
        lm = load_lm(str(part))
        assert lm.config == whole.config and lm.identity.sha256 != whole.identity.sha256
        np.testing.assert_array_equal(logits(lm), logits(whole))
    assert GGUFFile(parts[1]).files == tuple(parts)


def test_a_missing_part_is_named(make_llama: Make, tmp_path: Path) -> None:
    parts = in_parts(make_llama(), tmp_path, 4)
    parts[1].unlink()
    parts[3].unlink()
    with pytest.raises(UserError, match=r"one of 4 parts.*m-00002-of-00004\.gguf, m-00004-of-00004\.gguf is missing"):
        load_lm(str(parts[0]))


def test_parts_of_different_files_and_renamed_parts_are_refused(make_llama: Make, tmp_path: Path) -> None:
    parts = in_parts(make_llama(), tmp_path, 3)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(UserError, match="not the parts of one file"):
        load_lm(str(parts[0]))
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"one of 3 parts.*model-00001-of-00003\.gguf"):
        load_lm(str(renamed))


def test_headers_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    odd = {"x.yes": True, "x.no": False, "x.text": "naïve 東京", "x.number": 1e-5, "x.list": [1.5, 2.5]}
    odd |= {"x.words": ["a", ""], "x.flags": [True, False], "x.negative": [-1, 2]}
    values = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    stored = {"a": values[0, 0, :7], "b": (gguf.quants.quantize(values, kind), kind), "c": values}
    path = write_file(tmp_path / "m.gguf", "llama", odd, stored)
    fields, tensors = read_header(path)
    theirs = gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields.keys() == expected.keys()
    for name, value in expected.items():
        same = np.float32(fields[name]) == np.float32(value) if isinstance(value, float) else fields[name] == value
        assert same and type(fields[name]) is type(value), name
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = tensors[tensor.name]
        assert mine.kind == tensor.tensor_type and mine.shape == tuple(int(n) for n in reversed(tensor.shape))
        np.testing.assert_array_equal(mine.data.ravel(), tensor.data.view(np.uint8).ravel())


@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(place=strategies.floats(0, 1), value=strategies.integers(0, 255))
def test_a_changed_byte_of_a_header_gives_a_header_or_a_sentence(
    place: float, value: int, make_llama: Make, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        make_llama().write_gguf(path)
        (tmp_path / "good").write_bytes(path.read_bytes()[:9000])
    content = bytearray((tmp_path / "good").read_bytes())
    content[int(place * (len(content) - 1))] = value
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    with contextlib.suppress(UserError):
        read_header(changed)


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
