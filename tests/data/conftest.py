"""The reference files and real tokenizers the data tests read."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_encoders import FastEncoder

from spt_jax.data import DialogueSet, Row, pack, read_dialogues


@pytest.fixture(scope="session")
def valid_file(shared_dir: Path) -> Path:
    return shared_dir / "data" / "convai2" / "valid_self_original_no_cands.txt"


@pytest.fixture(scope="session")
def train_file(shared_dir: Path) -> Path:
    return shared_dir / "data" / "convai2" / "train_self_original_no_cands.first10000turns.txt"


@pytest.fixture(scope="session")
def valid_set(valid_file: Path) -> DialogueSet:
    return read_dialogues(str(valid_file))


@pytest.fixture(scope="session")
def train_set(train_file: Path) -> DialogueSet:
    return read_dialogues(str(train_file))


@pytest.fixture(scope="session")
def opt_encoder(shared_dir: Path) -> FastEncoder:
    folder = shared_dir / "data" / "tokenizers" / "opt"
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return FastEncoder(tokenizer, bos_id=2, eos_id=2, pad_id=1)


@pytest.fixture(scope="session")
def train_rows(train_set: DialogueSet, opt_encoder: FastEncoder) -> list[Row]:
    """The training file in the dialogue layout, 512 tokens, OPT's tokenizer."""
    return pack(train_set.dialogues, opt_encoder, layout="dialogue", max_length=512).rows


@pytest.fixture(scope="session")
def llama_encoder(shared_dir: Path) -> FastEncoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data" / "tokenizers" / "llama2")
    return FastEncoder(tokenizer.backend_tokenizer, bos_id=1, eos_id=2, pad_id=0)


@pytest.fixture(scope="session")
def smollm2_encoder(smollm2_source: str) -> FastEncoder:
    """SmolLM2's byte-level BPE, built from the GGUF file's metadata."""
    gguf = pytest.importorskip("gguf")
    files = importlib.metadata.distribution(smollm2_source.replace("package:", "")).files or []
    path = next(file.locate() for file in files if file.suffix == ".gguf")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return FastEncoder(tokenizer, bos_id=1, eos_id=2, pad_id=2)
