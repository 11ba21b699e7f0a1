"""A progress bar that also makes sense in a log file."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_SECONDS = 10.0
LONGEST_SILENCE_SECONDS = 30.0
"""A compilation or a large batch may take minutes; a log shows that it is still going on."""


class ProgressBar:
    """Shows how far a loop is, with a note such as the loss; on standard error, so that output stays clean.

    On a terminal it is a live bar; elsewhere a line at the start, at the end if that is new, at most every ten seconds
    between, and at least every thirty.

    Args:
        description: What is going on.
        total: How many units of work there are.
        start: How many are already done.
        shown: False says nothing, where another process shows the same work.
    """

    def __init__(self, description: str, total: int, start: int = 0, *, shown: bool = True) -> None:
        self._shown = shown
        self._description, self._total, self._done = description, total, start
        self._first = start  # of what this process does
        self._note = ""
        self._said = start  # units that the last line told of
        self._console = _Console(stderr=True)
        self._bar: Progress | None = None
        self._left = threading.Event()
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> ProgressBar:
        if not self._shown:
            return self
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, completed=self._done, note="")
        else:
            self._line()
            threading.Thread(target=self._keep_talking, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and self._done > self._said:
            self._line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units; `note` replaces the text beside the bar."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note)
        elif self._shown and time.monotonic() - self._printed >= PLAIN_INTERVAL_SECONDS:
            self._line()

    def skip(self, count: int) -> None:
        """Counts units that were done before; the time that is left goes by those that are done here."""
        self._first += count
        self._done += count
        if self._bar is not None:
            self._bar.reset(self._task, completed=self._done, total=self._total)

    def message(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._shown:
            console = self._bar.console if self._bar is not None else self._console
            with self._unless_unwritable():
                console.print(text, markup=False, highlight=False)

    def _keep_talking(self) -> None:
        while not self._left.wait(1.0):
            if time.monotonic() - self._printed >= LONGEST_SILENCE_SECONDS:
                self._line()

    def _line(self) -> None:
        elapsed = self._printed = time.monotonic()
        elapsed -= self._began
        self._said = self._done
        parts = [f"{self._description} {self._done}/{self._total}"]
        parts += [self._note] if self._note else []
        if self._first < self._done < self._total:
            left = elapsed / (self._done - self._first) * (self._total - self._done)
            parts.append(f"{_clock(left)} left")
        elif self._done < self._total and elapsed >= 1:
            parts.append(f"{_clock(elapsed)} so far")
        with self._unless_unwritable():
            print(" · ".join(parts), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _unless_unwritable(self) -> Iterator[None]:
        """Work does not end because nobody can read how it goes: its reader left, or a log's disk is full."""
        try:
            yield
        except OSError:
            self._shown = False


class _Console(Console):
    """One that goes silent where its reader leaves, instead of ending the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
