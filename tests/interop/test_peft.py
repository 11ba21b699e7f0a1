"""PEFT computes from an export what the run computes; what it could not is refused, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llama_files import random_llama
from models.parity import random_model, save
from peft_runs import FAMILIES, difference, trained_run
from safetensors.numpy import load_file

from spt_jax.errors import UserError
from spt_jax.interop.peft import export_peft
from spt_jax.prompting.peft_prompts import from_peft

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a random small model of a family, built once."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    folders: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("lm") / "model"
            save(random_model(*FAMILIES[family]), folders[family])
        return folders[family]

    return of


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A Llama written without torch."""
    return str(random_llama(num_hidden_layers=1).write_folder(tmp_path / "lm"))


def check(run: Any, out: Path, name: str, k: int, record_property: Any) -> None:
    worst, same = difference(run, out / name, k)
    record_property("difference", worst)
    print(f"\n| {run.opened.family.name} | {run.config.method.kind} | {worst:.1e} | {same} |")
    assert worst <= TOLERANCE
    assert same


@pytest.mark.torch
@pytest.mark.parametrize(
    "family",
    ["OPT", "Llama", "Gemma 3"]
    + [pytest.param(name, marks=pytest.mark.campaign) for name in ("GPT-2", "Gemma", "Gemma 2", "Phi-3", "GPT-NeoX")],
)
def test_peft_generates_behind_an_exported_prompt_what_the_run_generates(family, folder_of, tmp_path, record_property):
    run = trained_run(str(folder_of(family)))
    assert export_peft(run, tmp_path / "out") == ["prompt_0", "prompt_1"]
    check(run, tmp_path / "out", "prompt_1", 1, record_property)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["p_tuning", pytest.param("prompt_tuning", marks=pytest.mark.campaign)])
def test_one_prompt_is_one_adapter(kind, folder_of, tmp_path, record_property):
    run = trained_run(str(folder_of("Llama")), method__kind=kind)
    assert export_peft(run, tmp_path / "out") == ["prompt_0"]
    assert not (tmp_path / "out" / "retriever.safetensors").exists()
    check(run, tmp_path / "out", "prompt_0", 0, record_property)


@pytest.mark.torch
@pytest.mark.parametrize(
    "family", ["Llama", "Gemma 3"] + [pytest.param(family, marks=pytest.mark.campaign) for family in ("OPT", "GPT-2")]
)
def test_peft_generates_behind_an_exported_prefix_what_the_run_generates(family, folder_of, tmp_path, record_property):
    run = trained_run(str(folder_of(family)), bank__kind="prefixes")
    assert export_peft(run, tmp_path / "out") == ["prompt_0", "prompt_1"]
    check(run, tmp_path / "out", "prompt_1", 1, record_property)


@pytest.mark.torch
@pytest.mark.parametrize("family", ["OPT", "Llama", pytest.param("Gemma 3", marks=pytest.mark.campaign)])
def test_peft_generates_with_exported_low_rank_updates_what_the_run_generates(
    family, folder_of, tmp_path, record_property
):
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    run = trained_run(str(folder_of(family)), method__kind="lora", lora__targets=targets, lora__rank=3)
    assert export_peft(run, tmp_path / "out") == ["adapter"]
    check(run, tmp_path / "out", "adapter", 0, record_property)


def test_an_exported_bank_comes_back_bit_for_bit(llama, tmp_path):
    run = trained_run(llama, bank__num_prompts=3)
    export_peft(run, tmp_path / "out")
    bank = run.trainable["bank"]["prompts"]
    np.testing.assert_array_equal(from_peft(str(tmp_path / "out"), bank.shape, llama), bank)
    kept = load_file(tmp_path / "out" / "retriever.safetensors")
    np.testing.assert_array_equal(kept["bank/prompts"], bank)
    np.testing.assert_array_equal(kept["retriever/lin/kernel"], run.trainable["retriever"]["lin"]["kernel"])


