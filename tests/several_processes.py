"""`spt-jax train` as several processes on this machine, each with fake devices of its own."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fast_compilation

PIECE = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
GREETING = re.compile(
    r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. Expected number of connected peer ranks is : \d+\n"
)
MIXED = re.compile(rf"^(?:\d|{PIECE})*\n", re.MULTILINE)
"""A line of greetings that two threads wrote into one another, or of the numbers that one left to the next line."""
SECONDS = 300
"""After which a process that should have ended is taken for one that hangs."""


@dataclasses.dataclass
class Job:
    """Processes that were started together, and what they wrote."""

    processes: list[subprocess.Popen[str]]

    def wait(self) -> list[int]:
        """The exit codes; the text of each is in `out` and `err` then."""
        try:
            texts = [process.communicate(timeout=SECONDS) for process in self.processes]
        finally:
            self.kill()
        self.out, self.err = [out for out, _ in texts], [err for _, err in texts]
        return [process.returncode for process in self.processes]

    def said(self, index: int) -> str:
        """What a process wrote, without Gloo's greetings, which two threads may write into one another."""
        text = GREETING.sub("", self.out[index] + self.err[index])
        return (MIXED.sub("", text) if re.search(PIECE, text) else text).strip()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {fast_compilation.FLAGS}",
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": f"{os.environ['SPT_JAX_TESTS_CACHE']}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    arguments: Sequence[str],
    count: int,
    devices: int,
    each: Sequence[Sequence[str]] = (),
    homes: Sequence[Path] = (),
    program: Sequence[str] = ("-m", "spt_jax"),
) -> Job:
    """Starts `count` processes of `devices` devices.

    Args:
        arguments: Those of ``spt-jax``, the door first.
        count: Processes.
        devices: Fake devices of each.
        each: More arguments of each process, if they differ.
        homes: The cache folder of each, as on hosts of their own.
        program: What Python runs.
    """
    port = free_port()
    processes = []
    for index in range(count):
        own = each[index] if each else ()
        home = {"XDG_CACHE_HOME": str(homes[index])} if homes else {}
        joining = [f"--distributed=127.0.0.1:{port},{count},{index}"] if count > 1 else []
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *arguments, *joining, *own],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(devices) | home,
                cwd=Path(__file__).resolve().parent.parent,
            )
        )
    return Job(processes)
