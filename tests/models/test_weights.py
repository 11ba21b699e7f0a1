"""Weights reach their parameters whole, on any mesh, or are refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spt_jax.errors import UserError
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.loading import load_lm

Make = Callable[..., Any]


def assert_trees_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_parameter_holds_its_tensor_in_our_layout(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama(attention_bias=True)
    params = load_lm(str(files.write_folder(tmp_path))).params
    for i in range(2):
        query = files.tensors[f"model.layers.{i}.self_attn.q_proj.weight"].reshape(4, 16, 64)
        np.testing.assert_array_equal(params["layers"]["attention"]["q_proj"]["kernel"][i], query.transpose(2, 0, 1))
        output = files.tensors[f"model.layers.{i}.self_attn.o_proj.weight"].reshape(64, 4, 16)
        np.testing.assert_array_equal(params["layers"]["attention"]["o_proj"]["kernel"][i], output.transpose(1, 2, 0))
        bias = files.tensors[f"model.layers.{i}.self_attn.k_proj.bias"].reshape(2, 16)
        np.testing.assert_array_equal(params["layers"]["attention"]["k_proj"]["bias"][i], bias)
        down = files.tensors[f"model.layers.{i}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"]["kernel"][i], down.T)
    np.testing.assert_array_equal(params["lm_head"], files.tensors["lm_head.weight"].T)


def test_loaded_tree_is_the_declared_tree(make_llama: Make, tmp_path: Path) -> None:
    lm = load_lm(str(make_llama().write_folder(tmp_path)), dtype="bfloat16")
    declared = jax.tree.map(
        lambda leaf: (leaf.value.shape, leaf.value.dtype),
        abstract_params(lm.config),
        is_leaf=lambda leaf: hasattr(leaf, "names"),
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), lm.params) == declared


def test_shards_and_types_of_file_do_not_matter(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    whole = load_lm(str(files.write_folder(tmp_path / "whole")))
    parts = load_lm(str(files.write_folder(tmp_path / "parts", shards=3)))
    assert_trees_equal(parts.params, whole.params)
    assert parts.identity.sha256 != whole.identity.sha256

    half = load_lm(str(files.write_folder(tmp_path / "half", dtype="bfloat16")))
    assert_trees_equal(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), whole.params))
    kept = load_lm(str(tmp_path / "half"), dtype="bfloat16")
    assert_trees_equal(kept.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_sharded_placement_holds_the_unsharded_values(kind: str, make_llama: Make, tmp_path: Path) -> None:
    files = make_llama(vocab_size=264)
    source = str(
        files.write_folder(tmp_path, dtype="bfloat16") if kind == "folder" else files.write_gguf(tmp_path / "m.gguf")
    )
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    asked = []

    def sharding_for(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        asked.append(axes)
        spec = jax.sharding.PartitionSpec(*(rules.get(axis or "") for axis in axes))
        return jax.sharding.NamedSharding(mesh, spec)

    sharded = load_lm(source, sharding_for=sharding_for).params
    assert_trees_equal(sharded, load_lm(source).params)
    query = sharded["layers"]["attention"]["q_proj"]["kernel"]
    assert query.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    assert query.addressable_shards[0].data.shape == (2, 32, 2, 16)
    assert ("layers", "embed", "heads", "head_dim") in asked and ("vocab", "embed") in asked


def test_layers_may_be_sharded_too(make_llama: Make, tmp_path: Path) -> None:
    source = str(make_llama().write_folder(tmp_path))
    mesh = jax.make_mesh((2,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding_for(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        spec = jax.sharding.PartitionSpec(*("stage" if axis == "layers" else None for axis in axes))
        return jax.sharding.NamedSharding(mesh, spec)

    sharded = load_lm(source, sharding_for=sharding_for).params
    assert sharded["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (1, 64, 96)
    assert_trees_equal(sharded, load_lm(source).params)


def test_progress_counts_up_to_every_parameter(make_llama: Make, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    lm = load_lm(str(make_llama().write_folder(tmp_path)), progress=lambda *call: calls.append(call))
    total = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[-1] == total
    assert {(call[0], call[2]) for call in calls} == {("loading weights", total)}


def test_a_tied_head_in_the_file_must_equal_the_table(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama(tie_word_embeddings=True)
    files.tensors["lm_head.weight"] = files.tensors["model.embed_tokens.weight"]
    assert "lm_head" not in load_lm(str(files.write_folder(tmp_path / "same"))).params
    files.tensors["lm_head.weight"] = files.tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(UserError, match=r"ties the head.*lm_head.weight.*differ"):
        load_lm(str(files.write_folder(tmp_path / "other")))


def test_rotary_buffers_of_old_checkpoints_are_passed_over(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    files.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    load_lm(str(files.write_folder(tmp_path)))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_lm(str(folder))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_missing_left_over_and_misshapen_tensors_are_named(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = files.tensors.pop(name)
    refused(files.write_folder(tmp_path / "a"), "lacks tensors", name)
    files.tensors[name] = tensor[:, :32]
    refused(files.write_folder(tmp_path / "b"), "wrong shape", name, "(96, 32)", "(96, 64)")
    files.tensors[name] = tensor
    files.tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    refused(files.write_folder(tmp_path / "c"), "no place for", "model.layers.0.self_attn.q_norm.weight")


def test_an_untied_head_that_is_absent_is_missing(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    del files.tensors["lm_head.weight"]
    refused(files.write_folder(tmp_path), "lacks tensors", "lm_head.weight")


def test_damaged_weight_files_are_refused(make_llama: Make, tmp_path: Path) -> None:
    folder = make_llama().write_folder(tmp_path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    refused(folder, "model.safetensors", "truncated", "header describes")
    weights.write_bytes(content[:50])
    refused(folder, "model.safetensors", "truncated")
    weights.write_bytes(content[:5])
    refused(folder, "model.safetensors", "truncated")
    weights.write_bytes(b"")
    refused(folder, "model.safetensors", "is empty")
    weights.write_bytes((20).to_bytes(8, "little") + b"not json" * 4)
    refused(folder, "model.safetensors", "header does not parse")
    weights.unlink()
    refused(folder, "no weight file")
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, "pytorch_model.bin", "not supported", "safetensors")


def test_missing_shards_and_bad_indices_are_refused(make_llama: Make, tmp_path: Path) -> None:
    folder = make_llama().write_folder(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors", "missing")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    refused(folder, "index.json", "weight_map")


def test_a_type_that_is_not_floating_is_refused_by_name(make_llama: Make, tmp_path: Path) -> None:
    folder = make_llama().write_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(64, np.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "model.norm.weight", "I8", "BF16")
