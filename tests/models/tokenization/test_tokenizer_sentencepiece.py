"""Sentencepiece models with pieces of every kind, trained here, against sentencepiece itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_jax.errors import UserError
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.tokenizer import Tokenizer

BLANKS = ["▁▁", "▁▁▁", "▁▁▁▁"]
TEXT = "the cat sat on the mat and the hat <b>was</b> flat\nthat is that , a bat at a vat"
# Runs of spaces longer than the longest piece are the one case where transformers, and so we, differ.
TEXTS = st.text("abhtest \n<>/🙂é", max_size=40).map(lambda text: re.sub(" {5,}", "    ", text))


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """Sentencepiece's reading of a model with user-defined, control and byte pieces, and ours."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        user_defined_symbols=["\n", "\n\n", "<b>", "</b>", *BLANKS],
        control_symbols=["<turn>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return oracle, tokenizer_of_folder(folder)


@settings(deadline=None)
@given(TEXTS)
def test_pieces_of_every_kind_encode_as_in_sentencepiece(trained: tuple[Any, Tokenizer], text: str) -> None:
    oracle, tokenizer = trained
    if oracle.encode("a")[0] != oracle.piece_to_id("a"):
        # Behind a user-defined piece our backend, like transformers', puts the space prefix again.
        text = re.sub("[\n<>]", "", text)
    assert tokenizer.encode([text]) == [oracle.encode(text)]
    assert tokenizer.decode(oracle.encode(text)) == text


def test_control_pieces_are_never_found_in_a_text(trained: tuple[Any, Tokenizer]) -> None:
    oracle, tokenizer = trained
    [row] = tokenizer.encode(["a <turn> </s> b"])
    assert not {oracle.piece_to_id("<turn>"), oracle.eos_id()} & set(row)
    assert tokenizer.decode([1, *row, oracle.piece_to_id("<turn>"), 2]) == "a <turn> </s> b"


def test_a_model_that_is_not_bpe_or_is_cut_off_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="is not a plain BPE sentencepiece model"):
        tokenizer_of_folder(tmp_path)
    content = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as a sentencepiece model"):
        tokenizer_of_folder(tmp_path)
