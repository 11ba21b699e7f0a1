"""ParlAI's ConvAI2 text: numbered lines, persona lines first, then `query<tab>response[<tab>reward<tab>candidates]`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.problems import MalformedError, Problems

_NUMBERED = re.compile(r"\s*([0-9]{1,9})(?: |$)")
_PERSONA = re.compile(r"(your|partner's) persona:(.*)", re.DOTALL)
_MAX_FIELDS = 4


@dataclass
class _Draft:
    """A dialogue while its lines are read."""

    first_line: int
    number: int
    persona: list[str] = field(default_factory=list)
    partner_persona: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    broken_start: bool = False  # its first line is a problem already told


def parse_parlai(lines: Iterable[bytes], problems: Problems) -> list[Dialogue]:
    r"""Reads dialogues from the lines of a ConvAI2 file.

    A line numbered 1 begins a dialogue. A line with a tab is a turn, whatever its words; one without is
    `your persona: …` or `partner's persona: …`. Blank lines, CRLF and a byte order mark are accepted, `\n` in a text
    stands for a line break as in ParlAI, and `__SILENCE__` is a query like any other.

    A malformed line goes to `problems` and is left out alone: the dialogue goes on without it and the numbering resumes
    after it; a number smaller than the one before begins a new dialogue. A dialogue left without turns is a problem of
    its own.

    Args:
      lines: raw lines, ends included or not.
      problems: receives line numbers, counted from 1, and reasons.

    Returns:
      The dialogues in file order.
    """
    dialogues: list[Dialogue] = []
    draft: _Draft | None = None
    after_numberless = False
    for line_number, raw in enumerate(lines, start=1):
        if line_number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        line, undecodable = _decoded(raw)
        try:
            number, text = _numbered(line)
        except MalformedError as error:
            problems.add(line_number, str(undecodable or error))
            after_numberless = True
            continue
        expected = draft.number + 1 if draft else 1
        hint = f"{expected} or 1" if draft else "1"
        gap = number != 1 and number != expected and not (after_numberless and draft and number > draft.number)
        if draft is None or number == 1 or number < draft.number:
            _finish(draft, dialogues, problems)
            draft = _Draft(first_line=line_number, number=number, broken_start=gap or undecodable is not None)
        draft.number = number
        after_numberless = False
        try:
            if undecodable:
                raise undecodable
            if gap:
                raise MalformedError(f"line number {number} does not continue: expected {hint}")
            _read_body(text, draft)
        except MalformedError as error:
            problems.add(line_number, str(error))
    _finish(draft, dialogues, problems)
    return dialogues


def decode_line(raw: bytes) -> str:
    """A raw line as text without its line end.

    Raises:
      MalformedError: it is not valid UTF-8.
    """
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise MalformedError(f"not valid UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1})") from None


def _decoded(raw: bytes) -> tuple[str, MalformedError | None]:
    """A line, and what is wrong with its bytes: its number says nevertheless which dialogue goes on."""
    try:
        return decode_line(raw), None
    except MalformedError as error:
        return raw.decode("utf-8", errors="replace").rstrip("\r\n"), error


def _numbered(line: str) -> tuple[int, str]:
    match = _NUMBERED.match(line)
    if match is None:
        raise MalformedError(f"the line has no number in front: {_shown(line)}")
    return int(match[1]), line[match.end() :]


def _read_body(text: str, draft: _Draft) -> None:
    if "\t" in text:
        draft.turns.append(_turn(text))
        return
    match = _PERSONA.match(text.strip())
    if match is None:
        raise MalformedError(f"no tab between query and response, and no 'your persona:' in front: {_shown(text)}")
    if draft.turns:
        raise MalformedError("a persona line after the dialogue's first turn")
    line = _clean(match[2])
    if not line:
        raise MalformedError("the persona line is empty")
    (draft.persona if match[1] == "your" else draft.partner_persona).append(line)


def _turn(text: str) -> Turn:
    fields = text.split("\t")
    if len(fields) > _MAX_FIELDS:
        raise MalformedError(
            f"{len(fields)} fields between tabs; at most {_MAX_FIELDS} are allowed: query, response, reward, candidates"
        )
    query, response = _clean(fields[0]), _clean(fields[1])
    if not query:
        raise MalformedError("the query is empty")
    if not response:
        raise MalformedError("the response is empty")
    candidates = (_clean(part) for part in fields[3].split("|")) if len(fields) == _MAX_FIELDS else ()
    return Turn(query, response, tuple(part for part in candidates if part))


def _finish(draft: _Draft | None, dialogues: list[Dialogue], problems: Problems) -> None:
    if draft is None:
        return
    if not draft.turns:
        if not draft.broken_start or draft.persona or draft.partner_persona:
            problems.add(draft.first_line, "the dialogue that begins here has no turns")
        return
    dialogues.append(
        Dialogue(
            tuple(draft.persona), tuple(draft.turns), tuple(draft.partner_persona), problems.place(draft.first_line)
        )
    )


def _clean(text: str) -> str:
    return text.replace("\\n", "\n").strip()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
