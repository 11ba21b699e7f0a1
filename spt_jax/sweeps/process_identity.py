"""Which process is meant, across machines and after process numbers were used again."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def machine() -> str:
    """A name for the machine and the process numbers it counts in; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did; empty for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def this_process() -> str:
    """A name for this process that no other has: ``MACHINE PID START UNIQUE``."""
    return f"{machine()} {os.getpid()} {start_of(os.getpid())} {uuid.uuid4().hex[:12]}"


def is_dead(name: str) -> bool:
    """Whether the process of a `this_process` is known to be gone; one on another machine may always be alive."""
    place, *rest = name.split(" ")
    if not place or place != machine() or len(rest) != 3:
        return False
    pid, start, _ = rest
    now = start_of(int(pid))
    return now != start if now else not _is_anothers(int(pid))


def _is_anothers(pid: int) -> bool:
    """Whether a process that shows nothing of itself lives, and belongs to another account (``hidepid`` of /proc)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False
