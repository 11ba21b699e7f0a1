"""Metrics survive kills, and a run goes on where its file was cut back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spt_jax.errors import UserError
from spt_jax.training.tracking import JsonLines, TensorBoard, WeightsAndBiases, open_trackers


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, steps: range, resume_step: int = -1) -> None:
    with contextlib.closing(JsonLines(path, resume_step)) as tracker:
        for step in steps:
            tracker.log(step, {"loss/total": float(step)})


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(JsonLines(path, -1)) as tracker:
        tracker.log(3, {"loss/total": 0.5, "usage/0": 1})
        assert rows(path) == [{"step": 3, "loss/total": 0.5, "usage/0": 1}]


def test_an_evaluation_that_is_still_to_come_is_not_told_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    told = [(2, {"loss/total": 1.0}), (2, {"development/perplexity": 3.0}), (4, {"loss/total": 0.5})]
    evaluation = (4, {"development/perplexity": 2.0})
    for _ in range(2):
        with contextlib.closing(JsonLines(path, 4 if path.exists() else -1, pending=True)) as tracker:
            for step, metrics in [evaluation] if path.stat().st_size else [*told, evaluation]:
                tracker.log(step, metrics)
    assert rows(path) == [{"step": step} | metrics for step, metrics in [*told, evaluation]]


def test_values_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(JsonLines(path, -1)) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300})
    assert "NaN" not in path.read_text()
    assert rows(path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1e300}]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "loss/to', '{"step": 6, "loss/total": 1.0}', "{", "\x00\x00"])
def test_a_resumed_run_cuts_back_what_its_checkpoint_does_not_know(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    with path.open("a") as file:
        file.write(torn)
    write(path, range(4, 7), resume_step=3)
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("resume_step", "kept"), [(-1, [5]), (0, [0, 5])])
def test_a_run_killed_before_its_first_checkpoint_begins_with_an_empty_file(tmp_path, resume_step, kept):
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    write(path, range(5, 6), resume_step)
    assert [row["step"] for row in rows(path)] == kept


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with contextlib.closing(JsonLines(tmp_path / "metrics.jsonl", -1)) as tracker:
        tracker._file.close()
        tracker._file = full.open("a", encoding="utf-8")
        with pytest.raises(
            UserError, match=r"cannot be written \(No space left on device\); the checkpoints are intact"
        ):
            tracker.log(1, {"a": 1.0})


def records(path: Path) -> Iterator[Any]:
    """Reads TensorBoard's record file: length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, place = path.read_bytes(), 0
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + size])
        place += 16 + size


def events(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for path in sorted(folder.glob("events.out.tfevents.*"))
        for event in records(path)
        for value in event.summary.value
    ]


def test_tensorboard_events_can_be_read_back(tmp_path):
    tracker = TensorBoard(tmp_path / "tensorboard", -1)
    tracker.log(1, {"loss/total": 0.5})
    tracker.log(2, {"loss/total": 0.25, "usage/0": 1.0})
    tracker.close()
    found = events(tmp_path / "tensorboard")
    assert (1, "loss/total", 0.5) in found
    assert (2, "loss/total", 0.25) in found
    assert (2, "usage/0", 1.0) in found
    assert len(found) == 3


@pytest.mark.parametrize("resume_step", [-1, 0, 7])
def test_tensorboard_hides_what_an_earlier_start_wrote_beyond_its_checkpoint(tmp_path, resume_step):
    from tensorboardX.proto.event_pb2 import SessionLog

    TensorBoard(tmp_path, resume_step).close()
    (path,) = tmp_path.iterdir()
    last = list(records(path))[-1]
    assert (last.step, last.session_log.status) == (resume_step + 1, SessionLog.START)


@pytest.mark.parametrize("refused", ["write", "flush"])
def test_tensorboard_on_a_full_disk_is_told_in_a_sentence_and_never_waits(tmp_path, monkeypatch, refused):
    tracker = TensorBoard(tmp_path, -1)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tracker._writer._py_recordio_writer, refused, full)
        for step in range(30):
            tracker._flushed = -math.inf
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); the checkpoints are"):
                tracker.log(step, {"a": 1.0})
    tracker.close()


