"""Torch's old weight files give the arrays that torch saved; damaged ones are refused in a sentence."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch_archives import Pickled, archive, reading, refused, two_tensors

from spt_jax.errors import UserError
from spt_jax.models.files.safetensors_file import SafetensorsFolder
from spt_jax.models.files.torch_file import TorchFolder
from spt_jax.models.files.weight_files import weights_of_folder
from spt_jax.models.loading import load_lm


def test_a_file_is_read_without_torch(tmp_path: Path) -> None:
    values = two_tensors(tmp_path)
    weights = weights_of_folder(tmp_path)
    assert isinstance(weights, TorchFolder)
    assert weights.shapes == {"a": (2, 3), "b": (4,)} and weights.dtypes == {"a": "F32", "b": "F16"}
    assert weights.files == (tmp_path / "pytorch_model.bin",) and weights.where == str(tmp_path)
    for name, value in values.items():
        found = weights.read(name)
        np.testing.assert_array_equal(found, value)
        assert found.dtype == value.dtype
        assert is_mapped(found) and not found.flags.writeable


def is_mapped(array: Any) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


@st.composite
def torch_states(draw: st.DrawFn) -> dict[str, Any]:
    """State dicts of tensors with random types, strides, offsets and storages, some of them shared."""
    torch = pytest.importorskip("torch")
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
    state = {}
    for i in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(kinds))
        base = (torch.arange(120) * 3 % 101).to(kind)
        for j in range(draw(st.integers(1, 3))):
            shape = draw(st.lists(st.integers(0, 4), max_size=3))
            strides = [draw(st.integers(0, 12)) for _ in shape]
            offset = draw(st.integers(0, 11))
            view = torch.as_strided(base, shape, strides, offset)
            state[f"t{i}.{j}"] = torch.nn.Parameter(view) if draw(st.booleans()) and kind.is_floating_point else view
    return state


def expected_of(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.torch
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_torch_saves_is_read_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    state = data.draw(torch_states())
    folder = tmp_path_factory.mktemp("torch")
    torch.save(state, folder / "pytorch_model.bin", pickle_protocol=data.draw(st.sampled_from([2, 3, 4, 5])))
    weights = TorchFolder(folder)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.dtype.is_floating_point:
            found = weights.read(name)
            assert found.dtype.itemsize == tensor.element_size()
            np.testing.assert_array_equal(found.astype(np.float64), expected_of(tensor))
        else:
            with pytest.raises(UserError, match=f"{name}.* has type .*not supported; supported: F64, F32, F16, BF16"):
                weights.read(name)


@pytest.mark.torch
def test_state_dicts_of_modules_with_tied_weights_and_buffers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 4), "head": torch.nn.Linear(4, 7, bias=False)})
    module["head"].weight = module["embed"].weight
    module.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
    module["bfloat16_part"] = torch.nn.Linear(4, 4).to(torch.bfloat16)
    module["head"].register_forward_hook(lambda *_: None)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    weights = TorchFolder(tmp_path)
    assert set(weights.shapes) == set(module.state_dict()) and weights.dtypes["mask"] == "BOOL"
    for name, tensor in module.state_dict().items():
        if name != "mask":
            np.testing.assert_array_equal(weights.read(name).astype(np.float64), expected_of(tensor))
    np.testing.assert_array_equal(weights.read("head.weight"), weights.read("embed.weight"))


@pytest.mark.torch
def test_checksums_that_torch_left_out_are_not_asked_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(TorchFolder(tmp_path).read("a"), np.ones(3))


def sharded(folder: Path) -> dict[str, np.ndarray]:
    write, values = Pickled(), {f"t{i}": np.full((2, 2), i, "<f4") for i in range(3)}
    shards = {name: f"pytorch_model-0000{i + 1}-of-00003.bin" for i, name in enumerate(values)}
    for name, value in values.items():
        pickled = write.state({name: write.tensor("0", "FloatStorage", 4, 0, (2, 2), (2, 1))})
        archive(folder / shards[name], pickled, {"0": value.tobytes()})
    index = {"metadata": {"total_size": 48}, "weight_map": shards}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return values


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    values = sharded(tmp_path)
    archive(tmp_path / "pytorch_model-00004-of-00004.bin", b"not named by the index", {})
    weights = weights_of_folder(tmp_path)
    assert [file.name for file in weights.files] == [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    for name, value in values.items():
        np.testing.assert_array_equal(weights.read(name), value)


def test_missing_shards_and_bad_indices_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    refused(tmp_path, "names 3 shards", "pytorch_model-00002-of-00003.bin is missing")
    index = tmp_path / "pytorch_model.bin.index.json"
    for content, words in {
        '{"weights": {}}': ("weight_map",),
        '{"weight_map": ["a"]}': ("not an index",),
        '{"weight_map": {"a": 1}}': ("not an index",),
        '{"weight_map": {}}': ("is empty",),
        "{": ("not an index",),
        '{"weight_map": {"a": "../pytorch_model.bin"}}': ("'../pytorch_model.bin'", "not a file in its own folder"),
        '{"weight_map": {"a": "/etc/hostname"}}': ("'/etc/hostname'", "not a file in its own folder"),
    }.items():
        index.write_text(content)
        refused(tmp_path, "pytorch_model.bin.index.json", *words)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = (tmp_path / f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    refused(tmp_path, "'t0' is in both", first.name, second.name)


def test_safetensors_come_first_and_other_formats_are_named(tmp_path: Path) -> None:
    refused(tmp_path, "no weight file", "model.safetensors", "pytorch_model.bin")
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    refused(tmp_path, "tf_model.h5", "not supported", "*.safetensors", "pytorch_model.bin")
    two_tensors(tmp_path)
    assert isinstance(weights_of_folder(tmp_path), TorchFolder)
    save_file({"a": np.zeros((0, 3), np.float32), "b": np.array(2, np.float16)}, tmp_path / "model.safetensors")
    weights = weights_of_folder(tmp_path)
    assert isinstance(weights, SafetensorsFolder)
    assert weights.dtypes == {"a": "F32", "b": "F16"} and weights.read("a").shape == (0, 3) and weights.read("b") == 2


def test_files_that_are_no_archive_of_torch_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for content, words in {
        b"": ("is empty",),
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.": ("not supported", "1.6", "safetensors"),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": ("git-lfs pointer", "git lfs pull"),
        b"<!doctype html>": ("not supported", "<!do"),
        b"PK\x03\x04": ("truncated or damaged",),
    }.items():
        file.write_bytes(content)
        refused(tmp_path, "pytorch_model.bin", *words)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("model/weights", b"x")
    refused(tmp_path, "not one of torch.save")
    two_tensors(tmp_path)
    with zipfile.ZipFile(file) as stored:
        entries = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in entries.items():
            compressed.writestr(name, content)
    refused(tmp_path, "'model/data.pkl' is compressed")


def test_byte_order_is_little_or_refused(tmp_path: Path) -> None:
    write = Pickled()
    pickled = write.state({"a": write.tensor("0", "FloatStorage", 6, 0, (6,), (1,))})
    archive(tmp_path / "pytorch_model.bin", pickled, {"0": bytes(24)}, byteorder=b"big")
    refused(tmp_path, "byte order b'big'", "b'little'")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("fuzz")
    values = two_tensors(folder)
    return folder, (folder / "pytorch_model.bin").read_bytes(), values


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_refused(fuzzed: tuple[Path, bytes, dict[str, np.ndarray]], data: st.DataObject) -> None:
    folder, content, _ = fuzzed
    (folder / "pytorch_model.bin").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert reading(folder) is None


@pytest.mark.parametrize("writer", ["zipfile", pytest.param("torch", marks=pytest.mark.torch)])
def test_a_flipped_bit_is_refused_or_harmless_outside_the_weights(writer: str, tmp_path: Path) -> None:
    values, file = two_tensors(tmp_path), tmp_path / "pytorch_model.bin"
    if writer == "torch":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(value) for name, value in values.items()}, file)
    content = file.read_bytes()
    weights = [range(start, start + v.nbytes) for v in values.values() for start in [content.index(v.tobytes())]]
    refusals = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place * 5 % 8
        file.write_bytes(damaged)
        found = reading(tmp_path)
        refusals += found is None
        if found is not None:
            assert {name: v.shape for name, v in found.items()} == {name: v.shape for name, v in values.items()}
            for (name, value), span in zip(values.items(), weights, strict=True):
                assert (place in span) or np.array_equal(found[name], value), (place, name)
    assert refusals > len(content) / 4


def test_a_model_from_bin_files_is_the_model_from_safetensors(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    files, write = make_llama(), Pickled()
    folder = files.write_folder(tmp_path / "old")
    (folder / "model.safetensors").unlink()
    values = {name: np.ascontiguousarray(value) for name, value in files.tensors.items()}
    tensors = {
        name: write.tensor(str(i), "FloatStorage", v.size, 0, v.shape, tuple(n // 4 for n in v.strides))
        for i, (name, v) in enumerate(values.items())
    }
    storages = {str(i): value.tobytes() for i, value in enumerate(values.values())}
    archive(folder / "pytorch_model.bin", write.state(tensors), storages)
    old, new = load_lm(str(folder)), load_lm(str(files.write_folder(tmp_path / "new")))
    assert jax.tree.structure(old.params) == jax.tree.structure(new.params)
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
