"""Models without files: their sizes are the published ones, their weights are random, sharded and the same anywhere."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.registry import FAMILIES, family_of_hf
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.loading import load_lm, load_tokenizer, open_lm
from spt_jax.models.random_lm import byte_tokenizer, matrix_maker, random_lm_params
from spt_jax.models.shapes import SHAPES, shape_fields
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding

pytestmark = pytest.mark.first_python

# As the model cards and the files on the hub have them, without buffers; a tied head counts once. Gemma 3 from 4B on
# is the text part alone.
PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "llama-7b": 6_738_415_616,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mistral-7b": 7_241_732_096,
    "phi3-mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "stablelm2-1.6b": 1_644_515_328,
    "stablelm2-12b": 12_143_185_920,
}


def decoder_of(source: str, **changes: Any) -> DecoderConfig:
    fields = shape_fields(source)
    return dataclasses.replace(family_of_hf(fields, source).config_from_hf(fields, source), **changes)


def leaves_of(config: DecoderConfig) -> list[nn.LogicallyPartitioned]:
    return jax.tree.leaves(abstract_params(config), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    leaves = leaves_of(decoder_of(f"shape:{name}"))
    assert sum(math.prod(leaf.value.shape) for leaf in leaves) == PARAMETERS[name]


@pytest.mark.torch
def test_transformers_counts_the_same_parameters_for_every_shape() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    counts = {}
    for name, fields in SHAPES.items():
        rest = {key: value for key, value in fields.items() if key != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields["model_type"], **rest))
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    assert counts == PARAMETERS


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("opt-125", "no shape 'opt-125'; allowed: opt-125m, .*Did you mean 'opt-125m'"),
        ("llama-2-7b", "Did you mean 'llama2-7b'"),
        ("", "there is no shape ''"),
        ("gpt2?layers=0", "'layers=0' is no override of a shape; allowed: layers=N with N from 1 to 12"),
        ("gpt2?layers=13", "N from 1 to 12"),
        ("gpt2?width=3", "'width=3' is no override"),
        ("gpt2?", "'' is no override"),
    ],
)
def test_an_unknown_shape_is_refused_before_anything_is_made(name: str, sentence: str) -> None:
    for door in (load_lm, load_tokenizer, open_lm):
        if door is load_tokenizer and name.startswith("gpt2"):
            continue
        with pytest.raises(UserError, match=sentence):
            door(f"shape:{name}")


@pytest.mark.parametrize("name", ["gpt2", "smollm3-3b", "gemma3-1b", "pythia-70m"])
def test_layers_keeps_the_first_blocks_and_what_they_are(name: str) -> None:
    whole, short = decoder_of(f"shape:{name}"), decoder_of(f"shape:{name}?layers=4")
    assert (short.num_layers, short.hidden_size) == (4, whole.hidden_size)

    def kinds(config: DecoderConfig) -> list[Any]:
        return [config.layer_kinds[i] for i in (config.layer_pattern or [0] * config.num_layers)]

    assert kinds(short) == kinds(whole)[:4]


def small(**changes: Any) -> DecoderConfig:
    """A decoder with every kind of leaf: tables, stacked kernels, biases and scales."""
    return dataclasses.replace(
        decoder_of("shape:opt-350m?layers=3"),
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        embedding_size=32,
        max_position_embeddings=64,
        **changes,
    )


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_same_weights_are_made_on_any_devices_where_they_belong(axes: tuple[int, int, int]) -> None:
    mesh = make_mesh(*axes)
    alone = random_lm_params(small())
    calls: list[tuple[str, int, int]] = []
    shared = random_lm_params(
        small(), sharding_for=partial(parameter_sharding, mesh), progress=lambda *call: calls.append(call)
    )
    for one, other, leaf in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), leaves_of(small()), strict=True):
        np.testing.assert_array_equal(one, other)
        assert other.sharding.is_equivalent_to(parameter_sharding(mesh, leaf.names, one.shape), one.ndim)
    total = sum(leaf.size for leaf in jax.tree.leaves(alone))
    assert calls[-1] == ("making random weights", total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_matrices_are_centred_with_a_spread_of_one_in_fifty_and_no_two_rows_or_layers_agree() -> None:
    params = random_lm_params(small())
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float64)
    for matrix in (kernel, np.asarray(params["embed_tokens"], np.float64)):
        assert abs(matrix.mean()) < 5 * 0.02 / math.sqrt(matrix.size)
        assert abs(matrix.std() - 0.02) < 0.0005
    rows = kernel.reshape(-1, kernel.shape[-1])
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 6 / math.sqrt(rows.shape[1])
    other = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"]).reshape(-1)
    assert abs(np.corrcoef(kernel.reshape(-1), other)[0, 1]) < 0.02


@pytest.mark.parametrize("plus_one", [False, True])
def test_biases_are_zero_and_norms_the_identity(plus_one: bool) -> None:
    norm = random_lm_params(small(norm_plus_one=plus_one))["layers"]["attention_norm"]
    assert np.all(np.asarray(norm["scale"]) + plus_one == 1)
    assert np.all(np.asarray(norm["bias"]) == 0)


@pytest.mark.parametrize("source", ["shape:llama2-7b", "shape:opt-6.7b"])
def test_making_a_model_of_seven_billion_parameters_needs_no_buffer_beside_it(source: str) -> None:
    # What XLA says of each program at its real size; nothing is allocated here.
    mesh = make_mesh(1, 4, 2)
    block = 0
    needed = []
    for leaf in leaves_of(decoder_of(source, dtype="bfloat16")):
        shape, dtype = leaf.value.shape, leaf.value.dtype
        stacked = leaf.names[0] == "layers"
        block += math.prod(shape[1:]) * 2 if stacked else 0
        make: Any = matrix_maker(stacked, shape, dtype, parameter_sharding(mesh, leaf.names, shape))
        analysis = make.lower(jax.ShapeDtypeStruct((), jnp.uint32)).compile().memory_analysis()
        needed.append(8 * analysis.temp_size_in_bytes)
    assert block > 400e6
    assert max(needed) < block / 4


def test_a_shape_loads_like_any_model() -> None:
    lm = load_lm("shape:smollm2-135m?layers=1", dtype="bfloat16", remat="full")
    assert lm.config.remat == "full"
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype("bfloat16")}
    expected = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(abstract_params(lm.config)))
    assert jax.tree.map(lambda leaf: leaf.shape, lm.params) == expected
    assert (lm.identity.name, lm.identity.revision) == ("shape:smollm2-135m?layers=1", "")
    assert lm.tokenizer.fingerprint == load_tokenizer("shape:smollm2-135m").fingerprint


def test_the_identity_follows_the_shape_and_not_how_it_is_stored() -> None:
    def sha256(source: str, dtype: str = "float32") -> str:
        return load_lm(source, dtype=dtype).identity.sha256

    whole = sha256("shape:pythia-70m?layers=1")
    assert whole == sha256("shape:pythia-70m?layers=1", dtype="bfloat16")
    assert whole != sha256("shape:pythia-70m?layers=2")
    assert whole != sha256("shape:gpt2?layers=1")
    assert len(whole) == 64


def test_a_revision_of_a_shape_is_refused() -> None:
    with pytest.raises(UserError, match="revision 'main' is given, but model source 'shape:gpt2' is not a hub id"):
        open_lm("shape:gpt2", revision="main")


TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(codec="utf-8")))
def test_bytes_are_tokens_and_come_back(text: str) -> None:
    [ids] = TOKENIZER.encode([text])
    assert ids == [3 + byte for byte in text.encode()]
    assert TOKENIZER.decode([0, *ids, TOKENIZER.eos_id]) == text


def test_spelled_out_special_tokens_are_bytes() -> None:
    assert len(TOKENIZER.encode(["</s><pad>"])[0]) == len("</s><pad>")
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.vocab_size) == (0, 1, 2, 259)


def test_the_page_of_models_names_every_shape_and_every_family() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    named = page.read_text(encoding="utf-8")
    spelled = [name for family in FAMILIES for name in (*family.model_types, *family.gguf_architectures)]
    assert not [name for name in (*SHAPES, *spelled) if f"`{name}`" not in named]
    families = {line.split("|")[1].strip() for line in named.splitlines() if line.startswith("| ")}
    assert {family.name for family in FAMILIES} <= families
