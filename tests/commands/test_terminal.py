"""What a command does when its terminal, its disk or its user does not let it go on."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_dialogues

from spt_jax.commands import inspect, terminal
from spt_jax.commands.main import main
from spt_jax.progress import ProgressBar

DOOR = [sys.executable, "-m", "spt_jax"]


class FullDisk(io.StringIO):
    """A stream that cannot be written."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["inspect", "shape:opt-125m"]])
def test_output_to_a_full_disk_is_a_sentence(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*DOOR, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("spt-jax: what is printed cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_a_mistake_told_to_a_full_disk_keeps_its_exit_code():
    with open("/dev/full", "w") as full:
        assert subprocess.run([*DOOR, "inspect", "shape:nosuch"], stderr=full, check=False).returncode == 2


def test_a_full_disk_elsewhere_is_not_called_a_full_output(monkeypatch):
    def fails(_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inspect, "run", fails)
    with pytest.raises(OSError, match="No space left"):
        main(["inspect", "shape:opt-125m"])


def test_a_reader_that_leaves_ends_a_command_in_silence():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*DOOR, "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_what_an_encoding_lacks_is_escaped():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*DOOR, "train", "--help"], capture_output=True, env=environment, check=True)
    assert done.stdout.isascii()
    assert "Examples:" in done.stdout.decode()


def test_a_closed_stream_reads_nothing_and_takes_everything(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    terminal.prepare_streams()
    with sys.stdin as stdin, sys.stdout as stdout, sys.stderr as stderr:
        assert stdin.read() == ""
        print("to nobody", file=stdout)
        print("to nobody", file=stderr)


@pytest.mark.parametrize("stream", [FullDisk(), None], ids=["full", "closed"])
def test_work_goes_on_when_nobody_can_read_how(monkeypatch, stream):
    if stream is None:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar("working", 3) as bar:
        bar.message("a sentence")
        for _ in range(3):
            bar.advance()
        bar.message("another")
    monkeypatch.undo()
    with pytest.raises(OSError):
        stream.write("x\n")
    with contextlib.suppress(OSError):
        stream.close()


LOST = """
import gc, signal, time
from spt_jax.commands.terminal import never_miss_an_interrupt
never_miss_an_interrupt()
gc.callbacks.append(lambda phase, info: signal.raise_signal(signal.SIGINT) if gc.callbacks.clear() is None else None)
gc.collect()
try:
    time.sleep(30)
except KeyboardInterrupt:
    print("came again")
"""


def test_an_interrupt_that_a_garbage_collection_swallows_comes_again():
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "came again\n", "")


def test_an_interrupt_while_a_module_is_imported_ends_the_process_without_a_traceback(tmp_path):
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nprint('went on')\n")
    code = "from spt_jax.commands.terminal import never_miss_an_interrupt as f; f(); import slow"
    found = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | found, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nspt-jax: interrupted\n")


def test_an_interrupt_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        terminal.never_miss_an_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("flag", ["--out", "-out"])
def test_a_flag_takes_a_home_as_a_shell_does(flag, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["score", "--workdir=none", "--data=d.txt", f"{flag}=~/gone/scores.jsonl"]) == 2
    assert f"the folder {tmp_path / 'gone'} does not exist" in capsys.readouterr().err


def test_the_home_of_nobody_is_told(capsys):
    assert main(["score", "--workdir=none", "--data=d.txt", "--out=~nobody_of_this_name/scores.jsonl"]) == 2
    assert "--out ~nobody_of_this_name/scores.jsonl cannot be looked up" in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True])
def test_scores_are_not_written_over_the_dialogues(linked, tmp_path, capsys):
    data = write_dialogues(tmp_path / "data.txt")
    before, out = data.read_bytes(), data
    if linked:
        out = tmp_path / "link.txt"
        out.symlink_to(data)
    assert main(["score", "--workdir=none", f"--data={data}", f"--out={out}"]) == 2
    assert f"--out is the file of --data, {data}, itself; name another file" in capsys.readouterr().err
    assert Path(data).read_bytes() == before


@pytest.mark.parametrize("source", ["x" * 300, "~nobody_of_this_name/data.txt", "hf:x", "with\0nul"])
def test_a_source_that_is_no_path_is_told_by_who_reads_it(source, tmp_path, capsys):
    assert main(["score", "--workdir=none", f"--data={source}", f"--out={tmp_path / 'o'}"]) == 2
    assert "none is not the working directory of a run" in capsys.readouterr().err
