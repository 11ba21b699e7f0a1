"""The user's cache folder: what can be made again, is found faster, and may be deleted at any time, but for buckets.

Entries are content-addressed: their names are digests of everything they depend on, so none is ever stale, and two
processes that write one write the same. They appear whole or not at all. Nothing here fails where the folder cannot be
used: then nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError

LIMIT_VARIABLE = "SPT_JAX_CACHE_GB"
"""Gigabytes that the entries may take together; 0 keeps and reads none."""
DEFAULT_LIMIT_GB = 8.0
KINDS = ("weights", "rows", "hashes", "wordnet")
"""Folders of entries; beside them JAX keeps its compiled programs, which know their own rules."""


def cache_home() -> Path | None:
    """``$XDG_CACHE_HOME/spt_jax``, else ``~/.cache/spt_jax``; None for an account without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spt_jax"
    except RuntimeError:
        return None


def cache_limit() -> int:
    """How many bytes the entries may take together.

    Raises:
        UserError: The environment variable is no number of gigabytes.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    try:
        limit = float(text or DEFAULT_LIMIT_GB)
        if not 0 <= limit < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(
            f"the environment variable {LIMIT_VARIABLE} is {text!r}; allowed: gigabytes, such as {DEFAULT_LIMIT_GB:g}, "
            "or 0 for no cache"
        ) from None
    return int(limit * 1e9)


def entry_path(kind: str, key: str) -> Path | None:
    """Where the entry `key` of one of `KINDS` lies, present or not; None where nothing is to be kept."""
    home = cache_home() if cache_limit() else None
    return None if home is None else home / kind / key


def key_of(*parts: str) -> str:
    """A digest of texts, other for every other sequence of them."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


@functools.cache
def code_digest(package: str) -> str:
    """A digest of a package's Python files: what made an entry is part of its name, so no version can be forgotten."""

    def sources(folder: Traversable) -> Iterator[str]:
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir():
                yield from sources(item)
            elif item.name.endswith(".py"):
                yield item.read_text(encoding="utf-8")

    return key_of(*sources(importlib.resources.files(package)))


def touch(entry: Path) -> None:
    """Marks an entry as used just now; the longest unused go first."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def drop(entry: Path) -> None:
    """Removes an entry, if it is there and may be removed."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def drop_cut_short(folder: Path) -> None:
    """Removes what a process that was killed had only begun to write: empty files of a minute ago and older."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            found = entry.stat()
            if found.st_size == 0 and time.time() - found.st_mtime > 60 and entry.is_file(follow_symlinks=False):
                drop(Path(entry.path))


def make_room(size: int) -> bool:
    """Removes the longest unused entries until `size` bytes more keep the limit; whether they may then be written.

    They may not where they alone are beyond the limit, or would take more than half of what is free on the disk.
    """
    home, limit = cache_home(), cache_limit()
    try:
        if home is None or size > limit:
            return False
        home.mkdir(parents=True, exist_ok=True)
        entries = sorted((_last_use(path), path, _size(path)) for kind in KINDS for path in _entries(home / kind))
        total = sum(taken for *_, taken in entries)
        for _, path, taken in entries:
            if total + size <= limit:
                break
            drop(path)
            total -= taken
        return shutil.disk_usage(home).free >= 2 * size
    except OSError:
        return False


def store(entry: Path, content: bytes) -> None:
    """Writes an entry that is one file, where there is room and permission."""
    with contextlib.suppress(OSError, UserError):
        if make_room(len(content)):
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(entry, content)


@contextlib.contextmanager
def new_folder_entry(entry: Path) -> Iterator[Path]:
    """A temporary folder that becomes `entry` at the end, unless another process was faster.

    Raises:
        OSError: It cannot be written; nothing is left then.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".new-"))
    try:
        yield temporary
        if not entry.exists():
            temporary.rename(entry)
    finally:
        drop(temporary)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _last_use(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0


def _size(entry: Path) -> int:
    size = 0
    for path in (entry, *(entry.rglob("*") if entry.is_dir() else ())):
        with contextlib.suppress(OSError):
            size += path.stat().st_size if path.is_file() else 0
    return size
