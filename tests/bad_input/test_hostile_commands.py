"""Whole commands on any bytes: in each of the files that they read, and from the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from driver import Reader, read_case, run_campaign
from evaluated_folders import references, replies, write_run
from own_files import PROGRAMS
from tiny_run import train_arguments, walk

import spt_jax
from spt_jax.commands.main import main
from spt_jax.errors import UserError

pytestmark = pytest.mark.first_python

_FEW, _MANY = 4, 60
"""Cases of a command that loads an LM: at the usual size, and of the whole campaign."""


def command(*arguments: str | Path, typed: bytes = b"") -> None:
    """One command; UserError with what it says where it fails."""
    said = io.StringIO()
    terminal = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors="surrogateescape")  # as Python's own
    before, sys.stdin = sys.stdin, terminal
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main([str(argument) for argument in arguments])
    finally:
        sys.stdin = before
    assert "Traceback" not in said.getvalue(), said.getvalue()
    if code:
        raise UserError(said.getvalue())


def _evaluated(folder: Path, name: str) -> bytes:
    turns = references(4)
    for run, quality in (("a", 0.4), ("b", 0.8)):
        if not (folder / run).exists():
            settings = {"method": {"kind": "spt" if run == "a" else "prompt_tuning"}}
            texts = replies(turns, quality, 0)
            write_run(folder / run, turns, texts, settings=settings, nll=[2.0] * len(turns))
    return (folder / "a" / name).read_bytes()


def test_a_traceback_that_a_thread_prints_beside_a_sound_command_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: list[str]) -> int:
        thread = threading.Thread(target=lambda: 1 // 0)
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr(sys.modules[__name__], "main", main)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest keeps such for itself
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        command("score")


@pytest.mark.parametrize("name", ["config.json", "results.json", "predictions.jsonl"])
def test_compare(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sound = _evaluated(tmp_path, name)
    compare = ("compare", "--samples=100", f"--out={tmp_path / 'out'}", tmp_path / "a", tmp_path / "b")
    reader = Reader(
        f"compare {name}", f"a/{name}", sound, lambda path: command(*compare), names_file=False, beside=64 << 20
    )
    assert read_case(reader, sound, tmp_path) is None
    assert run_campaign(reader, 1000 if request.config.getoption("--all") else 40, tmp_path)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained and evaluated run beside what it was made of, and the copy from which it is made anew."""

    folder: Path
    whole: Path

    def restore(self, _: Path) -> None:
        """Undoes whatever was done to the folder, whose path is in its files."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.whole, self.folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("hostile") / "tiny"
    folder.mkdir()
    walk(*train_arguments(folder, workdir=folder / "run"))
    walk("evaluate", f"--workdir={folder / 'run'}", "--nobaselines")
    (folder / "requests.jsonl").write_text('{"persona": ["i sail ."], "history": ["hi", "hello", "where ?"]}\n' * 2)
    (folder / "typed").write_text("hi\n/why\n/persona i sail .\nwhere ?\n/undo\n/help\n/save talk.json\n/exit\n")
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    return Trained(folder, whole)


Run = Callable[[Path], None]
"""A command on `Trained.folder`."""


def _new_run(folder: Path) -> None:
    command("train", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'new'}", "--config.train.steps=1")


def _resumed(folder: Path) -> None:
    command("train", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'run'}")


def _evaluate(folder: Path) -> None:
    command("evaluate", f"--workdir={folder / 'run'}", "--limit=2", "--replies=2")


def _shown_again(folder: Path) -> None:
    command("evaluate", f"--workdir={folder / 'run'}", "--nobaselines", "--reuse")


def _score(folder: Path) -> None:
    command("score", f"--workdir={folder / 'run'}", f"--data={folder / 'test.txt'}", f"--out={folder / 'scores'}")


def _generate(folder: Path) -> None:
    files = f"--input={folder / 'requests.jsonl'}", f"--out={folder / 'replies.jsonl'}"
    command("generate", f"--workdir={folder / 'run'}", *files, "--max_new_tokens=2")


def _chat(folder: Path) -> None:
    with contextlib.chdir(folder):
        command("chat", f"--workdir={folder / 'run'}", "--max_new_tokens=2", typed=(folder / "typed").read_bytes())


def _inspect(folder: Path) -> None:
    command("inspect", folder / "lm")


@pytest.mark.parametrize(
    ("file", "run", "needed"),
    [
        ("train.txt", _new_run, True),
        ("lm/config.json", _new_run, True),
        ("lm/tokenizer.json", _new_run, True),
        ("run/metrics.jsonl", _resumed, False),
        ("run/config.json", _resumed, True),
        ("run/config.json", _evaluate, True),
        ("run/checkpoints/4/meta/metadata", _evaluate, False),
        ("run/initial.safetensors", _evaluate, True),
        ("run/results.json", _shown_again, False),
        ("test.txt", _score, True),
        ("requests.jsonl", _generate, True),
        ("typed", _chat, False),
        ("lm/model.safetensors", _inspect, True),
        ("lm/config.json", _inspect, True),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else str(value),
)
def test_of_a_run(file: str, run: Run, needed: bool, trained: Trained, request: pytest.FixtureRequest) -> None:
    folder = trained.folder
    reader = Reader(
        f"{run.__name__} {file}",
        file,
        (trained.whole / file).read_bytes(),
        lambda _: run(folder),
        names_file=False,
        beside=None,
        seconds=120,
        prepare=trained.restore,
        homes=(PROGRAMS, Path(spt_jax.__file__).parents[1] / "spt_jax.egg-info"),
    )
    assert read_case(reader, reader.sound, folder) is None
    nonsense = read_case(reader, b"\xff\xfe\0nonsense\n" * 3, folder)
    assert (nonsense is not None) == needed
    assert not needed or str(folder) in str(nonsense)
    run_campaign(reader, _MANY if request.config.getoption("--all") else _FEW, folder)
