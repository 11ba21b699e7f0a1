"""The readers under attack, each with a small sound file written here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch_archives
from driver import Reader
from safetensors.numpy import save

import spt_jax.config as config
from spt_jax.commands.requests import read_requests
from spt_jax.data.sources import BUILTIN_PREFIX, read_dialogues
from spt_jax.interop.official_yaml import SECTIONS, read_config_file
from spt_jax.json_text import json_object
from spt_jax.models.files.gguf_file import GGUFFile
from spt_jax.models.files.safetensors_file import SAFETENSORS_INDEX, SafetensorsFolder
from spt_jax.models.files.torch_file import TORCH_FILE, TorchFolder
from spt_jax.models.tokenization.gguf_tokenizer import tokenizer_of_gguf


def all_tensors(weights: Any) -> None:
    """Reads every tensor of opened weights, as loading would."""
    for name in weights.shapes:
        np.asarray(weights.read(name))


def parlai() -> bytes:
    dialogue = read_dialogues(f"{BUILTIN_PREFIX}train").dialogues[0]
    lines = [f"your persona: {line}" for line in dialogue.persona]
    lines += [f"{turn.query}\t{turn.response}\t0\tyes|no" for turn in dialogue.turns]
    return "\n".join(f"{number} {line}" for number, line in enumerate(lines, start=1)).encode()


def _json_line(**fields: Any) -> bytes:
    return (json.dumps({"persona": ["i like tea .", "i run ."], **fields, "id": 7}) + "\n").encode() * 3


def _gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("general.alignment", 32)
        writer.add_uint16("split.count", 1)
        writer.add_float32("llama.rope.freq_base", 1e4)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
        writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("small", gguf.quants.quantize(np.ones((2, 32), np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _gguf_tokenizer() -> bytes:
    """A header with the fields of a tokenizer, and no weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_string("tokenizer.ggml.model", "llama")
        writer.add_array("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"])
        writer.add_array("tokenizer.ggml.token_type", [2, 3, 3, 1, 1, 1, 1, 1])
        writer.add_array("tokenizer.ggml.scores", [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0])
        for name, number in (("unknown", 0), ("bos", 1), ("eos", 2)):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        writer.add_tensor("plain", np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _read_gguf_tokenizer(path: Path) -> None:
    tokenizer_of_gguf(GGUFFile(path).metadata, str(path))


def _torch() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        torch_archives.two_tensors(Path(folder))
        return (Path(folder) / TORCH_FILE).read_bytes()


def _read_configuration(path: Path) -> None:
    config.validate(config.from_dict(json_object(path)))


_TENSORS = {"plain": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones(4, np.float16)}
_SHARD = "model-00001-of-00001.safetensors"


def _read_index(path: Path) -> None:
    (path.parent / _SHARD).write_bytes(save(_TENSORS))
    all_tensors(SafetensorsFolder(path.parent))


DIALOGUES = [
    Reader("parlai", "dialogues.txt", parlai(), lambda path: read_dialogues(str(path))),
    Reader("parlai, skipping", "dialogues.txt", parlai(), lambda path: read_dialogues(str(path), on_error="skip")),
    Reader(
        "json lines",
        "dialogues.jsonl",
        _json_line(turns=[{"query": "hi", "response": "hello", "candidates": ["no"]}, ["and ?", "yes"]]),
        lambda path: read_dialogues(str(path)),
    ),
    Reader("requests", "requests.jsonl", _json_line(history=["hi", "hello", "you ?"]), read_requests),
]
WEIGHTS = [
    Reader(
        "safetensors", "model.safetensors", save(_TENSORS), lambda path: all_tensors(SafetensorsFolder(path.parent))
    ),
    Reader(
        "safetensors index",
        SAFETENSORS_INDEX,
        json.dumps({"metadata": {"total_size": 32}, "weight_map": {"plain": _SHARD, "half": _SHARD}}).encode(),
        _read_index,
    ),
    Reader("gguf", "model.gguf", _gguf(), lambda path: all_tensors(GGUFFile(path))),
    Reader("gguf tokenizer", "model.gguf", _gguf_tokenizer(), _read_gguf_tokenizer),
    Reader("torch", TORCH_FILE, _torch(), lambda path: all_tensors(TorchFolder(path.parent))),
]
CONFIGURATIONS = [
    Reader(
        "configuration",
        "config.json",
        json.dumps(config.flatten(config.default_config())).encode(),
        _read_configuration,
        names_file=False,  # options are named instead: the values may come from flags as well
    ),
    Reader(
        "model config",
        "config.json",
        json.dumps({"model_type": "llama", "hidden_size": 64, "rope_scaling": {"factor": 8.0}}).encode(),
        json_object,
    ),
    Reader(
        "authors' config",
        "config.yml",
        "".join(f"{section}:\n  value: 3\n  name: [a, 'b']\n" for section in SECTIONS).encode(),
        read_config_file,
    ),
]
