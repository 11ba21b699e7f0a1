"""A PostgreSQL server of the test's own, on a free port of the loopback, gone when the test is."""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def _binaries() -> Path | None:
    """The folder of Debian's newest server, or the one on the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("initdb")
    return folders[-1] if folders else Path(found).resolve().parent if found else None


def _as_user() -> dict[str, int]:
    """PostgreSQL refuses to be root; who is root starts it as the user that its package made, or as nobody."""
    if os.geteuid():
        return {}
    names = [entry.pw_name for entry in pwd.getpwall()]
    account = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": account.pw_uid, "group": account.pw_gid}


def _must(command: list[str], folder: Path, run: dict[str, Any]) -> None:
    """Runs a command of the server's; if it fails, the test's failure says all that the server said."""
    done = subprocess.run(command, **run)
    if done.returncode:
        log = folder / "log"
        told = f"{done.stdout or ''}{done.stderr or ''}{log.read_text() if log.exists() else ''}"
        pytest.fail(f"{command[0]} ended with exit code {done.returncode}:\n{told}", pytrace=False)


@dataclasses.dataclass(frozen=True)
class Server:
    """A server, and what stops it and starts it again.

    Attributes:
        url: The address of a database that is empty at first, with a password.
        start: Returns when it answers.
        stop: Breaks every connection.
    """

    url: str
    start: Callable[[], None]
    stop: Callable[[], None]


@contextmanager
def postgres() -> Iterator[Server]:
    """A server of its own; skips the test where there is none to start."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    user = _as_user()
    # Sockets have short paths, and another user must be able to enter: not pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="spt_jax_postgres_"))
    if user:
        os.chown(folder, user["user"], user["group"])
    (folder / "password").write_text("s3cret\n")
    (folder / "password").chmod(0o644)
    data, run = folder / "data", {"cwd": folder, "capture_output": True, "text": True, **user}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    initialise = ["initdb", "-D", str(data), "-U", "sweeper", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
    control = [str(binaries / "pg_ctl"), "-D", str(data), "-w"]

    def start() -> None:
        _must([*control, "-l", str(folder / "log"), "-o", options, "start"], folder, {**run, "capture_output": False})

    def stop() -> None:
        _must([*control, "-m", "immediate", "stop"], folder, run)

    try:
        _must([str(binaries / initialise[0]), *initialise[1:], "--no-sync"], folder, run)
        start()
        yield Server(f"postgresql://sweeper:s3cret@127.0.0.1:{port}/postgres", start, stop)
    finally:
        if (data / "postmaster.pid").exists():
            stop()
        shutil.rmtree(folder, ignore_errors=True)
