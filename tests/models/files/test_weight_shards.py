"""A weight file that moves or shrinks between header and weights ends in a sentence, not in a killed process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch_archives import two_tensors

from spt_jax.errors import UserError
from spt_jax.models.files.weight_files import weights_of_folder
from spt_jax.models.loading import open_lm
from spt_jax.models.weights import load_params

Make = Callable[..., Any]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("change", [cut, empty, Path.unlink])
def test_a_shard_that_changes_after_its_header_was_read_is_refused(
    change: Callable[[Path], None], make_llama: Make, tmp_path: Path
) -> None:
    opened = open_lm(str(make_llama().write_folder(tmp_path, shards=3)))
    assert opened.checkpoint is not None
    change(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors has changed since its header was read"):
        load_params(opened.config, opened.checkpoint, opened.table)


@pytest.mark.parametrize("change", [empty, Path.unlink])
def test_so_is_a_file_of_torch(change: Callable[[Path], None], tmp_path: Path) -> None:
    tensors = two_tensors(tmp_path)
    checkpoint = weights_of_folder(tmp_path)
    change(tmp_path / "pytorch_model.bin")
    for name in tensors:
        with pytest.raises(UserError, match=r"pytorch_model.bin has changed since its header was read"):
            checkpoint.read(name)