@pytest.mark.parametrize("options", [{}, {"method__kind": "lora"}, {"bank__kind": "prefixes"}], ids=str)
def test_a_tree_sharded_over_eight_devices_gives_the_bytes_of_one(options, llama, tmp_path):
    run = trained_run(llama, **options)
    export_peft(run, tmp_path / "one")
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def spread(leaf: np.ndarray) -> jax.Array:
        axes = [("x" if size % 8 == 0 else None) for size in leaf.shape]
        first = axes.index("x") if "x" in axes else -1
        spec = PartitionSpec(*(axis if i == first else None for i, axis in enumerate(axes)))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    sharded = jax.tree.map(spread, run.trainable)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    export_peft(dataclasses.replace(run, trainable=sharded), tmp_path / "eight")
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path / "eight") for f in (tmp_path / "eight").rglob("*") if f.is_file())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "eight" / file).read_bytes(), file


def test_the_configuration_of_the_run_and_its_lm_go_along(llama, tmp_path):
    run = trained_run(llama)
    export_peft(run, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "spt_config.json").read_text())
    assert record["config"] == json.loads(json.dumps(run.config.to_dict()))
    assert record["lm"] == run.identity.to_dict()
    assert record["step"] == 7


def refused(run: Any, out: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        export_peft(run, out)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert list(out.parent.glob("*out*")) == []


@pytest.mark.parametrize("kind", ["full", "zero_shot", "few_shot"])
def test_methods_without_an_adapter_are_refused(kind, llama, tmp_path):
    refused(trained_run(llama, method__kind=kind), tmp_path / "out", kind, "lora")


def write_config(folder: Path, **fields: Any) -> str:
    """A folder with a configuration and a tokenizer, which is all that an export reads of an LM."""
    random_llama(num_hidden_layers=1).write_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


OPT = {
    "model_type": "opt",
    "vocab_size": 264,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}


def test_soft_prompts_behind_a_projection_are_refused(tmp_path):
    source = write_config(tmp_path / "opt-350m", **OPT, word_embed_proj_dim=32)
    refused(trained_run(source), tmp_path / "out", "opt-350m", "32", "M = 64")
    # Updates of the blocks have nothing to do with it.
    assert export_peft(trained_run(source, method__kind="lora"), tmp_path / "out") == ["adapter"]


GPT2 = {"model_type": "gpt2", "vocab_size": 264, "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 96}
COMMON = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
NEOX = {"model_type": "gpt_neox", **COMMON, "num_attention_heads": 4, "max_position_embeddings": 96}
PHI3 = {"model_type": "phi3", **COMMON, "num_attention_heads": 4, "max_position_embeddings": 96}


@pytest.mark.parametrize(
    ("fields", "target", "words"),
    [
        (GPT2, "v_proj", ("GPT-2", "c_attn")),
        (GPT2, "down_proj", ("GPT-2", "c_proj")),
        (NEOX, "q_proj", ("GPT-NeoX", "query_key_value")),
        (PHI3, "k_proj", ("Phi-3", "qkv_proj")),
        (PHI3, "gate_proj", ("Phi-3", "gate_up_proj")),
    ],
)
def test_updates_of_joined_or_transposed_projections_are_refused(fields, target, words, tmp_path):
    source = write_config(tmp_path / "lm", **fields)
    refused(trained_run(source, method__kind="lora", lora__targets=(target,)), tmp_path / "out", target, *words)


def test_rotary_positions_stretched_for_every_row_are_refused(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    lm = random_llama(num_hidden_layers=1, rope_scaling=scaling).write_folder(tmp_path / "lm")
    assert export_peft(trained_run(str(lm)), tmp_path / "short") == ["prompt_0", "prompt_1"]
    refused(trained_run(str(lm), model__context_length=256), tmp_path / "out", "256", "128")


def test_random_weights_are_refused(tmp_path):
    refused(trained_run("shape:opt-125m"), tmp_path / "out", "shape:opt-125m")


def test_a_folder_that_holds_something_is_left_as_it_is(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_peft(trained_run(llama), out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export_peft(trained_run(llama), out)
    assert (out / "prompt_0").is_dir()


def test_a_write_that_fails_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        export_peft(trained_run(llama), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]
