"""Every family's tensors: all are read, none is left over, and every published spelling of their names is known."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from parity import random_model, save
from safetensors.numpy import load_file, save_file

from spt_jax.errors import UserError
from spt_jax.models.loading import load_lm

pytestmark = pytest.mark.torch

WIDTH = {"intermediate_size": 112}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", {"ffn_dim": 112, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", WIDTH),
    "llama": ("LlamaForCausalLM", {**WIDTH, "attention_bias": True, "mlp_bias": True}),
    "smollm3": ("SmolLM3ForCausalLM", {**WIDTH, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", {**WIDTH, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {**WIDTH, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**WIDTH, "num_key_value_heads": 2}),
    "gemma": ("GemmaForCausalLM", {**WIDTH, "num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": ("Gemma2ForCausalLM", {**WIDTH, "num_key_value_heads": 2, "head_dim": 24}),
    "gemma3_text": ("Gemma3ForCausalLM", {**WIDTH, "num_key_value_heads": 2, "head_dim": 24}),
    "phi3": ("Phi3ForCausalLM", WIDTH),
    "stablelm": (
        "StableLmForCausalLM",
        {**WIDTH, "num_key_value_heads": 2, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    "olmo2": ("Olmo2ForCausalLM", WIDTH),
}
TABLES = {"opt": "model.decoder.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
TABLES |= {"gpt_neox": "gpt_neox.embed_in.weight"}
HEADS = {"gpt_neox": "embed_out.weight"}  # its name on the hub

Tensors = dict[str, np.ndarray]
FilesOf = Callable[..., "Files"]


def table_of(family: str) -> str:
    return TABLES.get(family, "model.embed_tokens.weight")


class Files:
    """A folder whose tensors a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: Tensors = load_file(folder / "model.safetensors")

    @functools.cached_property
    def plain(self) -> Any:
        """What we make of the folder as it was saved."""
        return self.loaded(self.tensors)

    def loaded(self, tensors: Tensors) -> Any:
        """What we make of the folder with these tensors in it."""
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, self._file, {"format": "pt"})
        return load_lm(str(self.folder)).params

    def refused(self, tensors: Tensors, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            self.loaded(tensors)
        for word in words:
            assert word in str(caught.value), str(caught.value)

    @property
    def _file(self) -> Path:
        return self.folder / "model.safetensors"


@pytest.fixture(scope="module")
def files_of(tmp_path_factory: pytest.TempPathFactory) -> FilesOf:
    """A family's random model as transformers saves it, once for all tests."""

    @functools.cache
    def saved(family: str, tied: bool = True) -> Files:
        architecture, fields = FAMILIES[family]
        folder = tmp_path_factory.mktemp(family)
        save(random_model(architecture, {**fields, "tie_word_embeddings": tied}), folder)
        return Files(folder)

    return saved


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tensor_of_any_kind_is_named(family: str, files_of: FilesOf) -> None:
    files = files_of(family, False)
    kinds = {re.sub(r"\.\d+\.", ".N.", name): name for name in files.tensors}  # the last layer's
    assert len(kinds) > 8
    for name in kinds.values():
        files.refused({n: t for n, t in files.tensors.items() if n != name}, "lacks tensors", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_leftover_tensor_is_named(family: str, files_of: FilesOf) -> None:
    files = files_of(family)
    block = next(name for name in files.tensors if ".1." in name).split(".1.")[0]
    for name in (f"{block}.1.surprise.weight", f"{block}.2.{_inside(files, block)}", "rotary_emb.surprise"):
        files.refused({**files.tensors, name: np.ones(64, np.float32)}, "no place for", name)


def _inside(files: Files, block: str) -> str:
    return next(name for name in files.tensors if name.startswith(f"{block}.1.")).split(".1.", 1)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_in_the_file_must_equal_the_table(family: str, files_of: FilesOf) -> None:
    files = files_of(family)
    assert json.loads((files.folder / "config.json").read_text())["tie_word_embeddings"]
    table = files.tensors[table_of(family)]
    expected = files.plain
    for head in ("lm_head.weight", HEADS.get(family, "lm_head.weight")):
        assert_same(files.loaded({**files.tensors, head: table}), expected)
        other = table.copy()
        other[-1, -1] += 1e-3
        files.refused({**files.tensors, head: other}, "ties the head", head, table_of(family), "differ")


MASK = np.tril(np.ones((1, 1, 96, 96), bool))
ATTENTION_BUFFERS = {"bias": MASK, "masked_bias": np.float32(-1e4)}
BUFFERS: dict[str, dict[str, Any]] = {
    **{key: {"model.layers.{}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)} for key in FAMILIES},
    "opt": {"model.decoder.version": np.array([3.0], np.float32)},
    "gpt2": {f"transformer.h.{{}}.attn.{name}": value for name, value in ATTENTION_BUFFERS.items()},
    "gpt_neox": {
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": np.ones(8, np.float16),
        **{f"gpt_neox.layers.{{}}.attention.{name}": value for name, value in ATTENTION_BUFFERS.items()},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_of_old_checkpoints_are_passed_over(family: str, files_of: FilesOf) -> None:
    files = files_of(family)
    buffers = {name.format(i): np.asarray(value) for name, value in BUFFERS[family].items() for i in range(2)}
    assert_same(files.loaded({**files.tensors, **buffers}), files.plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_may_lack_the_base_models_prefix(family: str, tied: bool, files_of: FilesOf) -> None:
    files = files_of(family, tied)
    prefix = table_of(family).split(".")[0] + "."
    bare = {name.removeprefix(prefix): tensor for name, tensor in files.tensors.items()}
    assert sum(name in files.tensors for name in bare) == (0 if tied else 1), "the head alone keeps its name"
    expected = files.plain
    assert_same(files.loaded(bare), expected)
    extra = {name.format(0).removeprefix(prefix): np.asarray(value) for name, value in BUFFERS[family].items()}
    assert_same(files.loaded({**bare, **extra}), expected)


def test_both_names_of_gpt_neoxs_head_are_known(files_of: FilesOf) -> None:
    files = files_of("gpt_neox", False)
    expected = files.plain
    for name in ("embed_out.weight", "lm_head.weight"):  # the hub's, and the one of transformers' class
        renamed = {re.sub(r"^(embed_out|lm_head)\.weight$", name, key): value for key, value in files.tensors.items()}
        assert name in renamed
        assert_same(files.loaded(renamed), expected)


def test_shapes_of_joined_tensors_are_checked(files_of: FilesOf) -> None:
    for family, name in (
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
    ):
        files = files_of(family)
        tensor = files.tensors[name]
        files.refused({**files.tensors, name: tensor[:-1]}, "wrong shape", name, str(tensor.shape))
