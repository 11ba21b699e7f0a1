"""A storage that is away for a while: a server that is restarted, a network that is cut, a file that is locked."""

from __future__ import annotations

import time
from collections.abc import Callable

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError

STORAGE_ERRORS = (SQLAlchemyError, StorageInternalError)
"""All that a storage raises; Optuna wraps what SQLAlchemy raises while a session of its own is open."""
AWAY_SECONDS = 600.0
"""After how long of silence a storage is given up."""
_AWAY = (OperationalError, InterfaceError, TimeoutError)
_WRONG = ("authentication failed", "no pg_hba.conf entry", "no password supplied", "does not exist", "unable to open")
"""What drivers say in these errors of an address that no waiting mends."""


def is_away(error: BaseException) -> bool:
    """Whether a storage may answer later: it, or the way to it, failed, and not what it was asked."""
    inner = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(inner, _AWAY) and not any(words in str(inner) for words in _WRONG)


def reason_of(error: BaseException) -> str:
    """What the database's own driver says, on one line."""
    inner = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    return " ".join(str(getattr(inner, "orig", None) or inner).split())[:300]


class Patience:
    """Bears a storage's errors while it is away, for a time from the first one since it answered last.

    Args:
        say: Takes a line when it goes, and one when it is back.
        seconds: How long; with 0 the first error is the last.
    """

    def __init__(self, say: Callable[[str], None], seconds: float = AWAY_SECONDS) -> None:
        self._say, self._seconds = say, seconds
        self._since: float | None = None

    def answered(self) -> None:
        """The storage has answered."""
        if self._since is not None:
            self._say("the storage answers again")
        self._since = None

    def bears(self, error: BaseException) -> bool:
        """Whether to ask again after `error`: not when it will not pass, or has lasted for too long."""
        now = time.monotonic()
        since = now if self._since is None else self._since
        if not is_away(error) or now - since >= self._seconds:
            return False
        if self._since is None:
            self._say(f"the storage does not answer ({reason_of(error)}); it is asked for {self._seconds:g} seconds")
        self._since = since
        return True
