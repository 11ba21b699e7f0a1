from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.data import Dialogue, Turn
from spt_jax.data.problems import Problems
from spt_jax.data.records import parse_json_lines, parse_rows
from spt_jax.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(str.strip).filter(bool)


def parse(*lines: str | bytes, on_error: str = "raise") -> tuple[list[Dialogue], tuple[str, ...]]:
    problems = Problems("f.jsonl", on_error)
    dialogues = parse_json_lines([line.encode() if isinstance(line, str) else line for line in lines], problems)
    return dialogues, problems.finish()


@given(
    st.lists(TEXTS, max_size=3), st.lists(st.tuples(TEXTS, TEXTS, st.lists(TEXTS, max_size=2)), min_size=1, max_size=4)
)
def test_json_lines_round_trip_as_objects_and_as_pairs(persona, turns):
    objects = [{"query": q, "response": r, "candidates": c} for q, r, c in turns]
    pairs = [[q, r] for q, r, _ in turns]
    first, second = parse(
        json.dumps({"persona": persona, "turns": objects, "id": 3}) + "\r\n",
        json.dumps({"persona": persona, "turns": pairs, "partner_persona": persona}, ensure_ascii=False),
    )[0]
    assert first == Dialogue(tuple(persona), tuple(Turn(q, r, tuple(c)) for q, r, c in turns), (), "f.jsonl:1")
    assert second == Dialogue(tuple(persona), tuple(Turn(q, r) for q, r, _ in turns), tuple(persona), "f.jsonl:2")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("[1]", "a JSON object is expected, not a list of 1"),
        ('{"turns": []}', "the key 'persona' is missing"),
        ('{"personas": [], "turns": [["a", "b"]]}', r"the key 'persona' is missing \(is 'personas' meant\?\)"),
        ('{"persona": []}', "the key 'turns' is missing"),
        ('{"persona": "i run", "turns": [["a", "b"]]}', "'persona' must be a list of texts, not a text"),
        ('{"persona": [1], "turns": [["a", "b"]]}', "item 1 of 'persona' must be a text, not a number"),
        ('{"persona": [], "turns": []}', "the dialogue has no turns"),
        ('{"persona": [], "turns": {"a": "b"}}', "'turns' must be a list, not an object"),
        ('{"persona": [], "turns": ["a", "b"]}', "turn 1 must be an object"),
        ('{"persona": [], "turns": [["a", "b"], ["c"]]}', "turn 2 must be an object .*not a list of 1"),
        (
            '{"persona": [], "turns": [{"query": "a", "reponse": "b"}]}',
            r"in turn 1 the key 'response' is missing \(is 'reponse' meant\?\)",
        ),
        ('{"persona": [], "turns": [["a", " "]]}', "the response of turn 1 is empty"),
        ('{"persona": [], "turns": [["", "b"]]}', "the query of turn 1 is empty"),
        ('{"persona": [], "turns": [["a", null]]}', "the response of turn 1 must be a text, not null"),
        ('{"persona": [], "turns": [["a", "\\ud800"]]}', "half of a surrogate pair"),
        (
            '{"persona": [], "turns": [{"query": "a", "response": "b", "candidates": "c"}]}',
            "the candidates of turn 1 must be",
        ),
        (b'{"persona": ["\xff"]}', "not valid UTF-8"),
    ],
)
def test_a_malformed_record_is_named_with_its_line(record, reason):
    good = '{"persona": [], "turns": [["a", "b"]]}'
    with pytest.raises(UserError, match=rf"^f\.jsonl:3: .*{reason}"):
        parse(good, "", record)
    dialogues, skipped = parse(good, "", record, good, on_error="skip")
    assert [d.source for d in dialogues] == ["f.jsonl:1", "f.jsonl:4"] and len(skipped) == 1


def rows(*records: dict[str, object]) -> list[Dialogue]:
    problems = Problems("t", "raise")
    dialogues = parse_rows(records, problems)
    problems.finish()
    return dialogues


def test_only_line_ends_part_the_utterances_of_a_history():
    rows = [{"persona": "i sail.", "history": "hi\nhello\u2028there\x0b\u0085you\r\nso?", "response": "yes"}]
    (dialogue,) = parse_rows(rows, Problems("f", "raise"))
    assert dialogue.turns == (Turn("hi", "hello\u2028there\x0b\u0085you"), Turn("so?", "yes"))


def test_rows_of_a_growing_history_become_one_dialogue_and_every_turn_is_learned_once():
    a = {"persona": ["i run."], "history": ["q1"], "response": "r1"}
    b = {"persona": ["i run."], "history": ["q1", "r1", "q2"], "response": "r2"}
    other = {"persona": ["i swim."], "history": ["q1", "r1", "q2"], "response": "r2"}
    read = rows(a, b, other)
    assert [d.turns for d in read] == [(Turn("q1", "r1"), Turn("q2", "r2"))] * 2
    assert [d.source for d in read] == ["t:1", "t:3"]
    assert len(rows(b, a)) == 2
    assert len(rows(a, other)) == 2


def test_rows_accept_texts_of_several_lines_own_openings_and_candidates_alone():
    (read,) = rows({"persona": "i run.\n\ni swim.", "history": "hello\nhi", "response": None, "candidates": ["x", "y"]})
    assert read.persona == ("i run.", "i swim.")
    assert read.turns == (Turn("__SILENCE__", "hello"), Turn("hi", "y", ("x", "y")))
    (flat,) = rows({"persona": [], "turns": ["a", "b", "c", "d"]})
    assert flat.turns == (Turn("a", "b"), Turn("c", "d"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"persona": [], "history": [], "response": "r"}, "'history' is empty"),
        ({"persona": [], "history": None, "response": "r"}, "'history' must be a list of texts, not null"),
        ({"persona": [], "history": ["q"], "response": ""}, "the response is empty"),
        ({"persona": None, "history": ["q"], "response": "r"}, "'persona' must be a list of texts, not null"),
        ({"persona": [], "turns": ["a", "b", "c"]}, "3 utterances"),
    ],
)
def test_a_malformed_row_is_named_with_its_number(row, reason):
    with pytest.raises(UserError, match=f"^t:1: .*{reason}"):
        rows(row)
