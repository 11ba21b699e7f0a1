"""One door to dialogues: a built-in set, a ParlAI file, JSON lines, or a table."""

from __future__ import annotations

import gzip
import importlib.resources
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from spt_jax.data.dialogue import DialogueSet
from spt_jax.data.parlai import parse_parlai
from spt_jax.data.problems import Problems
from spt_jax.data.records import parse_json_lines
from spt_jax.data.tables import BUILDERS, HUB_PREFIX, read_table
from spt_jax.errors import UserError, nearest
from spt_jax.user_paths import expanded

BUILTIN_PREFIX = "builtin:"
BUILTIN = ("train", "heldout")
FORMATS = ("auto", "parlai", "jsonl", "datasets")
LONGEST_LINE = 1 << 24
"""Bytes of a line at most."""
MOST_UNPACKED = 200
"""Bytes at most for each of a packed file, beyond the first MiB; text of conversations unpacks to some five."""
_FILE = "The data file"
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_dialogues(
    source: str,
    *,
    format: str = "auto",
    on_error: str = "raise",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
) -> DialogueSet:
    """Reads every dialogue of a source.

    Args:
      source: `builtin:train` or `builtin:heldout`; a ParlAI file (`.txt`); JSON lines (`.jsonl`); either also `.gz` or
        `.xz`; a `.parquet`, `.json`, `.csv`, `.tsv` or `.arrow` file or a folder for Hugging Face datasets; `hf:NAME`
        for a data set on the hub.
      format: "parlai", "jsonl" or "datasets"; "auto" goes by the name.
      on_error: "raise" reports malformed lines as one error; "skip" leaves them out and lists them in `skipped`.
      columns: for tables, field (persona, history, response, turns, …) -> column name.
      split: for tables, which split.

    Returns:
      The dialogues with the sentences about skipped lines; the set's name is `source`.

    Raises:
      UserError: the source does not exist or cannot be looked up, is empty or damaged, its format is unknown, a line is
        longer than `LONGEST_LINE` or malformed (with `on_error="raise"`), a packed file unpacks to more than
        `MOST_UNPACKED` times its size, or no dialogue is left.
    """
    problems = Problems(source, on_error)
    kind = _format(source, format)
    if columns and kind != "datasets":
        raise UserError(
            f"data.columns names a table's columns, but {source} is read as {kind!r}, which has none; "
            "data.format='datasets' reads tables."
        )
    if kind == "datasets":
        if not source.startswith(HUB_PREFIX):
            _existing(source)
        dialogues = read_table(source, problems, columns, split)
    else:
        parse = parse_parlai if kind == "parlai" else parse_json_lines
        try:
            with _open(source) as stream:
                dialogues = parse(_lines(stream, source), problems)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{source} cannot be read to its end: {error}.") from error
        except MemoryError as error:  # liblzma's dictionary is as large as the file says
            raise UserError(f"{source} cannot be read: it asks for more memory than there is.") from error
    skipped = problems.finish()
    if not dialogues:
        reason = f"; all its lines are malformed, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"{source} holds no dialogue{reason}.")
    return DialogueSet(tuple(dialogues), skipped, source)


def _format(source: str, format: str) -> str:
    if format not in FORMATS:
        raise UserError(f"data.format is {format!r}, allowed are {FORMATS}.{nearest(format, FORMATS)}")
    if format != "auto":
        return format
    if source.startswith(BUILTIN_PREFIX):
        return "parlai"
    if source.startswith(HUB_PREFIX):
        return "datasets"
    path = expanded(source, _FILE)
    if path.is_dir():
        return "datasets"
    suffix = (path.with_suffix("") if path.suffix in _OPENERS else path).suffix
    if suffix == ".jsonl":
        return "jsonl"
    if suffix == ".txt":
        return "parlai"
    if path.suffix in BUILDERS:
        return "datasets"
    _existing(source)
    known = [".txt", ".jsonl", *(name for name in BUILDERS if name != ".jsonl")]
    raise UserError(
        f"{source}: the format cannot be told from the name's end {path.suffix!r}; known are {', '.join(known)} "
        f"(.txt and .jsonl also with .gz or .xz), or set data.format to one of {FORMATS[1:]}.{nearest(suffix, known)}"
    )


def _open(source: str) -> IO[bytes]:
    if source.startswith(BUILTIN_PREFIX):
        name = source.removeprefix(BUILTIN_PREFIX)
        if name not in BUILTIN:
            allowed = [BUILTIN_PREFIX + known for known in BUILTIN]
            raise UserError(f"There is no built-in data set {source!r}; there are {allowed}.{nearest(source, allowed)}")
        return (importlib.resources.files("spt_jax.data") / "builtin" / f"{name}.txt").open("rb")
    path = _existing(source)
    if path.is_dir():
        raise UserError(f"{source} is a folder; a file is expected (a folder is read with data.format='datasets').")
    if path.stat().st_size == 0:
        raise UserError(f"{source} is empty; dialogues are expected.")
    return _OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[return-value]


def _lines(stream: IO[bytes], source: str) -> Iterator[bytes]:
    """The lines of a source; neither a lost line end nor a small packed file fills the memory.

    Raises:
      UserError: a line is too long, or the file unpacks to more than dialogues would.
    """
    packed = Path(source).suffix in _OPENERS
    most = (1 << 20) + MOST_UNPACKED * Path(source).expanduser().stat().st_size if packed else math.inf
    total, number = 0, 0
    while line := stream.readline(LONGEST_LINE + 1):
        total, number = total + len(line), number + 1
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{source}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; a line is a turn or a dialogue."
            )
        if total > most:
            raise UserError(f"{source} unpacks to more than {MOST_UNPACKED} times its size, which dialogues do not.")
        yield line


def _existing(source: str) -> Path:
    path = expanded(source, _FILE)
    if not path.exists():
        siblings = [str(path.with_name(sibling.name)) for sibling in path.parent.glob("*")]
        builtin = [BUILTIN_PREFIX + name for name in BUILTIN]
        raise UserError(f"{_FILE} {source} does not exist.{nearest(source, siblings + builtin)}")
    return path
