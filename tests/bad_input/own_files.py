"""Readers of what the program itself has written, and may find changed: caches, journals, records, adapters, banks.

What is silently made anew where it is damaged is given a sentence here, so that a test can count it.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch_archives
from driver import Reader
from llama_files import write_tokenizer
from readers import parlai
from safetensors.numpy import save
from tokenizers import pre_tokenizers

from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.kept_rows import kept_rows, rows_to_bytes
from spt_jax.data.packing import PackedRows, Row
from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.evaluation.candidate_scores import CandidateScores
from spt_jax.evaluation.journal import Journal, KeptColumn
from spt_jax.evaluation.likelihood import Likelihoods
from spt_jax.evaluation.report_curves import curve_sections
from spt_jax.interop.official import read_official_tensors
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.prompting.bank import from_file
from spt_jax.prompting.peft_prompts import (
    ADAPTER_CONFIG,
    ADAPTER_TORCH_WEIGHTS,
    ADAPTER_WEIGHTS,
    PROMPT_KEY,
    PROMPT_TUNING,
    read_prompt,
)
from spt_jax.storage.read_copy import JOURNAL
from spt_jax.sweeps.description import Objective
from spt_jax.sweeps.metrics import logged_values
from spt_jax.training.tracking import METRICS_FILE, logged_rows
from spt_jax.training.workdir import CONFIG_FILE, read_config

PROGRAMS = Path(os.environ["SPT_JAX_TESTS_CACHE"])
"""Where JAX keeps what the tests have compiled."""
_TURNS = [(0, 0), (0, 1), (1, 0), (2, 0)]


def _column(path: Path) -> KeptColumn:
    """The column of a journal's file ``evaluation.partial/question/column.…``."""
    return Journal(path.parents[2], path.parent.name).column(path.name.split(".")[0])


def _written(name: str, write: Callable[[KeptColumn], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _journal(name)
        write(_column(path))
        return path.read_bytes()


def _journal(name: str) -> str:
    return f"{JOURNAL}question/column{name}"


def _likelihoods(column: KeptColumn) -> None:
    dialogue, turn = np.asarray(_TURNS).T
    nll = np.linspace(1, 2, 8, dtype=np.float32).reshape(4, 2)
    column.keep_likelihoods(Likelihoods(dialogue, turn, np.arange(4) + 3, nll, -nll))


def _replies(column: KeptColumn) -> None:
    column.keep_replies(_TURNS, ["hello .", "i like tea .", "é", ""])


def _candidates(column: KeptColumn) -> None:
    column.keep_candidates(_TURNS, [CandidateScores(np.asarray([1.5, 2.0]), np.asarray([3, 4]))] * 4)


def _whole_or_anew(path: Path, whole: bool) -> None:
    if not whole:
        raise UserError(f"{path} is not whole, and begun anew")


def _rows() -> PackedRows:
    ids = [np.arange(length, dtype=np.int32) for length in (5, 3, 4, 2, 5)]
    return PackedRows([Row(*ids, 0, np.arange(2, dtype=np.int32), None)] * 2, 1, 2, 3, 4)


_DIALOGUES = [Dialogue(("i sail .",), (Turn("hi", "hello"),), source="a.txt:1")]


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ["XDG_CACHE_HOME"]
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ["XDG_CACHE_HOME"] = before


def _entry() -> str:
    """Where the cache keeps `_rows`, in its folder."""
    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder)):
        kept_rows(_rows, _DIALOGUES, ["tokenizer"])
        (path,) = Path(folder, "spt_jax", "rows").iterdir()
        return str(path.relative_to(folder))


def _read_rows(path: Path) -> None:
    def made_anew() -> PackedRows:
        raise UserError(f"{path} is damaged, and made anew")

    with _cache_in(path.parents[2]):
        kept_rows(made_anew, _DIALOGUES, ["tokenizer"])


def _read_metrics(path: Path) -> None:
    curve_sections(logged_rows(path))
    _whole_or_anew(path, len(logged_values(path.parent, Objective("loss/total", "minimize"))) == 6)


