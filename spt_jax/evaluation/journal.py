"""What an evaluation has found so far, on disk as it comes, so that one that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError
from spt_jax.evaluation.candidate_scores import CandidateScores
from spt_jax.evaluation.likelihood import Likelihoods
from spt_jax.json_text import is_number, is_text, parse_json
from spt_jax.locked_folder import locked_folder
from spt_jax.parallel.distributed import is_lead, told_by_lead
from spt_jax.storage.read_copy import ENDED, JOURNAL

Turn = tuple[int, int]
"""Dialogue and turn."""
_Kept = TypeVar("_Kept")


class Journal:
    """A folder with what is known of every column of an evaluation that has begun.

    Each has its own, so that a short evaluation in between takes nothing from a long one that was stopped. Of several
    processes the first reads, tells the others what it read, and writes.

    Args:
        workdir: The run's working directory.
        groundwork: Of `spt_jax.evaluation.kept_results.Question`: a hash of all that likelihoods and replies follow
            from.
    """

    def __init__(self, workdir: Path, groundwork: str) -> None:
        self._folder = workdir / JOURNAL / groundwork
        self._ended = workdir / ENDED / groundwork

    def column(self, name: str) -> KeptColumn:
        """The part of a column."""
        return KeptColumn(self._folder, name)

    @property
    def begun(self) -> int:
        """How many replies an evaluation that was stopped has left on this process's disk, over all columns."""
        # What was found twice is the same line.
        return sum(len(set(_read_bytes(path).splitlines())) for path in self._folder.glob(f"*{_REPLIES}"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other evaluations that would find the same out while the context is open.

        For the process that writes.

        Raises:
            UserError: The folder cannot be made, or another process evaluates the same.
        """
        with locked_folder(self._folder, f"another process is evaluating the same in {self._folder.parents[1]}"):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # something is kept there
                    self._folder.rmdir()
                    self._folder.parent.rmdir()

    def reopen(self) -> bool:
        """Adds what the last evaluation that came to its end found, where this one needs the same.

        For the process that writes.

        Returns:
            Whether there was one.

        Raises:
            UserError: It cannot be written.
        """
        if not self._ended.is_dir():
            return False
        _make_folder(self._folder)
        for ended in self._ended.glob("*.jsonl"):
            # What one that was stopped since has found is the same, and stands behind: its last line may be cut off.
            path = self._folder / ended.name
            write_atomically(path, _read_bytes(ended) + _read_bytes(path))
        return True

    def close(self) -> None:
        """Puts everything where `reopen` finds it, in the place of an earlier evaluation's: the results are written.

        For the process that writes.
        """
        for earlier in self._ended.parent.glob("*"):
            shutil.rmtree(earlier, ignore_errors=True)
        with contextlib.suppress(OSError):  # then it is not kept
            self._ended.parent.mkdir(exist_ok=True)
            self._folder.rename(self._ended)
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another evaluation's is there
            self._folder.parent.rmdir()


class KeptColumn:
    """Likelihoods, replies and candidates' scores of a column.

    Args:
        folder: Of the journal; made with the first thing that is kept.
        name: The column's.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._stem = re.sub(r"[^a-z0-9]+", "_", name.lower())

    def likelihoods(self) -> Likelihoods | None:
        """Those of the turns that are known, in the order in which they came; None where there are none."""
        known = dict(self._rows(_LIKELIHOODS, _likelihood))
        if len({len(nll) for _, nll, _ in known.values()}) != 1:
            return None
        tokens, nll, scores = zip(*known.values(), strict=True)
        dialogue, turn = np.array([*known]).T
        return Likelihoods(dialogue, turn, np.array(tokens), np.array(nll, np.float32), np.array(scores, np.float32))

    def keep_likelihoods(self, found: Likelihoods) -> None:
        """Adds those of some turns; a float32 is read as it was.

        Raises:
            UserError: They cannot be written.
        """
        turns = zip(found.dialogue.tolist(), found.turn.tolist(), strict=True)
        columns = zip(found.tokens.tolist(), found.nll.tolist(), found.scores.tolist(), strict=True)
        self._add(_LIKELIHOODS, [*turns], ({"tokens": t, "nll": nll, "scores": s} for t, nll, s in columns))

    def replies(self) -> dict[Turn, str]:
        """The replies that are known; a line that was cut off while it was written is taken out."""
        return dict(self._rows(_REPLIES, _reply))

    def keep_replies(self, turns: Sequence[Turn], replies: Sequence[str]) -> None:
        """Adds replies.

        Raises:
            UserError: They cannot be written.
        """
        self._add(_REPLIES, turns, ({"reply": reply} for reply in replies))

    def candidates(self) -> dict[Turn, CandidateScores]:
        """The scores of candidates that are known, as `replies`."""
        return dict(self._rows(_CANDIDATES, _scores))

    def keep_candidates(self, turns: Sequence[Turn], scores: Sequence[CandidateScores]) -> None:
        """Adds scores of candidates.

        Raises:
            UserError: They cannot be written.
        """
        self._add(_CANDIDATES, turns, ({"nll": s.nll.tolist(), "tokens": s.tokens.tolist()} for s in scores))

    def _rows(self, kind: str, read: Callable[[Mapping[str, Any]], _Kept]) -> Iterator[tuple[Turn, _Kept]]:
        """The lines of a file up to the first that is not whole, which is cut off with what follows it."""
        path = self._file(kind)
        whole = 0
        for line in _bytes_of_lead(path).splitlines(keepends=True):
            try:
                row = parse_json(line)
                turn, kept = (_whole(row["dialogue"]), _whole(row["turn"])), read(row)
            except (ValueError, KeyError, TypeError, OverflowError):
                break
            if not line.endswith(b"\n"):
                break
            yield turn, kept
            whole += len(line)
        if is_lead() and path.exists() and path.stat().st_size > whole:
            with _writing(path), path.open("r+b") as file:
                file.truncate(whole)

    def _add(self, kind: str, turns: Sequence[Turn], rows: Iterable[Mapping[str, Any]]) -> None:
        if not is_lead():
            return
        lines = [
            json.dumps({"dialogue": d, "turn": t, **row}, ensure_ascii=False) + "\n"
            for (d, t), row in zip(turns, rows, strict=True)
        ]
        _make_folder(self._folder)
        path = self._file(kind)
        with _writing(path), path.open("ab") as file:
            file.write("".join(lines).encode())

    def _file(self, kind: str) -> Path:
        return self._folder / (self._stem + kind)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None


_LIKELIHOODS, _REPLIES, _CANDIDATES = ".likelihoods.jsonl", ".replies.jsonl", ".candidates.jsonl"


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _reply(row: Mapping[str, Any]) -> str:
    if not is_text(row["reply"]):
        raise ValueError("the reply is not a text")
    return row["reply"]


def _likelihood(row: Mapping[str, Any]) -> tuple[int, list[float], list[float]]:
    tokens, nll, scores = _whole(row["tokens"]), row["nll"], row["scores"]
    if len(nll) != len(scores) or not nll or not all(map(is_number, [*nll, *scores])):
        raise ValueError("a turn lacks its likelihood, or its score, under a prompt")
    return tokens, nll, scores


def _scores(row: Mapping[str, Any]) -> CandidateScores:
    nll, tokens = row["nll"], row["tokens"]
    if len(nll) != len(tokens) or not all(map(is_number, nll)) or not all(_whole(count) > 0 for count in tokens):
        raise ValueError("a candidate lacks its likelihood or its length")
    return CandidateScores(np.asarray(nll, np.float64), np.asarray(tokens, np.int64))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _bytes_of_lead(path: Path) -> bytes:
    """What the first process's file holds, to all of them; nothing where it has none."""
    return told_by_lead(_read_bytes(path) if is_lead() else b"")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; without it the evaluation begins anew") from error