def test_wandb_that_is_not_installed_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracking\.wandb needs the package wandb: pip install "):
        open_trackers(tmp_path, -1, tensorboard=True, wandb=True, project="p", config={})


@pytest.fixture
def offline(monkeypatch) -> Iterator[None]:
    """W&B without its server or an account: what would be sent is kept in the run's folder."""
    wandb = pytest.importorskip("wandb", reason="W&B is not installed here (the extra tracking)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def kept_by_wandb(folder: Path) -> Iterator[Any]:
    """The messages that W&B keeps for its server in ``FOLDER/wandb``, oldest start first.

    The files are logs of LevelDB's format: behind seven bytes for their kind, blocks of 32 KiB of pieces, each with a
    checksum, a length of two bytes and a byte that says whether more of the message follows (1 and 4 are ends).
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    wandb.teardown()  # a process of its own writes, and may be behind
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        content, place, message = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if 32_768 - place % 32_768 < 7:
                place += 32_768 - place % 32_768
                continue
            length, kind = struct.unpack_from("<HB", content, place + 4)
            message += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                yield Record.FromString(message)
                message = b""


def test_wandb_gets_every_figure_over_its_step_and_a_resumed_run_is_the_same_run(tmp_path, offline):
    for figure in ("loss/total", "development/perplexity"):
        tracker = WeightsAndBiases(tmp_path, "p", {"seed": 3})
        tracker.log(4, {figure: 0.5})
        tracker.close()
    kept = [*kept_by_wandb(tmp_path)]
    told = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item} for r in kept
    ]
    figures = [{"step": 4, "loss/total": 0.5}, {"step": 4, "development/perplexity": 0.5}]
    assert [{name: row[name] for name in row if name[0] != "_"} for row in told if row] == figures
    assert ("*", "step") in {(r.metric.glob_name, r.metric.step_metric) for r in kept}
    runs = [r.run for r in kept if r.run.run_id]
    assert {(run.run_id, run.project, run.resumed) for run in runs} == {
        ((tmp_path / "wandb_id").read_text(), "p", False)
    }
    assert all(("seed", "3") in {(item.key, item.value_json) for item in run.config.update} for run in runs)


@pytest.mark.parametrize("fails", [False, True])
def test_wandb_learns_whether_a_training_failed(tmp_path, offline, fails):
    tracker = WeightsAndBiases(tmp_path, "p", {})
    with contextlib.suppress(UserError):
        try:
            if fails:
                raise UserError("a full disk")
        finally:
            tracker.close()
    assert [r.exit.exit_code for r in kept_by_wandb(tmp_path) if r.HasField("exit")] == [int(fails)]


def test_wandb_without_an_account_is_told_in_a_sentence_and_what_to_do(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed here (the extra tracking)")
    code = (
        "import sys; from pathlib import Path; from spt_jax.training.tracking import WeightsAndBiases\n"
        "try: WeightsAndBiases(Path(sys.argv[1]), 'p', {})\n"
        "except ValueError as error: print(error)"
    )
    here = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    nobody = here | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    command = [sys.executable, "-c", code, tmp_path]
    ended = subprocess.run(command, env=nobody, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"tracking\.wandb: .*`wandb login`.*; set WANDB_MODE=offline to keep the figures .*\n", ended.stdout
    )


@pytest.mark.parametrize("tensorboard", [True, False])
def test_metrics_are_always_written_and_tensorboard_when_asked(tmp_path, tensorboard):
    trackers = open_trackers(tmp_path, -1, tensorboard=tensorboard, wandb=False, project="p", config={})
    for tracker in trackers:
        tracker.log(1, {"a": 1.0})
        tracker.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
    assert (tmp_path / "tensorboard").is_dir() == tensorboard


def test_tensorboard_takes_no_torch_along(tmp_path):
    code = (
        "import sys; from pathlib import Path; from spt_jax.training.tracking import TensorBoard\n"
        "TensorBoard(Path(sys.argv[1]), -1).close(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert list(tmp_path.glob("events*"))
