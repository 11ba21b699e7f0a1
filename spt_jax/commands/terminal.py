"""What a command has to do with the terminal: its streams, and Ctrl-C wherever Python happens to be when it comes."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

from spt_jax.exit_codes import FAILED, INTERRUPTED, MISTAKE

_RETRY_SECONDS = 0.05


class OutputError(OSError):
    """What is printed could not be written, other than for a reader that left: its disk is full, for instance."""


class _Output(io.TextIOWrapper):
    """Standard output, whose errors are told apart from those of files."""

    def write(self, text: str) -> int:
        with _told_apart():
            return super().write(text)

    def flush(self) -> None:
        with _told_apart():
            super().flush()


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


def prepare_streams() -> None:
    """A stream that is closed reads and writes nothing; a character that an encoding lacks is written as its escape."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        # Which stays: a stream closes its buffer when it goes.
        ours = {name: getattr(sys.stdout, name) for name in ("encoding", "errors", "line_buffering")}
        sys.stdout = _Output(sys.stdout.buffer, **ours)


def unwritable(error: OSError, program: str = "spt-jax") -> int:
    """The exit code when standard output could not be written: silent where its reader left, else with a sentence."""
    _goes_nowhere(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return FAILED
    with contextlib.suppress(OSError):
        print(f"{program}: what is printed cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    return MISTAKE


def flushed(code: int, program: str = "spt-jax") -> int:
    """An exit code, or another where what was printed cannot be written."""
    try:
        sys.stderr.flush()
    except OSError:  # how work goes on may be lost, its result not
        _goes_nowhere(sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        return unwritable(error, program)
    return code


def _goes_nowhere(stream: TextIO) -> None:
    """What is still buffered must not raise again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def never_miss_an_interrupt(program: str = "spt-jax") -> None:
    """Makes Ctrl-C end the process also while modules are imported, and where an exception would be lost.

    The first lines of a C extension turn a `KeyboardInterrupt` into an `ImportError`, or abort; a callback of the
    garbage collector (JAX has one) swallows it. So while a module is imported the process leaves at once, which it may
    at any moment, and what a callback swallowed comes again. A SIGINT that is ignored, as in a shell's background,
    stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, functools.partial(_interrupt, program))
    told = sys.unraisablehook

    def lost(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident or 0
            again = threading.Timer(_RETRY_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            told(unraisable)

    sys.unraisablehook = lost


def _interrupt(program: str, number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"\n{program}: interrupted\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
