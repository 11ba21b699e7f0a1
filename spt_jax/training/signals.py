"""A polite stop: SIGTERM, Ctrl-C and a terminal that is closed ask the loop to finish its step, save and leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """While the context is open, the first stop signal sets `requested`; a second SIGINT interrupts at once.

    Stop signals are SIGTERM, SIGINT, and SIGHUP, by which a terminal or a connection that is closed ends what runs
    there; where it is ignored, as under nohup, it stays so. Outside the main thread, where Python cannot install
    handlers, nothing is installed and `requested` may be set by hand.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def stop_signals() -> list[int]:
    """The signals that ask for a stop."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def leave_terminal() -> None:
    """Lets what is printed to a terminal that was closed go nowhere, instead of failing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            os.dup2(nowhere, stream)
    os.close(nowhere)
