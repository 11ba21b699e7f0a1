"""Packed rows in the cache folder, as .npz: to tokenise a large set again takes longer than to read its rows."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spt_jax.cache_folder import code_digest, drop, entry_path, key_of, store, touch
from spt_jax.data.dialogue import Dialogue
from spt_jax.data.packing import PackedRows, Row
from spt_jax.numpy_files import read_npz

PACKAGES = ("spt_jax.data", "spt_jax.models.tokenization")
"""Whose code makes rows of dialogues."""

_ARRAYS = tuple(field.name for field in dataclasses.fields(Row) if field.name != "dialogue")
_COUNTS = tuple(field.name for field in dataclasses.fields(PackedRows) if field.name != "rows")


def kept_rows(make: Callable[[], PackedRows], dialogues: Sequence[Dialogue], depends_on: Sequence[str]) -> PackedRows:
    """The rows that `make` gives: from the cache folder where they are there and whole, else made and kept.

    Args:
      make: packs `dialogues`.
      dialogues: what the rows are made of; where they come from does not matter.
      depends_on: what else the rows depend on, but for the code of `PACKAGES`: tokenizer, template, limits.
    """
    said = (repr(dialogue.told) for dialogue in dialogues)
    code = (code_digest(package) for package in PACKAGES)
    entry = entry_path("rows", key_of(*code, str(len(depends_on)), *depends_on, *said))
    if entry is None:
        return make()
    try:
        rows = rows_from_bytes(entry.read_bytes())
        touch(entry)
        return rows
    except FileNotFoundError:
        pass
    except Exception:  # a damaged archive may raise anything
        drop(entry)
    rows = make()
    store(entry, rows_to_bytes(rows))
    return rows


def rows_to_bytes(packed: PackedRows) -> bytes:
    """Rows as the bytes of an .npz file, whose members have checksums.

    Every array of `Row` is one member, its rows end to end, beside one of their lengths (-1: it is None).
    """
    members: dict[str, Any] = {
        "dialogue": np.asarray([row.dialogue for row in packed.rows], dtype=np.int64),
        "counts": np.asarray([getattr(packed, name) for name in _COUNTS], dtype=np.int64),
    }
    for name in _ARRAYS:
        arrays = [getattr(row, name) for row in packed.rows]
        members[f"{name}.lengths"] = np.asarray([-1 if a is None else len(a) for a in arrays], dtype=np.int64)
        members[name] = np.concatenate([np.empty(0, np.int32), *(a for a in arrays if a is not None)])
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    return buffer.getvalue()


def rows_from_bytes(content: bytes) -> PackedRows:
    """What `rows_to_bytes` was given.

    Raises:
      Exception: of any kind, where `content` is damaged.
    """
    members = read_npz(content)
    numbers = members["dialogue"].tolist()
    counts = dict(zip(_COUNTS, members["counts"].tolist(), strict=True))
    columns = [_parts(members[name], members[f"{name}.lengths"]) for name in _ARRAYS]
    rows = [
        Row(dialogue=number, **dict(zip(_ARRAYS, arrays, strict=True)))
        for number, *arrays in zip(numbers, *columns, strict=True)
    ]
    return PackedRows(rows, **counts)


def _parts(joined: np.ndarray, lengths: np.ndarray) -> list[np.ndarray | None]:
    ends = np.cumsum(np.maximum(lengths, 0)).tolist()
    if joined.dtype != np.int32 or ends[-1:] not in ([], [len(joined)]):
        raise ValueError("the lengths are not those of the rows")
    starts = [0, *ends][: len(ends)]
    return [
        None if length < 0 else joined[start:end]
        for start, end, length in zip(starts, ends, lengths.tolist(), strict=True)
    ]