_METRICS = "".join(
    json.dumps({"step": step, "loss/total": 3.5 - step, "usage/0": 0.5, "loss/lm": None}) + "\n" for step in range(6)
).encode()
_RECORD = json.dumps(
    {
        "spt_jax": "0.1.0",
        "lm": {"name": "lm", "revision": "", "sha256": "0" * 64},
        "tokenizer": "0" * 64,
        "dialogues": {"training": "0" * 64, "development": "0" * 64},
        "config": {"seed": 3, "bank": {"num_prompts": 2}, "train": {"steps": 7}, "data": {"train": "a.txt"}},
    }
).encode()
_BANK = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 3, 2)


def _archive(save_archive: Callable[..., None], **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save_archive(stream, **arrays)
    return stream.getvalue()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, _BANK)
    return stream.getvalue()


def _read_bank(path: Path) -> None:
    np.asarray(from_file(str(path), (2, 3, 2)))


def _read_adapter(path: Path) -> None:
    for name, content in ((ADAPTER_CONFIG, _ADAPTER), (ADAPTER_WEIGHTS, _PROMPT)):
        if name != path.name:
            (path.parent / name).write_bytes(content)
    temporary = path.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    with mock.patch.object(tempfile, "tempdir", str(temporary)):  # else a path upwards would lie there too
        read_prompt(path.parent, "org/model")


_ADAPTER = json.dumps(
    {"peft_type": PROMPT_TUNING, "base_model_name_or_path": "org/model", "num_virtual_tokens": 3, "task_type": "X"}
).encode()
_PROMPT = save({PROMPT_KEY: _BANK[0]})


