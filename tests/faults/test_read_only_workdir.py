"""A working directory that cannot be written is refused in a sentence, before anything is done, and can be read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from short_run import rows

from spt_jax.exit_codes import FINISHED, MISTAKE

pytestmark = pytest.mark.first_python


@pytest.fixture
def read_only(undisturbed, tmp_path: Path) -> Iterator[Path]:
    """The undisturbed run in a file system that takes no writes, from root either."""
    folder = tmp_path / "read_only"
    shutil.copytree(undisturbed.undisturbed, folder / "run")
    (folder / "empty").mkdir()
    mounted = False
    if os.geteuid():
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
    else:
        mounted = not subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode
        done = mounted and not subprocess.run(["mount", "-o", "remount,bind,ro", folder]).returncode
        if not done:
            pytest.skip("root writes into every folder, and no read-only file system can be mounted here")
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)
    else:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize("name", ["run", "empty", "new"])
def test_training_in_a_folder_that_cannot_be_written_is_refused(undisturbed, read_only, name):
    before = {path: path.stat().st_mtime_ns for path in read_only.rglob("*")}
    code, _, err = undisturbed.command.run(read_only / name)
    assert code == MISTAKE, err
    assert len(err.splitlines()) == 1, err  # and nothing was loaded before
    assert re.search(r"^spt-jax train: .*(cannot be written|cannot be made)", err), err
    assert str(read_only / name) in err
    assert {path: path.stat().st_mtime_ns for path in read_only.rglob("*")} == before
    assert rows(read_only / "run") == rows(undisturbed.undisturbed)


def test_a_run_in_a_folder_that_cannot_be_written_is_read(undisturbed, read_only, tmp_path):
    (tmp_path / "d.txt").write_text("1 your persona: i sail .\n2 hi\thello there\n3 and ?\tno more\n")
    scored = []
    for workdir in (read_only / "run", undisturbed.undisturbed):
        out = tmp_path / f"{len(scored)}.jsonl"
        start = undisturbed.command.start_door(
            "score", f"--workdir={workdir}", f"--data={tmp_path / 'd.txt'}", f"--out={out}"
        )
        assert start.wait() == FINISHED, start.err
        scored.append(out.read_text())
    assert scored[0] == scored[1]
    assert len(scored[0].splitlines()) == 2
