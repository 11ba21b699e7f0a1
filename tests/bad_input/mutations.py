"""Bytes made of other bytes: what a damaged disk, a cut transfer or an enemy makes of a file."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable

_NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_TEXTS = [
    b"../../outside", b"/etc/passwd", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud83d", b"\x00", b"\r", b"\t", b"\n",
    b"\xe2\x80\xa8",
    b"-1", b"1e999", b"NaN", b"null", b"true", b"{}", b"[]", b'""', b"8.0", b"9" * 4300, b"9" * 5000,
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` after one to four random mutations; the same `rng` state gives the same bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        content = rng.choice(_MUTATIONS)(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 4]) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


def _remove(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + content[start + rng.randint(1, 40) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    end = start + rng.randint(1, 200)
    return content[:end] + content[start:end] * rng.choice([1, 1, 50]) + content[end:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + rng.choice(_TEXTS) + content[start:]


def _binary_number(content: bytes, rng: random.Random) -> bytes:
    number, size = rng.choice(_NUMBERS), rng.choice([4, 8])
    start = rng.randint(0, len(content))
    return content[:start] + struct.pack("<Q", number)[:size] + content[start + size :]


def _token(content: bytes, rng: random.Random) -> bytes:
    """A number or a quoted text of the file, replaced by another value."""
    found = list(re.finditer(rb'-?\d+(?:\.\d+)?|"[^"\n]*"', content))
    if not found:
        return content
    match = rng.choice(found)
    value = rng.choice([*_TEXTS, *(str(number).encode() for number in _NUMBERS)])
    quoted = b'"' + value + b'"' if rng.random() < 0.5 else value
    return content[: match.start()] + quoted + content[match.end() :]


def _nest(content: bytes, rng: random.Random) -> bytes:
    depth = rng.choice([50, 900, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = opening * depth + b"0" + closing * depth
    found = list(re.finditer(rb'(?<=: )(?:-?\d+(?:\.\d+)?|"[^"\n]*")', content))
    if not found or rng.random() < 0.2:
        return value
    match = rng.choice(found)
    return content[: match.start()] + value + content[match.end() :]


_MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    _flip, _cut, _remove, _repeat, _insert, _binary_number, _token, _token, _nest,
]  # fmt: skip
