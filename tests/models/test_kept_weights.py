"""Weights from the cache folder are bitwise those that the file gives, or they are not taken from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from spt_jax.models import kept_weights, loading
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.models.weights import load_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_weights, "WORTH_NUMBERS", 1)


@pytest.fixture(scope="module")
def file(make_llama: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are quantised."""
    return make_llama().write_gguf(tmp_path_factory.mktemp("model") / "m.gguf", quantisation="Q4_1")


def kept(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "weights").glob("*"))


def assert_same(one: LanguageModel, other: LanguageModel) -> None:
    def same(a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(*(np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (a, b)))

    jax.tree.map(same, one.params, other.params)
    assert (one.config, one.identity) == (other.config, other.identity)


def from_the_file(file: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> LanguageModel:
    with monkeypatch.context() as without:
        without.setenv("SPT_JAX_CACHE_GB", "0")
        return load_lm(str(file), **options)


def from_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> LanguageModel:
    def dequantised(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the weights were read from the file")

    with monkeypatch.context() as broken:
        broken.setattr(loading, "load_params", dequantised)
        return load_lm(str(file), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_kept_weights_are_bitwise_those_dequantised(
    file: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, sharded: bool
) -> None:
    options: dict[str, Any] = {"dtype": dtype}
    if sharded:
        options["sharding_for"] = partial(parameter_sharding, make_mesh(2, 2, 2))
    expected = from_the_file(file, monkeypatch, **options)
    assert kept(cache_home) == []
    assert_same(load_lm(str(file), dtype=dtype), from_the_file(file, monkeypatch, dtype=dtype))
    assert len(kept(cache_home)) == 1
    assert_same(from_the_cache(file, monkeypatch, **options), expected)


def test_progress_is_told_up_to_the_last_parameter(file: Path, cache_home: Path) -> None:
    ends = []
    for _ in range(2):
        told: list[tuple[str, int, int]] = []
        load_lm(str(file), progress=lambda *step, told=told: told.append(step))
        assert {what for what, *_ in told} == {"loading weights"}
        ends.append(told[-1])
    assert ends[0] == ends[1]
    assert ends[0][1] == ends[0][2]


def test_another_type_file_or_code_is_another_entry(
    file: Path, make_llama: Make, cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_lm(str(file))
    load_lm(str(file), remat="full")
    assert len(kept(cache_home)) == 1
    load_lm(str(file), dtype="bfloat16")
    assert len(kept(cache_home)) == 2
    other = make_llama().write_gguf(tmp_path / "m.gguf", quantisation="Q8_0")
    assert_same(load_lm(str(other)), from_the_file(other, monkeypatch))
    assert len(kept(cache_home)) == 3
    monkeypatch.setattr(kept_weights, "code_digest", lambda package: "other code")
    load_lm(str(file))
    assert len(kept(cache_home)) == 4


def test_the_same_bytes_elsewhere_are_the_same_entry(file: Path, cache_home: Path, tmp_path: Path) -> None:
    load_lm(str(file))
    (tmp_path / "moved.gguf").write_bytes(file.read_bytes())
    load_lm(str(tmp_path / "moved.gguf"))
    assert len(kept(cache_home)) == 1


def cut(weights: Path, checksums: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1])


def flip(weights: Path, checksums: Path, place: int = -5000) -> None:
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)


def flip_header(weights: Path, checksums: Path) -> None:
    flip(weights, checksums, place=20)


def empty(weights: Path, checksums: Path) -> None:
    weights.write_bytes(b"")


def remove(weights: Path, checksums: Path) -> None:
    weights.unlink()


def swap(weights: Path, checksums: Path) -> None:
    """Two tensors under each other's name, so that every byte of numbers is right."""
    content = weights.read_bytes()
    names = b'"layers/attention/k_proj/kernel"', b'"layers/attention/v_proj/kernel"'
    assert all(content.count(name) == 1 for name in names)
    weights.write_bytes(
        content.replace(names[0], b"?" * len(names[0])).replace(*names[::-1]).replace(b"?" * 32, names[1])
    )


def lose_a_tensor(weights: Path, checksums: Path) -> None:
    known = json.loads(checksums.read_text())
    known.popitem()
    checksums.write_text(json.dumps(known))


def no_checksums(weights: Path, checksums: Path) -> None:
    checksums.unlink()


def garbage(weights: Path, checksums: Path) -> None:
    checksums.write_bytes(b"\xff[")


def a_list(weights: Path, checksums: Path) -> None:
    checksums.write_text("[]")


@pytest.mark.parametrize(
    "damage", [cut, flip, flip_header, empty, remove, swap, lose_a_tensor, no_checksums, garbage, a_list]
)
def test_a_damaged_entry_is_made_anew(
    file: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path, Path], None]
) -> None:
    expected = load_lm(str(file))
    [entry] = kept(cache_home)
    whole = {path.name: path.read_bytes() for path in entry.iterdir()}
    damage(entry / "model.safetensors", entry / "checksums.json")
    assert_same(load_lm(str(file)), expected)
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole
    assert_same(from_the_cache(file, monkeypatch), expected)


@pytest.mark.parametrize("why", ["off", "unusable", "no room", "full disk"])
def test_without_a_cache_folder_weights_are_dequantised(
    file: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    expected = from_the_file(file, monkeypatch)
    match why:
        case "off":
            monkeypatch.setenv("SPT_JAX_CACHE_GB", "0")
        case "unusable":
            cache_home.parent.write_text("a file where the folder should be")
        case "no room":
            monkeypatch.setenv("SPT_JAX_CACHE_GB", "1e-5")
        case _:

            def full(content: Any) -> int:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(kept_weights.zlib, "crc32", full)
    for _ in range(2):
        assert_same(load_lm(str(file)), expected)
    assert kept(cache_home) == []


@pytest.mark.parametrize("why", ["float", "folder", "small", "int8", "sharded"])
def test_what_is_read_as_fast_is_not_kept(
    make_llama: Make, file: Path, cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    options: dict[str, Any] = {}
    match why:
        case "float":
            file = make_llama().write_gguf(tmp_path / "m.gguf", quantisation="F16")
        case "folder":
            file = make_llama().write_folder(tmp_path / "m", dtype="bfloat16")
        case "small":
            monkeypatch.undo()
            monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home.parent))
        case "int8":
            options["quantization"] = "int8"
        case _:
            options["sharding_for"] = partial(parameter_sharding, make_mesh(1, 8, 1))
    load_lm(str(file), **options)
    assert kept(cache_home) == []


def test_loads_at_the_same_time_give_the_same_and_leave_one_entry(
    file: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = from_the_file(file, monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: load_lm(str(file)), range(8)))
    for lm in found:
        assert_same(lm, expected)
    assert len(kept(cache_home)) == 1
    assert_same(from_the_cache(file, monkeypatch), expected)


@pytest.mark.first_python
@pytest.mark.smollm2
def test_kept_weights_of_smollm2_are_bitwise_those_dequantised(
    smollm2_source: str, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_lm(smollm2_source, dtype="bfloat16")
    [entry] = kept(cache_home)
    assert sum(path.stat().st_size for path in entry.iterdir()) == pytest.approx(269e6, rel=0.01)
    assert_same(from_the_cache(Path(smollm2_source), monkeypatch, dtype="bfloat16"), expected)


def test_the_tree_is_that_of_load_params(file: Path, cache_home: Path) -> None:
    opened = loading.open_lm(str(file))
    assert opened.checkpoint is not None
    made = load_params(opened.config, opened.checkpoint, opened.table)
    for _ in range(2):
        tree = load_lm(str(file)).params
        assert jax.tree.structure(tree) == jax.tree.structure(made)
        jax.tree.map(np.testing.assert_array_equal, tree, made)


def test_a_mask_beside_the_weights_is_no_quantised_weight() -> None:
    """As Pythia's files have, a boolean of 2,048 by 2,048 a layer."""
    floats, shapes = {"w": "F16", "mask": "BOOL", "ids": "I64"}, {"w": (2, 2), "mask": (64, 64), "ids": (64,)}
    for kind, worth in (("F16", False), ("IQ4_XS", True), ("Q4_K", True)):
        checkpoint: Any = SimpleNamespace(dtypes=floats | {"w": kind}, shapes=shapes)
        assert kept_weights.is_worth_keeping(tiny.CONFIG, checkpoint) == worth
