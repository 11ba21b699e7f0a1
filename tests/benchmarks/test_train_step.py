"""The benchmark of the train step: its four sides compute the same thing, and it measures nothing otherwise."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # PEFT's use of transformers
]

TINY = [
    "--shape=tiny",
    "--tokenizer=bytes",
    "--dialogues=3",
    "--turns=3",
    "--batch",
    "ours=2",
    "strong=3",
    "strong_packed=2",
]
PROMISED = {
    *("shape", "ratio", "ratio_strong", "ratio_strong_packed", "max_loss_difference", "peak_memory"),
    *("turns_per_second", "cpu", "cores", "versions", "date"),
}


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program ``benchmarks/train_step.py``, which finds its parts beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("train_step")


@pytest.fixture
def in_this_process(program: ModuleType) -> Iterator[Any]:
    """What starts a side without a process."""
    import torch

    workers = importlib.import_module("train_step_workers")

    @contextlib.contextmanager
    def start(
        side: str, folder: Path, batch: int, threads: int, checking: bool = False, device: str = "cpu"
    ) -> Iterator[Any]:
        del threads
        made = workers.make_side(side, folder, batch, checking, device)
        assert all(callable(getattr(made, command)) for command in workers.COMMANDS)
        yield made

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another are slow beside other work
    yield start
    torch.set_num_threads(threads)


def test_all_sides_have_the_same_losses_and_gradients_and_the_last_line_is_json(program, in_this_process, capsys):
    program.main(program.parse(TINY), in_this_process)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert set(found) >= PROMISED
    print(found["max_loss_difference"], found["max_gradient_difference"])
    assert 0 < found["max_loss_difference"] <= 1e-5
    assert 0 < found["max_gradient_difference"] <= 1e-4
    for name in ("turns_per_second", "peak_memory", "rounds"):
        assert set(found[name]) == {"ours", "authors", "strong", "strong_packed"}
    assert found["ratio"] == found["turns_per_second"]["ours"] / found["turns_per_second"]["authors"]


@pytest.mark.parametrize(
    ("wrong", "loss", "told"), [("ours", 2.001, "5"), ("strong_packed", 2.001, "5"), ("strong", float("nan"), "nan")]
)
def test_a_side_with_another_loss_stops_the_program_before_any_time_is_measured(
    program, capsys, monkeypatch, wrong, loss, told
):
    class Canned:
        def __init__(self, name: str, folder: Path) -> None:
            self.losses = dict.fromkeys(program.LOSSES, 2.0) | {"fusion": loss if name == wrong else 2.0}
            np.savez(folder / f"gradients_{name}.npz", bank=np.ones(3))

        def check(self) -> dict[str, float]:
            return self.losses

    @contextlib.contextmanager
    def start(side: str, folder: Path, *_: int, checking: bool = False, device: str = "cpu") -> Iterator[Canned]:
        yield Canned(side, folder)

    monkeypatch.setattr(program, "prepared", lambda folder, options: {"dialogues": 4})
    with pytest.raises(SystemExit, match=f"losses differ by {told}"):
        program.main(program.parse(TINY), start)
    assert "turns/s" not in capsys.readouterr().out


def test_a_side_works_in_a_process_of_its_own_and_its_death_is_reported(program, tmp_path):
    program.prepared(tmp_path, program.parse(TINY))
    with program.Worker("strong", tmp_path, 2, 1) as worker:
        started = worker.peak_memory
        found = worker.run(1)
        assert found["turns"] == 2
        assert found["seconds"] > 0
        assert 100e6 < started <= worker.peak_memory
        worker._process.kill()
        with pytest.raises((RuntimeError, BrokenPipeError)):
            worker.run(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "authors=4"], "authors=4"),
        (["--sides", "ours", "authors", "--batch", "strong=3"], "strong is not among --sides ours authors"),
        (["--rounds=0"], "'0' is not a whole number from 1"),
        (["--dialogues=-1"], "'-1' is not a whole number from 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(program, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        program.parse(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


class _Probed:
    """A side that is the faster the fewer rows it has, up to a size that does not fit."""

    def __init__(self, rows: int, fits: int) -> None:
        self._rows, self._fits = rows, fits

    def probe(self) -> dict[str, float]:
        if self._rows > self._fits:
            raise RuntimeError("out of memory")
        return {"turns": 1.0, "seconds": float(self._rows), "wait": 0.0}


@pytest.mark.parametrize(("dialogues", "fits", "rows"), [(3, 9, 3), (4, 9, 4), (16, 9, 4), (16, 16, 4)])
def test_a_side_of_dialogues_takes_no_more_rows_than_there_are(program, tmp_path, dialogues, fits, rows):
    def start(side: str, folder: Path, size: int, threads: int) -> Any:
        return contextlib.nullcontext(_Probed(size, fits))

    tried = {"ours": (4, 8, 16)}
    assert program.choose_batches(tmp_path, 1, start, {}, dialogues, tried) == {"ours": rows}


def test_a_side_of_which_no_size_fits_ends_in_a_sentence(program, tmp_path):
    def start(side: str, folder: Path, size: int, threads: int) -> Any:
        return contextlib.nullcontext(_Probed(size, 1))

    with pytest.raises(SystemExit, match="strong: no step of 8, 16 rows could be measured; give fewer"):
        program.choose_batches(tmp_path, 1, start, {}, 4, {"strong": (8, 16)})


def test_a_folder_that_was_prepared_for_something_else_is_refused(program, tmp_path):
    figures = program.prepared(tmp_path, program.parse(TINY))
    assert program.prepared(tmp_path, program.parse(TINY)) == figures
    with pytest.raises(SystemExit, match=r"was prepared for shape 'tiny'; give the same options, or another --folder"):
        program.prepared(tmp_path, program.parse([*TINY, "--shape=small"]))
