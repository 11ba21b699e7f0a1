"""Files that once broke a reader, each made small: what the campaigns and readings of the code found."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from driver import read_case
from own_files import OWN_FILES, official, torch_adapter
from readers import CONFIGURATIONS, DIALOGUES, WEIGHTS, all_tensors
from safetensors.numpy import save

from spt_jax.errors import UserError
from spt_jax.models.families.gguf_config import GGUFConfig
from spt_jax.models.files.gguf_file import GGUFFile
from spt_jax.models.tokenization.gguf_tokenizer import tokenizer_of_gguf

READERS = {reader.name: reader for reader in DIALOGUES + WEIGHTS + CONFIGURATIONS + OWN_FILES}
_DEEP = b'{"a":' * 100_000


def _safetensors(shape: list[int]) -> bytes:
    header = json.dumps({"empty": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("requests", b'{"persona": [], "history": ["hi"], "id": ' + b"9" * 5000 + b"}", id="huge number"),
        pytest.param("requests", _DEEP, id="deep request"),
        pytest.param("model config", _DEEP, id="deep JSON"),
        pytest.param("configuration", b'{"a":' * 900 + b"1" + b"}" * 900, id="deep sections"),
        pytest.param("configuration", b'{"optimizer.learning_rate": ' + b"9" * 400 + b"}", id="too large for a float"),
        pytest.param("authors' config", b"[" * 100_000, id="a YAML scanner's quadratic time"),
        pytest.param("safetensors", _safetensors([0, 2**62, 2**62]), id="impossible sizes beside a zero"),
        pytest.param("safetensors", _safetensors([0] * 100), id="too many axes"),
        pytest.param("safetensors", _safetensors([0, 10**4299]), id="a size too long to print"),
        pytest.param("safetensors index", b'{"weight_map": {"a": "' + b"9" * 5000 + b'"}}', id="a name too long"),
        pytest.param("safetensors index", b'{"weight_map": {"a": "../model.safetensors"}}', id="a path upwards"),
        pytest.param("official checkpoint", official("99999999999"), id="a prompt's number as large as the memory"),
        pytest.param("official checkpoint", official("9" * 5000), id="a prompt's number too long to read"),
        pytest.param("official checkpoint", official(shape=(2**20, 2**13), strides=(0, 0)), id="one number as a bank"),
        pytest.param(
            "adapter's weights, torch", torch_adapter((2**20, 2**13), (0, 0)), id="one number as 34 GB of a prompt"
        ),
        *(
            pytest.param("tokenizer_config.json of OPT", json.dumps({"added_tokens_decoder": added}).encode())
            for added in ([1], {"x": {}}, {"259": {}}, {"259": "s"}, {"259": {"content": 5}}, {"9" * 5000: {}})
        ),
        pytest.param("safetensors index", b'{"weight_map": {"a": "/etc/passwd"}}', id="an absolute path"),
    ],
)
def test_refused_with_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    assert read_case(READERS[name], content, tmp_path) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 7),
        ("token_type", 7),
        ("model", ["llama"]),
        ("scores", "x"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", 1.5),
        ("eos_token_id", True),
        ("eos_token_id", 8),
    ],
)
def test_a_gguf_tokenizer_with_a_field_of_another_kind_is_refused(field: str, value: object) -> None:
    """The fields as a reader of the file gives them."""
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0] * 8,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert tokenizer_of_gguf(metadata, "a file").eos_id == 2
    with pytest.raises(UserError, match=r"^a file: "):
        tokenizer_of_gguf(metadata | {f"tokenizer.ggml.{field}": value}, "a file")


@pytest.mark.parametrize("layers", [2**31 - 1, 2**32 - 1])
def test_a_gguf_file_of_more_layers_than_any_model_has_is_refused_before_they_are_listed(layers: int) -> None:
    """A pattern that is a number becomes a list with an entry for each layer."""
    pattern = {"gemma3.attention.sliding_window": 512, "gemma3.attention.sliding_window_pattern": 6}
    header = {"general.architecture": "gemma3", "gemma3.block_count": layers, **pattern}
    with pytest.raises(UserError, match=rf"a file: gemma3\.block_count is {layers}; allowed: at most 10000"):
        GGUFConfig(header, {}, "a file").windows()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 32)])
def test_a_gguf_tensor_without_numbers_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("empty", np.zeros(shape, np.float16))
    _write(writer)
    with pytest.raises(UserError, match="no numbers"):
        all_tensors(GGUFFile(path))


@pytest.mark.parametrize("count", ["many", 1.5])
def test_a_gguf_number_of_parts_that_is_none_is_refused(count: str | float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    (writer.add_string if isinstance(count, str) else writer.add_float32)("split.count", count)  # type: ignore[operator]
    writer.add_tensor("plain", np.zeros(4, np.float32))
    _write(writer)
    with pytest.raises(UserError, match="no whole number"):
        GGUFFile(path)


def test_a_gguf_alignment_that_is_no_whole_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("general.alignment", 32.0)
    writer.add_tensor("plain", np.zeros(4, np.float32))
    _write(writer)
    with pytest.raises(UserError, match="alignment"):
        GGUFFile(path)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_sound_safetensors_file_may_hold_an_empty_tensor(tmp_path: Path) -> None:
    content = save({"empty": np.zeros((0, 3), np.float32)})
    assert read_case(READERS["safetensors"], content, tmp_path) is None
