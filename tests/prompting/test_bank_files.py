"""A bank from a file is the file's numbers, in whatever type and packing, or a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from spt_jax.errors import UserError
from spt_jax.prompting.bank import from_file

BANK = np.linspace(-1, 1, 12).reshape(2, 3, 2)
SHAPE = (2, 3, 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64", "longdouble", "int8", ml_dtypes.bfloat16])
def test_numbers_of_every_type_are_read(dtype: Any, tmp_path: Path) -> None:
    bank = (BANK * 8).astype(dtype)
    if dtype is not ml_dtypes.bfloat16:  # which .npy has no name for
        np.save(tmp_path / "bank.npy", bank)
        found = from_file(str(tmp_path / "bank.npy"), SHAPE)
    else:
        save_file({"prompts": bank}, tmp_path / "bank.safetensors")
        found = from_file(str(tmp_path / "bank.safetensors"), SHAPE)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, bank.astype(np.float32))


def test_what_lies_beside_the_bank_in_an_archive_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    np.savez_compressed(path, prompts=BANK, moments=np.zeros(10_000_000), names=np.asarray(["a"]))
    np.testing.assert_array_equal(from_file(str(path), SHAPE), BANK.astype(np.float32))
    np.savez_compressed(path, alone=BANK)
    np.testing.assert_array_equal(from_file(str(path), SHAPE), BANK.astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"prompts": np.asarray([[["a"]]])}, "holds <U1; allowed: floating point and whole numbers"),
        ({"prompts": BANK.astype(complex)}, "holds complex128; allowed"),
        ({"prompts": BANK[:1]}, r"shape \(1, 3, 2\), but the bank needs \(K, P, M\) = \(2, 3, 2\)"),
        ({"prompts": BANK * 1e300}, "holds values that are not finite"),
        ({"a": BANK, "b": BANK}, r"holds \['a', 'b'\]; allowed: one array, or one named 'prompts'"),
        ({}, "allowed: one array"),
        ({"prompts": np.zeros(10_000_000)}, "cannot be read .its arrays take 80000128 bytes unpacked; allowed"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_what_is_no_bank_is_one_sentence(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match=said) as error:
        from_file(str(path), SHAPE)
    assert str(path) in str(error.value)
