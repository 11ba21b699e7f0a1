"""The lines that `spt-jax generate` replies to."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spt_jax.errors import UserError
from spt_jax.json_text import parse_json
from spt_jax.streams import read_file

RESULT_FIELDS = ("reply", "replies", "selected", "scores")
"""What is added to a request's fields."""

SEEDS = 2**31
"""A seed of draws is below it."""

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Request:
    """One conversation that wants a reply.

    Attributes:
        place: ``file:line``.
        persona: The persona's lines, stripped; may be none.
        history: Alternating utterances, stripped, the last one the partner's.
        seed: Of the draws of its reply; None where the line names none.
        fields: The whole JSON object, other fields included.
    """

    place: str
    persona: tuple[str, ...]
    history: tuple[str, ...]
    seed: int | None
    fields: dict[str, Any]


def read_requests(path: Path) -> list[Request]:
    """Reads a file of JSON lines; blank lines are skipped.

    Raises:
        UserError: If the file cannot be read or holds no request, or lines are malformed: one sentence a line, each
            with its ``file:line``.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    requests: list[Request] = []
    problems: list[str] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            requests.append(_request(line, place))
        except UserError as error:
            problems.append(f"{place}: {error}")
    _raise_all(problems)
    if not requests:
        raise UserError(f'{path} holds no request; give lines such as {{"persona": ["..."], "history": ["..."]}}')
    return requests


def encode_requests(
    requests: Sequence[Request], encode_context: Callable[[Sequence[str], Sequence[str]], list[int]]
) -> list[list[int]]:
    """The context of each request in tokens.

    Raises:
        UserError: If some do not fit, one sentence each with its ``file:line``.
    """
    contexts: list[list[int]] = []
    problems: list[str] = []
    for request in requests:
        try:
            contexts.append(encode_context(request.persona, request.history))
        except UserError as error:
            problems.append(f"{request.place}: {error}")
    _raise_all(problems)
    return contexts


def _raise_all(problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more lines"] if len(problems) > _SHOWN else []
        raise UserError("\n".join(problems[:_SHOWN] + more))


def _request(line: bytes, place: str) -> Request:
    try:
        fields = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON at column {error.colno} ({error.msg})") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise UserError(f"not JSON that can be read ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"expected an object with persona and history, got {type(fields).__name__}")
    for name in RESULT_FIELDS:
        if name in fields:
            raise UserError(f"the field {name!r} would be overwritten by the result; rename it")
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("half of a surrogate pair (such as \\ud83d alone) is not text") from error
    except ValueError as error:
        raise UserError("a number that is not finite, which JSON has no word for") from error
    except RecursionError as error:  # a little less deep than what can be read
        raise UserError("JSON nested too deeply") from error
    persona = _texts(fields, "persona")
    history = _texts(fields, "history")
    if not history:
        raise UserError("history is empty; it ends with the partner's utterance")
    seed = fields.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < SEEDS):
        raise UserError(f"seed must be a whole number from 0 to {SEEDS - 1}")
    return Request(place, persona, history, seed, fields)


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    if name not in fields:
        near = difflib.get_close_matches(name, list(fields), n=1)
        raise UserError(f"the field {name!r} is missing" + (f" (there is {near[0]!r}: a typo?)" if near else ""))
    value = fields[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{name} must be a list of strings")
    for position, text in enumerate(value, start=1):
        if not text.strip():
            raise UserError(f"entry {position} of {name} is empty")
    return tuple(text.strip() for text in value)  # as everywhere else
