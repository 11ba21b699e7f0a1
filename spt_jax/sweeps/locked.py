"""Becomes another command while it holds a lock: ``python -m spt_jax.sweeps.locked FILE COMMAND …``.

The lock lives exactly as long as the command's process, whatever becomes of the worker that started it, so that a
working directory is never in two processes. The file says which process has it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from spt_jax.json_text import json_object
from spt_jax.sweeps.process_identity import machine, start_of

TAKEN = 79
"""Exit code when another process has the lock; none of `spt_jax.exit_codes`, nor of sysexits.h."""


def main(arguments: list[str]) -> NoReturn:
    """Takes the lock and replaces this process; exits with `TAKEN` when another has it."""
    file, *command = arguments
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(TAKEN)
    except OSError as error:
        # Buckets that are mounted as folders have no locks; the lease in the database stands alone there.
        print(f"{file} cannot be locked on this file system ({error.strerror})", file=sys.stderr, flush=True)
    holder = {"machine": machine(), "pid": os.getpid(), "start": start_of(os.getpid())}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    os.set_inheritable(descriptor, True)
    os.execvp(command[0], command)


def holder_here(file: Path) -> int | None:
    """The process on this machine that has the lock of `file`; None when it is free, unknown or on another machine."""
    try:
        holder = json_object(file)
        pid, start, place = int(holder["pid"]), str(holder["start"]), str(holder["machine"])
    except (ValueError, KeyError, TypeError, OverflowError):  # a UserError is a ValueError
        return None
    return pid if place and place == machine() and start_of(pid) == start else None


if __name__ == "__main__":
    main(sys.argv[1:])
