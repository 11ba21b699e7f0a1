"""launch/environment.sh: which environments serve as they are, which are mended, and which are made again."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import REPOSITORY

pytestmark = pytest.mark.first_python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the script reads."""
    folder = tmp_path / "my project"
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def bash(project: Path, command: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; source launch/environment.sh; {command}"
    return subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True, timeout=120, check=False)


def begin_with(project: Path, *lines: str) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "spt-jax").write_text("\n".join([*lines, "import sys", ""]))


@pytest.mark.parametrize(
    ("lines", "of_another"),
    [
        (["#!{here}/.venv/bin/python3.11"], False),
        (["#!/bin/sh", '\'\'\'exec\' "{here}/.venv/bin/python" "$0" "$@"'], False),
        (["#!/home/me/old/.venv/bin/python"], True),
        (["#!/bin/sh", '\'\'\'exec\' "/home/me/an old one/.venv/bin/python3.12" "$0" "$@"'], True),
        (["#!/usr/bin/env python3"], False),
    ],
)
def test_a_folder_that_was_moved_is_known_by_its_commands(project, lines, of_another):
    begin_with(project, *(line.format(here=project) for line in lines))
    assert bash(project, "is_of_another_folder .venv").returncode == (0 if of_another else 1)


def test_what_is_not_installed_is_of_no_other_folder(project):
    assert bash(project, "is_of_another_folder .venv").returncode == 1


def test_an_environment_that_lacks_pip_alone_gets_it_and_is_not_made_again(project):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    (project / ".venv" / "mine").write_text("kept")
    constraints = bash(project, "constraints_for .venv").stdout.strip()
    content = (project / "pyproject.toml").read_bytes() + (project / constraints).read_bytes()
    (project / ".venv" / ".installed-requirements").write_text(f" {hashlib.sha256(content).hexdigest()}\n")
    done = bash(project, f"install .venv '{sys.executable}' '' && has_pip .venv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (project / ".venv" / "mine").read_text() == "kept"


def test_an_environment_can_be_made_again_with_its_own_python(project):
    """As in a shell where it is active, and its python the first on the PATH."""
    subprocess.run([sys.executable, "-m", "venv", project / ".venv"], check=True)
    begins = "#!/home/me/old/.venv/bin/python\n"
    (project / ".venv" / "bin" / "spt-jax").write_text(begins)
    # Nothing is installed: the packages of the constraints are asked for on an index that does not exist.
    done = bash(project, "export PIP_NO_INDEX=1; install .venv .venv/bin/python ''")
    assert "making .venv with Python 3" in done.stdout
    assert not (project / ".venv" / "bin" / "spt-jax").exists()
    assert bash(project, "has_pip .venv").returncode == 0
