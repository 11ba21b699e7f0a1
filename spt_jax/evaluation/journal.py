"""What an evaluation has found so far, on disk as it comes, so that one that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.evaluation.likelihood import Likelihoods

FOLDER = "evaluation.partial"
Turn = tuple[int, int]
"""Dialogue and turn."""


class Journal:
    """A folder with the likelihoods and replies of every column of an evaluation that has begun.

    Each question has its own, so that a short evaluation in between takes nothing from a long one that was stopped. For
    one process: several would have to know the same.

    Args:
        workdir: The run's working directory.
        question: Of `spt_jax.evaluation.kept_results.question`, a hash of everything that the results follow from.
    """

    def __init__(self, workdir: Path, question: str) -> None:
        self._folder = workdir / FOLDER / question

    def likelihoods(self, column: str) -> Likelihoods | None:
        """Those of a column; None where they are not known yet."""
        try:
            with np.load(io.BytesIO(_read_bytes(self._file(column, "npz"))), allow_pickle=False) as found:
                return Likelihoods(*(found[name] for name in _FIELDS))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep_likelihoods(self, column: str, likelihoods: Likelihoods) -> None:
        """Writes those of a column, whole or not at all.

        Raises:
            UserError: They cannot be written.
        """
        self._make_folder()
        content = io.BytesIO()
        np.savez(content, **{name: getattr(likelihoods, name) for name in _FIELDS})
        write_atomically(self._file(column, "npz"), content.getvalue())

    def replies(self, column: str) -> dict[Turn, str]:
        """The replies of a column that are known; a line that was cut off while it was written is taken out."""
        path = self._file(column, "jsonl")
        known: dict[Turn, str] = {}
        whole = 0
        for line in _read_bytes(path).splitlines(keepends=True):
            try:
                row = json.loads(line)
                key = int(row["dialogue"]), int(row["turn"])
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            known[key] = str(row["reply"])
            whole += len(line)
        if path.exists() and path.stat().st_size > whole:
            with path.open("r+b") as file:
                file.truncate(whole)
        return known

    def keep_replies(self, column: str, turns: Sequence[Turn], replies: Sequence[str]) -> None:
        """Adds replies of a column.

        Raises:
            UserError: They cannot be written.
        """
        rows = [
            json.dumps({"dialogue": d, "turn": t, "reply": reply}, ensure_ascii=False) + "\n"
            for (d, t), reply in zip(turns, replies, strict=True)
        ]
        self._make_folder()
        path = self._file(column, "jsonl")
        try:
            with path.open("ab") as file:
                file.write("".join(rows).encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Throws everything of this question away: the results are written."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another question's is there
            self._folder.parent.rmdir()

    @property
    def begun(self) -> int:
        """How many replies an evaluation that was stopped has left, over all columns."""
        return sum(len(_read_bytes(path).splitlines()) for path in self._folder.glob("*.jsonl"))

    def column(self, name: str) -> KeptColumn:
        """The part of a column."""
        return KeptColumn(self, name)

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be made: {error.strerror}") from None

    def _file(self, column: str, ending: str) -> Path:
        return self._folder / f"{re.sub(r'[^a-z0-9]+', '_', column.lower())}.{ending}"


@dataclasses.dataclass(frozen=True)
class KeptColumn:
    """A column of a journal.

    Attributes:
        journal: The journal.
        name: The column's.
    """

    journal: Journal
    name: str

    def likelihoods(self) -> Likelihoods | None:
        """See `Journal.likelihoods`."""
        return self.journal.likelihoods(self.name)

    def keep_likelihoods(self, likelihoods: Likelihoods) -> None:
        """See `Journal.keep_likelihoods`."""
        self.journal.keep_likelihoods(self.name, likelihoods)

    def replies(self) -> dict[Turn, str]:
        """See `Journal.replies`."""
        return self.journal.replies(self.name)

    def keep_replies(self, turns: Sequence[Turn], replies: Sequence[str]) -> None:
        """See `Journal.keep_replies`."""
        self.journal.keep_replies(self.name, turns, replies)


_FIELDS = ("dialogue", "turn", "tokens", "nll", "scores")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
