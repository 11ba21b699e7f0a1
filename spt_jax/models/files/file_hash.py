"""SHA-256 of weight files; a large file that has not changed since it was hashed is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

from spt_jax.cache_folder import drop, entry_path, key_of, store, touch
from spt_jax.errors import UserError
from spt_jax.json_text import parse_json

REMEMBERED_BYTES = 1 << 24
"""From this size on the hash of a file is kept; a smaller one is hashed in hundredths of a second."""
SETTLED_SECONDS = 2.0
"""A file changed so shortly ago may change again without its time showing it, so its hash is not kept (as in git)."""
_BLOCK = 1 << 20  # bytes hashed at once


def sha256_of_files(files: tuple[Path, ...], unwanted: threading.Event | None = None) -> str:
    """SHA-256 of a file's bytes, or of the lines ``{file name} {sha256 of the file}`` of several.

    Args:
        files: In the order of their names.
        unwanted: Once it is set the result does not matter, and comes at once.

    Raises:
        UserError: A file cannot be read to its end.
    """
    digests = [_sha256_of_file(file, unwanted or threading.Event()) for file in files]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256_of_file(file: Path, unwanted: threading.Event) -> str:
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
            entry = entry_path("hashes", key_of(os.path.realpath(file))) if status.st_size >= REMEMBERED_BYTES else None
            if entry is not None and (known := _remembered(entry, stamp)):
                return known
            digest = hashlib.sha256()
            while not unwanted.is_set() and (block := stream.read(_BLOCK)):
                digest.update(block)
            unchanged = os.fstat(stream.fileno()).st_mtime_ns == status.st_mtime_ns
    except OSError as error:
        raise UserError(f"{file} could not be read to its end: {error.strerror}") from error
    found = digest.hexdigest()
    if entry is not None and unchanged and settled and not unwanted.is_set():
        store(entry, json.dumps({"stamp": stamp, "sha256": found, "check": _check(stamp, found)}).encode())
    return found


def _remembered(entry: Path, stamp: list[int]) -> str:
    """The hash kept for a file of this size, times and place; empty where there is none."""
    try:
        record = parse_json(entry.read_bytes())
        if record["stamp"] != stamp:
            return ""
        if record["check"] != _check(stamp, record["sha256"]):
            raise ValueError("it is damaged")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        drop(entry)
        return ""
    touch(entry)
    return record["sha256"]


def _check(stamp: list[int], digest: str) -> str:
    return key_of(json.dumps(stamp), digest)
