"""Copies that go on beside the work, and whose failures are told without ending it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from spt_jax.storage.bucket import BucketError


class BackgroundCopies:
    """Calls `copy` every few seconds on a thread of its own, and a last time when the context ends.

    A round that fails is told once, in a sentence, and tried again with the next; the work goes on.

    Args:
        copy: One round, which copies what is new.
        say: Takes the sentences.
        kept: Where everything lies until it is copied, for the sentences.
        interval: Seconds between rounds.
    """

    def __init__(self, copy: Callable[[bool], None], say: Callable[[str], None], kept: str, interval: float) -> None:
        self._copy, self._say, self._kept, self._interval = copy, say, kept, interval
        self._ending = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="copies to a bucket", daemon=True)

    @property
    def complete(self) -> bool:
        """After the context: whether everything was copied."""
        return not self._failing

    def _run(self) -> None:
        while not self._ending.wait(self._interval):
            self._round(last=False)

    def _round(self, last: bool) -> None:
        try:
            self._copy(last)
        except (BucketError, OSError) as error:
            if last:
                self._say(f"{error}; the last files are in {self._kept} alone, and the same command copies them")
            elif not self._failing:
                self._say(f"{error}; the work goes on in {self._kept}, and copying is tried again")
            self._failing = True
        else:
            if self._failing:
                self._say("the bucket takes copies again; it has everything")
            self._failing = False

    def __enter__(self) -> BackgroundCopies:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if kind is not None and not issubclass(kind, Exception):
            self._failing = True  # who interrupts does not wait for a network
            return
        self._thread.join()
        self._round(last=True)