def _tokenizer_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer_of_folder(Path(folder), "llama")  # what it imports takes seconds, which no reader has
        return {name: (Path(folder) / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


_TOKENIZER = _tokenizer_files()


def _read_tokenizer(path: Path) -> None:
    for name, content in _TOKENIZER.items():
        if name != path.name:
            (path.parent / name).write_bytes(content)
    tokenizer_of_folder(path.parent, "llama")


def _sentencepiece() -> bytes:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat and the hat <b>was</b> flat"] * 20),
            model_prefix=str(Path(folder) / "tokenizer"),
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            user_defined_symbols=["<b>", "</b>", "▁▁"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return (Path(folder) / "tokenizer.model").read_bytes()


def _bare_files() -> dict[str, bytes]:
    """A byte-level BPE as OPT's folders have it."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    added = {str(len(tokens)): {"content": "<mask>", "special": True}}
    return {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": b"#version: 0.2\nt h\nth e\n",
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": added}).encode(),
    }


_BARE = _bare_files()


def _read_bare(path: Path) -> None:
    for name, content in _BARE.items():
        if name != path.name:
            (path.parent / name).write_bytes(content)
    tokenizer_of_folder(path.parent, "opt")


def _torch_file(tensors: dict[str, bytes], storages: dict[str, bytes], pickled: Callable[[bytes], bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = torch_archives.archive(Path(folder) / "file", pickled(_WRITE.state(tensors)), storages)
        return path.read_bytes()


_WRITE = torch_archives.Pickled()
_FLAT = np.linspace(-1, 1, 24, dtype="<f4")


def torch_adapter(shape: tuple[int, int] = (3, 2), strides: tuple[int, int] = (2, 1)) -> bytes:
    prompt = _WRITE.tensor("0", "FloatStorage", 6, 0, shape, strides)
    return _torch_file({PROMPT_KEY: prompt}, {"0": _BANK[0].tobytes()}, lambda state: state)


def official(*more: str, shape: tuple[int, int] = (3, 2), strides: tuple[int, int] = (2, 1)) -> bytes:
    """Two prompts and their normaliser, and `more` prompts under numbers of their own."""
    name, prompt = "models.{}.prompt_encoder.default.embedding.weight", ("0", "FloatStorage", 24, 0, shape, strides)
    tensors = {name.format(k): _WRITE.tensor(*prompt) for k in ("0", "1", *more)}
    tensors |= {
        "prompt_normalizer.weight": _WRITE.tensor("0", "FloatStorage", 24, 12, (2, 2), (2, 1)),
        "prompt_normalizer.bias": _WRITE.tensor("0", "FloatStorage", 24, 16, (2,), (1,)),
    }

    def checkpoint(state: bytes) -> bytes:
        module, _, _ = state.removeprefix(b"\x80\x02").rpartition(b".")
        return b"\x80\x02}(" + _WRITE.text("module") + module + _WRITE.text("global_steps") + _WRITE.number(3) + b"u."

    return _torch_file(tensors, {"0": _FLAT.tobytes()}, checkpoint)


def _read_torch_adapter(path: Path) -> None:
    (path.parent / ADAPTER_WEIGHTS).unlink(missing_ok=True)
    (path.parent / ADAPTER_CONFIG).write_bytes(_ADAPTER)
    temporary = path.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    with mock.patch.object(tempfile, "tempdir", str(temporary)):
        read_prompt(path.parent, "org/model")


def _dialogues(path: Path) -> None:
    read_dialogues(str(path))


PACKED = [
    Reader("gzip", "dialogues.txt.gz", gzip.compress(parlai(), mtime=0), _dialogues, beside=200 << 20),
    Reader("xz", "dialogues.txt.xz", lzma.compress(parlai()), _dialogues, beside=200 << 20),
]
OWN_FILES = [
    Reader(
        "journal of likelihoods",
        _journal(".likelihoods.jsonl"),
        _written(".likelihoods.jsonl", _likelihoods),
        lambda path: _whole_or_anew(path, len(_column(path).likelihoods() or ()) == 4),
    ),
    Reader(
        "journal of replies",
        _journal(".replies.jsonl"),
        _written(".replies.jsonl", _replies),
        lambda path: _whole_or_anew(path, len(_column(path).replies()) == 4),
    ),
    Reader(
        "journal of candidates",
        _journal(".candidates.jsonl"),
        _written(".candidates.jsonl", _candidates),
        lambda path: _whole_or_anew(path, len(_column(path).candidates()) == 4),
    ),
    Reader("kept rows", _entry(), rows_to_bytes(_rows()), _read_rows),
    Reader("metrics", METRICS_FILE, _METRICS, _read_metrics),
    Reader("record of a run", CONFIG_FILE, _RECORD, lambda path: read_config(path.parent), names_file=False),
    Reader("bank, npz", "bank.npz", _archive(np.savez, prompts=_BANK, other=_BANK[0]), _read_bank, homes=(PROGRAMS,)),
    Reader(
        "bank, packed npz",
        "bank.npz",
        _archive(np.savez_compressed, prompts=np.zeros_like(_BANK)),
        _read_bank,
        homes=(PROGRAMS,),
    ),
    Reader("bank, npy", "bank.npy", _npy(), _read_bank, homes=(PROGRAMS,)),
    Reader("bank, safetensors", "bank.safetensors", save({"prompts": _BANK}), _read_bank, homes=(PROGRAMS,)),
    Reader("adapter's config", ADAPTER_CONFIG, _ADAPTER, _read_adapter),
    Reader("adapter's weights", ADAPTER_WEIGHTS, _PROMPT, _read_adapter),
    Reader("adapter's weights, torch", ADAPTER_TORCH_WEIGHTS, torch_adapter(), _read_torch_adapter),
    Reader("official checkpoint", "mp_rank_00_model_states.pt", official(), read_official_tensors),
    *(Reader(name, name, content, _read_tokenizer) for name, content in _TOKENIZER.items()),
    *(Reader(f"{name} of OPT", name, content, _read_bare) for name, content in _BARE.items()),
    Reader(
        "tokenizer.model",
        "tokenizer.model",
        _sentencepiece(),
        lambda path: tokenizer_of_folder(path.parent, "llama"),
    ),
]
