"""Tokenizers: from a GGUF's metadata against sentencepiece, and from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.gguf_tokenizer import tokenizer_of_gguf
from spt_jax.models.tokenization.tokenizer import Tokenizer


def words_of(name: str, text: str) -> list[str]:
    """How a pre-tokenizer kind cuts `text`: merges never cross a cut, so the cuts are asked of the backend."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": ["<e>", *sorted(pre_tokenizers.ByteLevel.alphabet())],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 0,
    }
    backend = tokenizer_of_gguf(metadata, "x.gguf").backend
    assert backend.pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["it", "'s", " 12345", " o", "'", "CLOCK", ",", " \n", " ok"]),
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "5", " o", "'", "CLOCK", ",", " \n", " ok"]),
        ("llama-bpe", ["it", "'s", " ", "123", "45", " o", "'CLOCK", ",", " \n", " ok"]),
        ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", "5", " o", "'CLOCK", ",", " \n", " ok"]),
        ("dbrx", ["it", "'s", " ", "123", "45", " o", "'CLOCK", ",", " \n", " ok"]),
        ("gpt-4o", ["it's", " ", "123", "45", " o", "'CLOCK", ",", " \n", " ok"]),
        ("tekken", ["it", "'s", " ", "1", "2", "3", "4", "5", " o", "'CLOCK", ",", " \n", " ok"]),
        ("default", ["it", "'", "s", " ", "123", "45", " o", "'", "CLOCK", ",", " \n", " ok"]),
    ],
)
def test_each_pre_tokenizer_cuts_its_own_way(name: str, words: list[str]) -> None:
    assert words_of(name, "it's 12345 o'CLOCK, \n ok") == words


@pytest.fixture(scope="module")
def llama2(shared_dir: Path) -> tuple[Any, Tokenizer]:
    """Sentencepiece's own reading of Llama 2's tokenizer, and ours from GGUF metadata made of its pieces."""
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(shared_dir / "data/tokenizers/llama2/tokenizer.model"))
    ids = range(oracle.vocab_size())
    kinds = [2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in ids]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [oracle.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return oracle, tokenizer_of_gguf(metadata, "llama2.gguf")


HARD = ["", " ", "  hi", "a  b   c ", "naïve 東京 🙂 \U0001f469‍💻", "line\nbreak\ttab", "12345 5:30", "x" * 50, "ﬁ½"]


def test_sentencepiece_kind_encodes_as_sentencepiece(llama2: tuple[Any, Tokenizer], shared_dir: Path) -> None:
    oracle, tokenizer = llama2
    dialogues = read_dialogues(str(shared_dir / "data/convai2/valid_self_original_no_cands.txt")).dialogues[:200]
    texts = [" ".join((*d.persona, *(f"Q: {t.query} R: {t.response}" for t in d.turns))) for d in dialogues]
    for text, row in zip(texts + HARD, tokenizer.encode(texts + HARD), strict=True):
        assert row == oracle.encode(text), text
        assert tokenizer.decode(row) == text


def test_sentencepiece_kind_keeps_specials_out_of_text(llama2: tuple[Any, Tokenizer]) -> None:
    _, tokenizer = llama2
    [row] = tokenizer.encode(["hi </s> there"])
    assert 2 not in row and tokenizer.decode(row) == "hi </s> there"
    assert tokenizer.decode([1, *row, 2]) == "hi </s> there"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 2, 32000)


def test_a_word_in_two_cases_is_cut_where_the_case_says() -> None:
    assert words_of("gpt-4o", "camelCase IT'S naïveÉ") == ["camel", "Case", " IT'S", " naïve", "É"]
    assert words_of("tekken", "camelCase IT'S") == ["camel", "Case", " IT", "'S"]
    assert words_of("llama-bpe", "camelCase IT'S") == ["camelCase", " IT", "'S"]


def test_folder_tokenizer_is_the_tokenizer_json_in_it(shared_dir: Path) -> None:
    from tokenizers import Tokenizer as Backend

    for name in ("llama-tiny", "opt-tiny"):
        folder = shared_dir / "golden/models" / name
        ours, file = tokenizer_of_folder(folder), Backend.from_file(str(folder / "tokenizer.json"))
        texts = ["given persona: i have 2 dogs . ; context: Q: hello", "  hi", "naïve\n🙂"]
        assert ours.encode(texts) == [e.ids for e in file.encode_batch(texts, add_special_tokens=False)]
        assert ours.vocab_size == file.get_vocab_size()
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 2, 1)


def test_a_tokenizer_model_is_read_as_sentencepiece_reads_it(llama2: tuple[Any, Tokenizer], shared_dir: Path) -> None:
    oracle, from_gguf = llama2
    tokenizer = tokenizer_of_folder(shared_dir / "data/tokenizers/llama2")
    assert tokenizer.encode(HARD) == [oracle.encode(text) for text in HARD]
    assert tokenizer.fingerprint == from_gguf.fingerprint


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizer_of_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read as a sentencepiece model"):
        tokenizer_of_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizer_of_folder(tmp_path)


def test_the_end_of_sequence_may_come_from_the_configuration(
    tmp_path: Path, tokenizer_files: Callable[[Path], None]
) -> None:
    tokenizer_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="end-of-sequence"):
        tokenizer_of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 1]}')
    tokenizer = tokenizer_of_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 2)


def test_fingerprint_sees_the_vocabulary_and_the_special_ids(llama2: tuple[Any, Tokenizer]) -> None:
    _, tokenizer = llama2
    assert Tokenizer(tokenizer.backend, 1, 2, 0).fingerprint != tokenizer.fingerprint
    assert Tokenizer(tokenizer.backend, 1, 2, 2).fingerprint == tokenizer.fingerprint
