"""A run that was never trained: a tiny random decoder whose tokens are bytes; and one that was, a little."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_run import train_arguments, walk

from spt_jax.config import default_config
from spt_jax.data.template import encode_context
from spt_jax.generation.replies import cut_reply
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import random_params
from spt_jax.prompting.adapters import Conditions


class ByteTokenizer:
    """UTF-8 bytes as tokens, and three special ones behind them."""

    bos_id, eos_id, pad_id = 256, 257, 258
    stop_ids, vocab_size = (257,), 259

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


@functools.cache
def _tiny_lm() -> Any:
    config = DecoderConfig(
        vocab_size=259,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
    )
    params = random_params(config, jax.random.key(0))
    params = {**params, "embed_tokens": params["embed_tokens"] * 10, "lm_head": params["lm_head"] * 50}
    return SimpleNamespace(config=config, params=params, tokenizer=ByteTokenizer())


@dataclasses.dataclass
class FakeRun:
    """What the doors need of a restored run; the retriever goes by the number of tokens."""

    max_length: int = 300
    prompts: int = 3
    encoded: list[tuple[tuple[str, ...], tuple[str, ...]]] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> ConfigDict:
        return default_config()

    @property
    def lm(self) -> Any:
        return _tiny_lm()

    @cached_property
    def conditions(self) -> Conditions:
        return Conditions(self.lm.params, jax.random.normal(jax.random.key(1), (self.prompts, 2, 8)))

    @property
    def cut(self) -> Callable[[str], str]:
        return cut_reply

    @property
    def stop_ids(self) -> Sequence[int]:
        return self.lm.tokenizer.stop_ids

    def score_contexts(self, contexts: Sequence[Sequence[int]]) -> np.ndarray:
        favourites = np.asarray([len(context) % self.prompts for context in contexts])
        return 0.25 + 0.5 * np.eye(self.prompts, dtype=np.float32)[favourites]

    def encode_context(self, persona: Sequence[str], history: Sequence[str], *, room: int = 0) -> list[int]:
        self.encoded.append((tuple(persona), tuple(history)))
        limit = min(self.max_length, self.lm.config.longest_row - 2 - room)
        return encode_context(ByteTokenizer(), persona, history, max_length=limit)


@pytest.fixture
def fake_run() -> FakeRun:
    return FakeRun()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with the files of `train_arguments` and their run in ``run``, trained and evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    walk(*train_arguments(folder, workdir=folder / "run"))
    walk("evaluate", f"--workdir={folder / 'run'}")
    return folder
