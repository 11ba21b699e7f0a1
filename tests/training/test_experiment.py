"""The rows of a run are kept by everything that they depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from llama_files import TOKENS, byte_level_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from spt_jax.config import Config, default_config
from spt_jax.data.few_shot import FewShot
from spt_jax.data.packing import PackedRows, Row
from spt_jax.data.persona_task import PersonaTemplate
from spt_jax.data.template import PlainTemplate, Template
from spt_jax.errors import UserError
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.training import experiment
from spt_jax.training.experiment import pack_dialogues, pad_id_of


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer(**({"backend": byte_level_tokenizer(), "bos_id": 1, "eos_id": 2, "pad_id": 0} | changes))


def without_merges() -> Backend:
    """The vocabulary of `byte_level_tokenizer`, and other tokens for the same text."""
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TOKENS[:3]])
    return backend


def config(*changes: tuple[str, str, Any]) -> Config:
    made = default_config()
    for section, name, value in changes:
        made[section][name] = value
    return made


def kept(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "rows").glob("*"))


def assert_same(found: PackedRows, expected: PackedRows) -> None:
    assert len(found.rows) == len(expected.rows)
    for a, b in zip(found.rows, expected.rows, strict=True):
        for field in dataclasses.fields(Row):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


OFFICIAL = config(
    ("retriever", "context", "official"), ("data", "freeze_context", False), ("data", "freeze_persona", False)
)
CASES: dict[str, Callable[[], PackedRows]] = {
    "as it is": lambda: pack_dialogues(config(), tiny.DIALOGUES, tokenizer()),
    "other merges": lambda: pack_dialogues(config(), tiny.DIALOGUES, tokenizer(backend=without_merges())),
    "no bos": lambda: pack_dialogues(config(), tiny.DIALOGUES, tokenizer(bos_id=None)),
    "a turn a row": lambda: pack_dialogues(config(), tiny.DIALOGUES, tokenizer(), layout="turn"),
    "shorter": lambda: pack_dialogues(config(("data", "max_length", 120)), tiny.DIALOGUES, tokenizer()),
    "fewer turns": lambda: pack_dialogues(
        config(("data", "layout", "turn"), ("data", "max_turns", 1)), tiny.DIALOGUES, tokenizer()
    ),
    "last turns": lambda: pack_dialogues(
        config(("data", "last_turn_only", True)), tiny.DIALOGUES, tokenizer(), learning=True
    ),
    "personas": lambda: pack_dialogues(config(), tiny.DIALOGUES, tokenizer(), PersonaTemplate()),
    "few-shot": lambda: pack_dialogues(
        config(("data", "max_length", 2000)),
        tiny.DIALOGUES,
        tokenizer(),
        FewShot(PlainTemplate(), tiny.DIALOGUES, 1),
    ),
    "official": lambda: pack_dialogues(OFFICIAL, tiny.DIALOGUES, tokenizer(), layout="turn"),
    "official, another pad": lambda: pack_dialogues(
        OFFICIAL, tiny.DIALOGUES, tokenizer(own_pad_id=TOKENS.index("c")), layout="turn"
    ),
}


def test_rows_from_the_cache_equal_rows_packed_anew_whatever_they_depend_on(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPT_JAX_CACHE_GB", "0")
    anew = {name: make() for name, make in CASES.items()}
    assert not cache_home.exists()
    monkeypatch.delenv("SPT_JAX_CACHE_GB")
    for number, (name, make) in enumerate(CASES.items(), start=1):
        assert_same(make(), anew[name])
        assert len(kept(cache_home)) == number, name

    def packed(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the rows were packed")

    monkeypatch.setattr(experiment, "pack", packed)
    monkeypatch.setattr(experiment, "official_rows", packed)
    for name, make in CASES.items():
        assert_same(make(), anew[name])


def test_two_tokenizers_of_one_vocabulary_have_one_fingerprint_and_two_contents() -> None:
    one, other = tokenizer(), tokenizer(backend=without_merges())
    assert one.encode(["ab"]) != other.encode(["ab"])
    assert one.fingerprint == other.fingerprint
    assert one.content_digest != other.content_digest
    assert one.content_digest == tokenizer().content_digest


def test_rows_of_an_encoder_or_template_of_somebody_else_are_not_kept(cache_home: Path) -> None:
    class Mine(PlainTemplate):
        pass

    template: Template = Mine()
    stranger: Any = tiny.CharacterEncoder()
    for _ in range(2):
        pack_dialogues(config(), tiny.DIALOGUES, tokenizer(), template)
        pack_dialogues(config(), tiny.DIALOGUES, stranger)
    assert kept(cache_home) == []


def test_the_official_mode_refuses_a_padding_that_the_lm_has_no_embedding_of() -> None:
    """It is read there, and what `jnp.take` gives for an id beyond the table is NaN."""
    size = tokenizer().vocab_size
    last = tokenizer(own_pad_id=size - 1).fitted(size, "a model")
    beyond = tokenizer(own_pad_id=size).fitted(size, "a model")
    assert pad_id_of(OFFICIAL, last) == size - 1
    with pytest.raises(UserError, match=f"pad token is {size}; allowed .* 0 to {size - 1}"):
        pad_id_of(OFFICIAL, beyond)
    assert pad_id_of(config(), beyond) == 0
