"""A file appears whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess

import pytest

from spt_jax.atomic_file import check_writable, write_atomically
from spt_jax.errors import UserError


def test_text_is_written_as_it_is_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    for text in ("first\r\nline é\n", "second"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_mode_of_any_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write_atomically(pipe, "through\n")
        assert reader.communicate(timeout=20)[0] == b"through\n"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    if broken == "replace":
        monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UserError, match=r"a\.json cannot be written: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_told_before_the_work(tmp_path):
    check_writable(tmp_path / "new")
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match=r"the folder .*missing does not exist"):
        check_writable(tmp_path / "missing" / "a")
    with pytest.raises(UserError, match="cannot be looked up"):
        check_writable(tmp_path / ("x" * 300))
