"""Runs a reader on mutated files, and holds it to what any reader of this package promises of any bytes."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mutations import mutated

from spt_jax.errors import UserError

BYTES_A_BYTE = 200
"""Memory a reader may take at its peak for each byte of the file, as Python objects."""
_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and a sound file for it.

    Attributes:
        name: Of the kind of file, for the test's name and the seed.
        file: Name of the mutated file in its folder.
        sound: Its content before it is mutated.
        read: Reads it all; is given the file's path.
        names_file: Whether an error must name the file.
        beside: Bytes of memory that it may take whatever the size of the file; None where they are not measured.
        seconds: It hangs if it takes longer.
        prepare: Makes what lies around the file; is given the file's path.
        homes: Folders beside the file's own in which it may open files.
    """

    name: str
    file: str
    sound: bytes
    read: Callable[[Path], Any]
    names_file: bool = True
    beside: int | None = 8 << 20
    seconds: float = 10
    prepare: Callable[[Path], None] = lambda path: path.parent.mkdir(parents=True, exist_ok=True)
    homes: tuple[Path, ...] = ()

    def content(self, number: int) -> bytes:
        """The bytes of case `number`, the same in every process."""
        return mutated(self.sound, random.Random(f"{self.name} {number}"))


_warm: set[str] = set()
"""Readers that have read their sound file: what the first reading imports and compiles takes longer than reading."""


def read_case(reader: Reader, content: bytes, folder: Path) -> str | None:
    """Reads `content`; returns the sentence of its refusal, or None where it is read.

    Raises:
        AssertionError: The reader broke a promise: another error, no file named, too long, too large, a file opened
            outside the folder, or something executed.
    """
    path = folder / reader.file
    if reader.name not in _warm:
        _warm.add(reader.name)
        reader.prepare(path)
        path.write_bytes(reader.sound)
        reader.read(path)
    reader.prepare(path)
    path.write_bytes(content)
    sentence = None
    most_bytes = None if reader.beside is None else reader.beside + BYTES_A_BYTE * len(content)
    with _bounded(most_bytes, reader.seconds, (folder, *reader.homes)):
        try:
            reader.read(path)
        except UserError as error:
            sentence = str(error)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} instead of a sentence: {str(error)[:300]}") from error
    if sentence is not None:
        assert sentence.strip(), "a refusal without a sentence"
        assert not reader.names_file or str(folder) in sentence, f"the file is not named: {sentence[:300]}"
    return sentence


def run_campaign(reader: Reader, count: int, folder: Path) -> int:
    """Cases 0 to `count` - 1 of a reader; returns how many were refused.

    Raises:
        AssertionError: Cases failed; names the first ones by number.
    """
    failures, refused = [], 0
    for number in range(count):
        try:
            refused += read_case(reader, reader.content(number), folder) is not None
        except AssertionError as error:
            failures.append(f"{reader.name} case {number}: {error}")
    assert not failures, f"{len(failures)} of {count} cases failed:\n" + "\n".join(failures[:20])
    return refused


class _TooLong(BaseException):
    """The time is up; no reader catches it."""


_watched: list[tuple[str, object]] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and (event == "open" or event in _FORBIDDEN):
        _watched.append((event, arguments[0] if arguments else None))


sys.addaudithook(_note)


@contextmanager
def _bounded(most_bytes: int | None, seconds: float, homes: tuple[Path, ...]) -> Iterator[None]:
    """Holds what runs inside to its time and memory, and to files in `homes`."""
    global _watched

    def too_long(*_: Any) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if most_bytes is not None:
        tracemalloc.start()
    _watched = events = []
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]  # 0 where it is not traced
    except _TooLong:
        raise AssertionError(f"still reading after {seconds} seconds") from None
    finally:
        _watched = None
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    for event, place in events:
        assert event == "open", f"{event} of {place!r}"
        assert not isinstance(place, str | bytes) or _allowed(os.fsdecode(place), homes), f"{place!r} was opened"
    assert most_bytes is None or peak <= most_bytes, f"{peak} bytes of memory; allowed: {most_bytes}"


def _allowed(place: str, homes: tuple[Path, ...]) -> bool:
    """Whether a path is in one of the homes, or is Python's own or a package's, which a first import reads."""
    if place == "<string>":  # no file: Python 3.13 looks for it when it tells of a text that is no literal
        return True
    path = Path(place).resolve()
    return any(
        path.is_relative_to(home.resolve()) for home in (*homes, Path(sys.prefix), Path(sys.base_prefix), _PACKAGE)
    )


_PACKAGE = Path(__file__).resolve().parents[2] / "spt_jax"
