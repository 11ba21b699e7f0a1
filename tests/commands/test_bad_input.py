"""Bad input ends in one clear sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_files import random_llama
from tiny_run import TALK, train_arguments, write_dialogues

from spt_jax.commands.main import main
from spt_jax.training.workdir import locked_workdir

Break = Callable[[Path], list[str]]
"""Breaks something in a folder of `train_arguments`; gives further flags."""


def weights(change: Callable[[Path], object]) -> Break:
    """Changes the weight file."""
    return lambda folder: [change(folder / "lm" / "model.safetensors"), []][1]


def source(make: Callable[[Path], Path]) -> Break:
    """Another LM."""
    return lambda folder: [f"--config.model.source={make(folder)}"]


def halve(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def emptied(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def unsupported(folder: Path) -> list[str]:
    (folder / "lm" / "model.safetensors").rename(folder / "lm" / "pytorch_model.bin")
    return []


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def gguf(folder: Path, **options) -> Path:
    return random_llama(max_position_embeddings=1024).write_gguf(folder / "lm.gguf", **options)


def smaller_vocabulary(folder: Path) -> Path:
    return random_llama(vocab_size=200, max_position_embeddings=1024).write_folder(folder / "small")


def talk(*dialogues, name: str = "train.txt") -> Break:
    """Dialogues put before the good ones."""
    return lambda folder: [write_dialogues(folder / name, [*dialogues, *TALK]), []][1]


def flag(*flags: str) -> Break:
    return lambda folder: list(flags)


def other_run(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "holiday.jpg").write_bytes(b"x")
    return []


CASES: dict[str, tuple[Break, str]] = {
    "weights missing": (weights(Path.unlink), r"lm holds no weight file; expected model\.safetensors"),
    "weights empty": (weights(emptied), r"model\.safetensors is empty; download it again"),
    "weights truncated": (weights(halve), r"model\.safetensors is truncated: \d+ bytes"),
    "weights are no safetensors": (weights(lambda path: path.write_bytes(b"PK" * 99)), "not a safetensors file"),
    "weights no torch archive": (unsupported, r"pytorch_model\.bin is not supported: it starts with"),
    "file unsupported": (source(lambda f: written(f / "lm.onnx", b"x")), r"lm\.onnx is not a supported weight file"),
    "lm missing": (flag("--config.model.source=./nowhere"), r"model source '\./nowhere' does not exist"),
    "gguf missing": (flag("--config.model.source=absent.gguf"), r"model source 'absent\.gguf' does not exist"),
    "gguf empty": (source(lambda f: written(f / "lm.gguf", b"")), r"lm\.gguf is empty; download it again"),
    "gguf truncated": (source(lambda f: halve(gguf(f))), r"lm\.gguf .*truncated"),
    "gguf of an unknown architecture": (source(lambda f: gguf(f, architecture="mamba")), "'mamba'.*supported"),
    "tokenizer does not fit": (source(smaller_vocabulary), "the tokenizer has 260 tokens, but the LM's .* holds 200"),
    "package absent": (flag("--config.model.source=package:llm-smolm9"), "'llm-smolm9' is not installed here"),
    "K below 1": (flag("--config.bank.num_prompts=0"), "bank.num_prompts is 0; allowed: 1 or more"),
    "P below 1": (flag("--config.bank.prompt_length=-2"), "bank.prompt_length is -2; allowed: 1 or more"),
    "unknown key": (flag("--config.bank.num_promts=3"), "no option 'bank.num_promts' .* Did you mean 'bank.num_pro"),
    "row longer than the context": (
        flag("--config.data.max_length=1021"),
        r"data\.max_length \+ evaluation\.max_new_tokens takes 1032 tokens, but the context of .* is 1024; lower",
    ),
    "dialogue too long even when truncated": (
        talk(("i talk a lot.", (("hi", "short"), ("and?", "very " * 160)))),
        r"train\.txt:\d+.*persona, query and response of turn 2 need \d+ tokens, the limit is 700",
    ),
    "test dialogue too long": (
        talk(("i talk a lot.", (("hi", "very " * 160),)), name="test.txt"),
        r"test\.txt:\d+.*turn 1 need \d+ tokens, the limit is 700",
    ),
    "empty response": (talk(("i am shy.", (("hi", "hello"), ("and?", " ")))), r"train\.txt:3: .*response"),
    "data missing": (flag("--config.data.train=tran.txt"), r"The data file .*tran\.txt does not exist"),
    "data empty": (lambda f: [emptied(f / "train.txt"), []][1], r"train\.txt is empty; dialogues are expected"),
    "batch not divisible": (flag("--config.data.batch=3"), "data.batch is 3; allowed: a multiple of 8"),
    "workdir is no run": (other_run, r"run is not empty and holds no run \(no config\.json\); choose another"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence_and_leaves_nothing(name, tmp_path, capsys):
    damage, sentence = CASES[name]
    arguments = train_arguments(tmp_path, workdir=tmp_path / "run")
    more = damage(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert main([*arguments, *more]) == 2
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if not line.startswith("loading weights, ")]
    assert len(told) == 1, err
    assert told[0].startswith("spt-jax train: ")
    assert re.search(sentence, told[0]), told[0]
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


def test_a_second_training_in_a_folder_is_refused_and_changes_nothing(tmp_path, capsys):
    arguments = train_arguments(tmp_path, workdir=tmp_path / "run")
    with locked_workdir(tmp_path / "run"):  # of another process, which has written nothing yet
        assert main([str(argument) for argument in arguments]) == 2
    assert "another process is training in" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("door", ["evaluate", "score"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 your persona: x\n2 hi\thello\n3 and?\t \n", r"d\.txt:3: .*response"),
        ("1 your persona: x\n2 hi\t" + "very " * 160 + "\n", r"d\.txt.*turn 1 need \d+ tokens, the limit is 700"),
        ("", r"d\.txt is empty"),
        (None, r"d\.txt does not exist"),
    ],
)
def test_bad_dialogues_leave_the_results_of_before(door, text, sentence, trained, tmp_path, capsys):
    if text is not None:
        (tmp_path / "d.txt").write_text(text)
    more = [f"--out={tmp_path / 'out.jsonl'}"] if door == "score" else []
    before = {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()}
    assert main([door, f"--workdir={trained / 'run'}", f"--data={tmp_path / 'd.txt'}", *more]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading weights, ")]
    assert len(told) == 1
    assert re.search(sentence, told[0])
    assert not (tmp_path / "out.jsonl").exists()
    assert {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()} == before


def test_a_run_whose_lm_was_replaced_is_refused(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained / "run", tmp_path / "run")
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["model"]["source"] = str(random_llama().write_folder(tmp_path / "other"))
    record["config"]["data"]["max_length"] = 64
    (workdir / "config.json").write_text(json.dumps(record))
    assert main(["evaluate", f"--workdir={workdir}"]) == 2
    assert re.search(r"was trained on .*lm .*but model\.source now gives .*other", capsys.readouterr().err)
