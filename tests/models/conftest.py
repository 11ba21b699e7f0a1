"""The random Llamas of `llama_files` as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llama_files import LlamaFiles, random_llama, write_tokenizer


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaFiles]:
    """`random_llama`."""
    return random_llama


@pytest.fixture(scope="session")
def tokenizer_files() -> Callable[[Path], None]:
    """Writes the byte-level tokenizer into a folder."""
    return write_tokenizer
