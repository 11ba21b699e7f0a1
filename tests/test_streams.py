"""`-` and `/dev/stdout` are the streams themselves, whatever they were sent to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spt_jax.atomic_file import check_other_file, check_writable, write_atomically
from spt_jax.errors import UserError
from spt_jax.streams import own_stream, read_file, stream_path

PROGRAM = """
import sys
from pathlib import Path
from spt_jax.atomic_file import check_writable, write_atomically
print("before")
check_writable(Path({name!r}))
write_atomically(Path({name!r}), "through\\n")
print("behind", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("path", "descriptor"),
    [
        ("/dev/stdin", 0),
        ("/dev/stdout", 1),
        ("/dev/../dev/stderr", 2),
        ("/dev/fd/3", 3),
        ("/proc/self/fd/12", 12),
        ("/dev/null", None),
        ("/dev/shm/1", None),
        ("stdout", None),
    ],
)
def test_names_of_streams(path, descriptor):
    assert own_stream(Path(path)) == descriptor


def test_a_dash_is_a_stream_and_nothing_else_is():
    assert own_stream(stream_path("-", "stdin")) == 0
    assert own_stream(stream_path("-", "stdout")) == 1
    assert stream_path("./-", "stdout") == Path("-")


@pytest.mark.parametrize("mode", ["w", "a"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_what_is_written_to_a_stream_stands_between_what_was_and_what_comes(tmp_path, name, mode):
    log, link = tmp_path / "log", os.readlink("/dev/stdout")
    log.write_text("earlier\n")
    with log.open(mode) as out:
        subprocess.run([sys.executable, "-c", PROGRAM.format(name=name)], stdout=out, stderr=out, check=True)
        subprocess.run(["echo", "later"], stdout=out, check=True)
    assert log.read_text() == "earlier\n" * (mode == "a") + "before\nthrough\nbehind\nlater\n"
    assert os.readlink("/dev/stdout") == link


def test_a_socket_is_written_to_and_read_from():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        name = Path(f"/dev/fd/{theirs.fileno()}")
        check_writable(name)
        write_atomically(name, "through")
        assert ours.recv(100) == b"through"
        ours.sendall(b"back")
        ours.shutdown(socket.SHUT_WR)
        assert read_file(name) == b"back"


def test_a_reader_that_left_is_no_mistake_and_a_closed_stream_is():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write_atomically(Path(f"/dev/fd/{writer}"), "through")
    os.close(writer)
    with pytest.raises(UserError, match="cannot be written: Bad file descriptor"):
        check_writable(Path(f"/dev/fd/{writer}"))


def test_a_stream_that_is_read_alone_is_told_before_the_work():
    reader, writer = os.pipe()
    with pytest.raises(UserError, match="cannot be written: it is open for reading alone"):
        check_writable(Path(f"/dev/fd/{reader}"))
    for descriptor in (reader, writer):
        os.close(descriptor)


def test_a_pipe_is_not_read_and_written_by_its_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--out is the file of --input, .*, itself"):
        check_other_file(tmp_path / "pipe", tmp_path / "pipe", "input")
    check_other_file(Path("/dev/null"), Path("/dev/null"), "input")
