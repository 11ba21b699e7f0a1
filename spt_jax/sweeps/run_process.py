"""One run of a trial as a process of ``spt-jax``, in a working directory that no two processes share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spt_jax.errors import UserError
from spt_jax.exit_codes import FINISHED, STOPPED
from spt_jax.sweeps.locked import TAKEN, holder_here
from spt_jax.sweeps.outages import STORAGE_ERRORS

SPT_JAX = (sys.executable, "-m", "spt_jax")
MOST_KILLS = 3
"""A run that was killed from outside so often, for want of memory for instance, has failed."""
_POLITE_SECONDS = 120.0
_POLL_SECONDS = 0.2


class RunFailed(UserError):
    """A run cannot be brought to its end; the sentence says why and where its output is."""


class RunProcess:
    """Starts a door of spt-jax and follows it to its end.

    Args:
        lock: The file that is locked while a process works in the run's folder.
        log: Takes what the process prints; appended to.
        tick: Called a few times a second meanwhile; what it raises stops the process.
        confirm: Called before each start, before a failure is told and while a run is being ended; raises `LostLease`
            when the trial is another's.
        program: The command ``spt-jax``.
    """

    def __init__(
        self,
        lock: Path,
        log: Path,
        tick: Callable[[], None],
        confirm: Callable[[], None],
        program: Sequence[str] = SPT_JAX,
    ) -> None:
        self._lock, self._log, self._tick, self._confirm, self._program = lock, log, tick, confirm, program

    def finish(self, arguments: Sequence[str]) -> None:
        """Runs ``spt-jax ARGUMENTS`` until it has done its work, starting it again when it is killed or stopped.

        Args:
            arguments: The door and its flags.

        Raises:
            RunFailed: It exits with an error, or was killed or stopped `MOST_KILLS` times.
        """
        kills = 0
        while True:
            begun = self._log.stat().st_size if self._log.exists() else 0
            code = self._once(arguments)
            if code == FINISHED:
                return
            self._tick()  # a stop that was asked for is no failure
            self._confirm()
            if code > 0 and code != STOPPED:
                reason = next((line for line in reversed(self._printed(begun)) if line.strip()), "nothing was printed")
                raise RunFailed(f"spt-jax {arguments[0]} ended with exit code {code}: {reason} (see {self._log})")
            kills += 1
            if kills == MOST_KILLS:
                how = "was stopped" if code == STOPPED else f"was killed by signal {-code}"
                raise RunFailed(f"spt-jax {arguments[0]} {how} {kills} times from outside; see {self._log}")

    def _once(self, arguments: Sequence[str]) -> int:
        command = [sys.executable, "-m", "spt_jax.sweeps.locked", str(self._lock)]
        command += [*self._program, *arguments]
        while True:
            self._confirm()
            with self._log.open("a", encoding="utf-8") as output:
                # Ctrl-C in a terminal is for the worker alone, which passes it on.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            code = self._followed(process)
            if code != TAKEN:
                return code
            self._end_holder()

    def _followed(self, process: subprocess.Popen[bytes]) -> int:
        try:
            while process.poll() is None:
                self._tick()
                time.sleep(_POLL_SECONDS)
        except LostLease:
            process.kill()
            process.wait()
            raise
        except BaseException:
            self._end(process)
            raise
        return process.returncode

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Lets the run save and end, by force when it does not; the trial stays this worker's meanwhile."""
        process.terminate()
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < _POLITE_SECONDS:
            try:
                self._confirm()
            except LostLease:
                break
            except STORAGE_ERRORS:
                pass  # the run saves all the same
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        if process.poll() is None:
            process.kill()
            process.wait()

    def _end_holder(self) -> None:
        """Ends what an earlier worker left behind, politely, then by force; on another machine, waits for it."""
        began = time.monotonic()
        asked: int | None = None
        while (pid := holder_here(self._lock)) is not None:
            with contextlib.suppress(ProcessLookupError):
                if asked != pid:
                    os.kill(pid, signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)
                    asked, began = pid, time.monotonic()
                elif time.monotonic() - began > _POLITE_SECONDS:
                    os.kill(pid, signal.SIGKILL)
            self._tick()
            time.sleep(_POLL_SECONDS)
        if asked is None:
            self._tick()
            time.sleep(1.0)

    def _printed(self, begun: int) -> list[str]:
        with self._log.open("rb") as stream:
            stream.seek(begun)
            return stream.read().decode(errors="replace").splitlines()


class LostLease(Exception):
    """The trial is another worker's by now: nothing of this one may go on."""
