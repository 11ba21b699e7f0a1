"""Small random Llamas as files, written without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<unk>", "<s>", "</s>")
TOKENS = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def byte_level_tokenizer() -> Tokenizer:
    """Three special tokens, the 256 bytes and one merge: 260 ids."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which GGUF stores the rows of Llama's q and k, as llama.cpp's converter makes it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclasses.dataclass
class LlamaFiles:
    """A Llama as ``config.json`` fields and tensors under transformers' names."""

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def write_folder(self, folder: Path, *, dtype: str = "float32", shards: int = 1) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.fields))
        write_tokenizer(folder)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        tensors = {name: np.ascontiguousarray(value).astype(kind) for name, value in self.tensors.items()}
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            save_file({n: v for n, v in tensors.items() if weight_map[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def write_gguf(
        self,
        path: Path,
        *,
        quantisation: str = "F32",
        architecture: str = "llama",
        changes: dict[str, Any] | None = None,
    ) -> Path:
        """Writes metadata as llama.cpp's converter does; `changes` override or (None) drop fields."""
        c = self.fields
        writer = gguf.GGUFWriter(path, architecture)
        metadata: dict[str, Any] = {
            "llama.block_count": c["num_hidden_layers"],
            "llama.context_length": c["max_position_embeddings"],
            "llama.embedding_length": c["hidden_size"],
            "llama.feed_forward_length": c["intermediate_size"],
            "llama.attention.head_count": c["num_attention_heads"],
            "llama.attention.head_count_kv": c["num_key_value_heads"],
            "llama.attention.key_length": c["head_dim"],
            "llama.attention.value_length": c["head_dim"],
            "llama.rope.dimension_count": c["head_dim"],
            "llama.rope.freq_base": float(c["rope_theta"]),
            "llama.attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [3] * 3 + [1] * 257,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            **(changes or {}),
        }
        for key, value in metadata.items():
            match value:
                case None:
                    pass
                case str():
                    writer.add_string(key, value)
                case float():
                    writer.add_float32(key, value)
                case int():
                    writer.add_uint32(key, value)
                case list():
                    writer.add_array(key, value)
        kind = gguf.GGMLQuantizationType[quantisation]
        for name, value in self.tensors.items():
            stored = np.ascontiguousarray(self._for_gguf(name, value), dtype=np.float32)
            if stored.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(_gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
            else:
                writer.add_tensor(_gguf_name(name), stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _for_gguf(self, name: str, value: np.ndarray) -> np.ndarray:
        if "q_proj" in name:
            return interleaved(value, self.fields["num_attention_heads"])
        if "k_proj" in name:
            return interleaved(value, self.fields["num_key_value_heads"])
        return value


def _gguf_name(name: str) -> str:
    for hf, ours in (
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.norm", "output_norm"),
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
    ):
        name = name.replace(hf, ours)
    return name


def random_llama(**changes: Any) -> LlamaFiles:
    """A Llama of two layers, width 64, four heads of 16 and two of keys; `changes` are ``config.json`` fields."""
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        **changes,
    }
    generator = np.random.default_rng(7)
    width, inner, vocabulary = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    query = fields["num_attention_heads"] * fields["head_dim"]
    key = fields["num_key_value_heads"] * fields["head_dim"]
    tensors: dict[str, np.ndarray] = {"model.embed_tokens.weight": generator.normal(0, 1, (vocabulary, width))}
    for i in range(fields["num_hidden_layers"]):
        for name, (rows, columns) in {
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, query),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }.items():
            tensors[f"model.layers.{i}.{name}.weight"] = generator.normal(0, columns**-0.5, (rows, columns))
            if fields["attention_bias"] and name.startswith("self_attn"):
                tensors[f"model.layers.{i}.{name}.bias"] = generator.normal(0, 0.3, rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = generator.uniform(0.5, 1.5, width)
    tensors["model.norm.weight"] = generator.uniform(0.5, 1.5, width)
    if not fields["tie_word_embeddings"]:
        tensors["lm_head.weight"] = generator.normal(0, width**-0.5, (vocabulary, width))
    return LlamaFiles(fields, {name: value.astype(np.float32) for name, value in tensors.items()})
