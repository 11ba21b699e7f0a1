"""Dialogues from structured records: JSON lines, and rows of a table where one row is a dialogue or a turn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.parlai import decode_line
from spt_jax.data.problems import MalformedError, Problems
from spt_jax.json_text import parse_json

SILENCE = "__SILENCE__"
FIELDS = ("persona", "turns", "history", "response", "partner_persona", "candidates")


def parse_json_lines(lines: Iterable[bytes], problems: Problems) -> list[Dialogue]:
    """Reads one dialogue from every line: `{"persona": [...], "turns": [...], "partner_persona"?: [...]}`.

    A turn is `{"query", "response", "candidates"?}` or `[query, response]`; other keys are ignored. A malformed line,
    that is a whole dialogue, goes to `problems` and is left out.

    Args:
      lines: raw lines, ends included or not; blank ones are skipped.
      problems: receives line numbers, counted from 1, and reasons.

    Returns:
      The dialogues in file order.
    """
    dialogues = []
    for line_number, raw in enumerate(lines, start=1):
        if line_number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        try:
            record = _json_object(decode_line(raw))
            dialogues.append(_record_dialogue(record, problems.place(line_number)))
        except MalformedError as error:
            problems.add(line_number, str(error))
    return dialogues


def parse_rows(rows: Iterable[Mapping[str, object]], problems: Problems) -> list[Dialogue]:
    """Reads dialogues from table rows whose columns already bear this package's names (`FIELDS`).

    With `turns`, a row is a dialogue; turns may also be one flat list of utterances, query and response in turn. With
    `history` (utterances that end with the partner's) and `response`, a row is a turn: a row that continues the one
    before it (same persona, and its history begins with everything said there) extends that dialogue, any other row
    begins one with its history as earlier turns. Where `response` is absent the last candidate is the response. A
    history that begins with the persona's own words gets the query `__SILENCE__`. Texts of several lines may stand for
    lists.

    Args:
      rows: the table's rows.
      problems: receives row numbers, counted from 1, and reasons; a malformed row is left out.

    Returns:
      The dialogues in row order.
    """
    dialogues: list[Dialogue] = []
    for number, row in enumerate(rows, start=1):
        try:
            if row.get("turns") is not None:
                dialogues.append(_record_dialogue(row, problems.place(number), table=True))
                continue
            dialogue = _row_dialogue(row, problems.place(number))
        except MalformedError as error:
            problems.add(number, str(error))
            continue
        if dialogues and _continues(dialogue, dialogues[-1]):
            previous = dialogues[-1]
            dialogue = Dialogue(
                previous.persona,
                previous.turns + dialogue.turns[len(previous.turns) :],
                previous.partner_persona,
                previous.source,
            )
            dialogues[-1] = dialogue
        else:
            dialogues.append(dialogue)
    return dialogues


def _json_object(line: str) -> dict[str, object]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise MalformedError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise MalformedError(f"a JSON object is expected, not {_kind(record)}")
    for key in ("persona", "turns"):
        if key not in record:
            raise MalformedError(_missing(key, record))
    return record


def _record_dialogue(record: Mapping[str, object], place: str, *, table: bool = False) -> Dialogue:
    turns = record["turns"]
    if not isinstance(turns, (list, tuple)):
        raise MalformedError(f"'turns' must be a list, not {_kind(turns)}")
    if not turns:
        raise MalformedError("the dialogue has no turns")
    if table and all(isinstance(turn, str) for turn in turns):
        if len(turns) % 2:
            raise MalformedError(
                f"'turns' has {len(turns)} utterances; query and response must alternate, so an even number"
            )
        turns = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    return Dialogue(
        persona=_lines(record.get("persona"), "persona", table),
        turns=tuple(_turn(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)),
        partner_persona=_lines(record.get("partner_persona") or [], "partner_persona", table),
        source=place,
    )


def _turn(turn: object, where: str) -> Turn:
    if isinstance(turn, Mapping):
        for key in ("query", "response"):
            if key not in turn:
                raise MalformedError(f"in {where} {_missing(key, turn)}")
        query, response, candidates = turn["query"], turn["response"], turn.get("candidates") or []
    elif isinstance(turn, (list, tuple)) and len(turn) == 2:
        (query, response), candidates = turn, []
    else:
        raise MalformedError(
            f"{where} must be an object with 'query' and 'response', or a list of the two, not {_kind(turn)}"
        )
    return Turn(
        _text(query, f"the query of {where}"),
        _text(response, f"the response of {where}"),
        _texts(candidates, f"the candidates of {where}"),
    )


def _row_dialogue(row: Mapping[str, object], place: str) -> Dialogue:
    history = row.get("history")
    if isinstance(history, str):
        history = _split(history)
    utterances = list(_texts(history, "'history'"))
    if not utterances:
        raise MalformedError("'history' is empty; it must end with the partner's utterance")
    candidates = _texts(row.get("candidates") or [], "'candidates'")
    response = row.get("response")
    if response is None and candidates:
        response = candidates[-1]
    if len(utterances) % 2 == 0:
        utterances.insert(0, SILENCE)
    earlier = [Turn(utterances[i], utterances[i + 1]) for i in range(0, len(utterances) - 1, 2)]
    last = Turn(utterances[-1], _text(response, "the response"), candidates)
    return Dialogue(
        persona=_lines(row.get("persona"), "persona", True),
        turns=(*earlier, last),
        partner_persona=_lines(row.get("partner_persona") or [], "partner_persona", True),
        source=place,
    )


def _continues(later: Dialogue, earlier: Dialogue) -> bool:
    said = [(turn.query, turn.response) for turn in earlier.turns]
    begins = [(turn.query, turn.response) for turn in later.turns[: len(said)]]
    return later.persona == earlier.persona and len(later.turns) > len(said) and begins == said


def _lines(value: object, name: str, table: bool) -> tuple[str, ...]:
    if table and isinstance(value, str):
        value = _split(value)
    return _texts(value, repr(name))


def _split(text: str) -> list[str]:
    """The lines of a text, blank ones left out: other separators of Unicode's, as U+2028, are part of what was said."""
    return [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise MalformedError(f"{where} must be a list of texts, not {_kind(value)}")
    return tuple(_text(part, f"item {number} of {where}") for number, part in enumerate(value, start=1))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise MalformedError(f"{where} must be a text, not {_kind(value)}")
    text = value.strip()
    if not text:
        raise MalformedError(f"{where} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedError(f"{where} holds half of a surrogate pair, which is no text") from None
    return text


def _missing(key: str, present: Iterable[object]) -> str:
    match = difflib.get_close_matches(key, [str(name) for name in present], n=1)
    return f"the key {key!r} is missing" + (f" (is {match[0]!r} meant?)" if match else "")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", dict: "an object"}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    return names.get(type(value), f"a {type(value).__name__}")
