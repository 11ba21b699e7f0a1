from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.data import Dialogue, Turn
from spt_jax.data.parlai import parse_parlai
from spt_jax.data.problems import Problems
from spt_jax.errors import UserError

TEXTS = (
    st.text(st.characters(exclude_characters="\t\n\r\\|", exclude_categories=["Cs"]), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)
TURNS = st.builds(Turn, TEXTS, TEXTS, st.lists(TEXTS, max_size=3).map(tuple))
DIALOGUES = st.builds(
    Dialogue,
    st.lists(TEXTS, max_size=3).map(tuple),
    st.lists(TURNS, min_size=1, max_size=4).map(tuple),
    st.lists(TEXTS, max_size=2).map(tuple),
)


def parse(text: str | bytes, on_error: str = "skip") -> tuple[list[Dialogue], tuple[str, ...]]:
    raw = text.encode() if isinstance(text, str) else text
    problems = Problems("f.txt", on_error)
    dialogues = parse_parlai(raw.split(b"\n"), problems)
    return dialogues, problems.finish()


def lines_of(dialogue: Dialogue) -> list[str]:
    bodies = [f"your persona: {line}" for line in dialogue.persona]
    bodies += [f"partner's persona: {line}" for line in dialogue.partner_persona]
    for turn in dialogue.turns:
        candidates = "\t\t" + "|".join(turn.candidates) if turn.candidates else ""
        bodies.append(f"{turn.query}\t{turn.response}{candidates}")
    return [f"{number} {body}" for number, body in enumerate(bodies, start=1)]


@given(st.lists(DIALOGUES, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\r\n \r\n"]))
def test_what_is_written_is_read_back_whatever_the_line_ends(dialogues, byte_order_mark, end):
    text, first_lines, line = "\ufeff" * byte_order_mark, [], 1
    for dialogue in dialogues:
        first_lines.append(line)
        for written in lines_of(dialogue):
            text += written + end
            line += end.count("\n")
    read, skipped = parse(text)
    assert skipped == ()
    assert [(d.persona, d.turns, d.partner_persona) for d in read] == [
        (d.persona, d.turns, d.partner_persona) for d in dialogues
    ]
    assert [d.source for d in read] == [f"f.txt:{number}" for number in first_lines]


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.tuples(
                st.integers(0, 4), st.sampled_from(["your persona: a", "q\tr", "q\t", "\tr", "x", "q\tr\t\ta|b"])
            ).map(lambda pair: f"{pair[0]} {pair[1]}".encode()),
        ),
        max_size=12,
    )
)
def test_any_bytes_are_read_or_reported_and_every_line_is_accounted_for(lines):
    problems = Problems("f.txt", "skip")
    dialogues = parse_parlai(lines, problems)
    used = sum(len(d.persona) + len(d.turns) + len(d.partner_persona) for d in dialogues)
    bodies = sum(bool(line.removeprefix(b"\xef\xbb\xbf" if i == 0 else b"").strip()) for i, line in enumerate(lines))
    skipped = problems.finish()
    assert used <= bodies and (used == bodies or skipped)
    assert all(turn.query and turn.response for d in dialogues for turn in d.turns)


GOOD = "1 your persona: i run.\n2 hi\thello\n3 you ?\tfine"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("1 your persona: a\nhi\thello\n3 a\tb", 2, "no number"),
        (GOOD + "\n5 a\tb", 4, "line number 5 does not continue: expected 4 or 1"),
        (GOOD + "\n3 a\tb", 4, "line number 3 does not continue"),
        ("2 a\tb\n3 c\td", 1, "line number 2 does not continue: expected 1"),
        (GOOD + "\n4 no tab here", 4, "no tab"),
        (GOOD + "\n4 a\t", 4, "the response is empty"),
        (GOOD + "\n4 a\t \t\tx|y", 4, "the response is empty"),
        (GOOD + "\n4 \tb", 4, "the query is empty"),
        (GOOD + "\n4 your persona: late", 4, "a persona line after the dialogue's first turn"),
        (GOOD + "\n4 partner's persona: late", 4, "a persona line after the dialogue's first turn"),
        ("1 your persona:\n2 a\tb", 1, "the persona line is empty"),
        ("1 your persona: a\n1 your persona: b\n2 c\td", 1, "has no turns"),
        (GOOD + "\n4 a\tb\t\tc|d\te", 4, "5 fields"),
        (GOOD.encode() + b"\n4 caf\xe9\tb", 4, r"not valid UTF-8 \(byte 0xe9 at byte 6\)"),
    ],
)
def test_a_malformed_line_is_named_with_its_place_and_left_out_alone(text, line, reason):
    with pytest.raises(UserError, match=rf"^f\.txt:{line}: .*{reason}"):
        parse(text, "raise")
    dialogues, skipped = parse(text)
    assert len(skipped) == 1 and skipped[0].startswith(f"f.txt:{line}: ")
    first = text if isinstance(text, bytes) else text.encode()
    if first.startswith(GOOD.encode()):
        assert [len(d.turns) for d in dialogues] == [2]


def test_after_a_line_left_out_the_dialogue_goes_on():
    dialogues, skipped = parse(
        "1 your persona: a\n2 q1\tr1\n3 broken\n4 q2\tr2\nno number\tx\n6 q3\tr3\n9 lost\tx\n10 q4\tr4"
    )
    assert [[t.query for t in d.turns] for d in dialogues] == [["q1", "q2", "q3", "q4"]]
    assert [s.split(": ")[0] for s in skipped] == ["f.txt:3", "f.txt:5", "f.txt:7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"1 hello\thi\n1 caf\xe9\tfoo\n2 bar\tbaz", [((), ["hello"]), ((), ["bar"])]),
        (b"1 q\tr\n1 your persona: caf\xe9\n2 your persona: i sail\n3 x\ty", [((), ["q"]), (("i sail",), ["x"])]),
        (b"1 q\tr\n2 caf\xe9\tfoo\n3 x\ty", [((), ["q", "x"])]),
    ],
)
def test_the_number_of_a_line_that_is_not_utf_8_says_which_dialogue_goes_on(text, expected):
    dialogues, skipped = parse(text)
    assert [(d.persona, [turn.query for turn in d.turns]) for d in dialogues] == expected
    assert len(skipped) == 1 and "not valid UTF-8" in skipped[0]


def test_a_number_that_goes_back_begins_a_new_dialogue():
    dialogues, skipped = parse(GOOD + "\n2 your persona: b\n3 x\ty")
    assert [d.source for d in dialogues] == ["f.txt:1", "f.txt:4"] and len(skipped) == 1
    assert dialogues[1].turns == (Turn("x", "y"),)


def test_words_that_look_like_format_inside_texts_are_text():
    dialogues, skipped = parse(
        "1 your persona: my persona: is R: a\n2 your persona: what ?\tcontext: Q: R: 5:30\n3 __SILENCE__\thi"
    )
    assert skipped == ()
    assert dialogues[0].persona == ("my persona: is R: a",)
    assert dialogues[0].turns == (Turn("your persona: what ?", "context: Q: R: 5:30"), Turn("__SILENCE__", "hi"))


def test_several_problems_are_one_sentence_that_names_all_lines():
    with pytest.raises(
        UserError, match=r"^f\.txt:2: .*\nf\.txt:4: .*\nf\.txt:5: .*\n3 problems in all; data\.on_error='skip'"
    ):
        parse("1 a\tb\n2 c\n3 d\te\n4 f\n5 g\t", "raise")


def test_on_error_is_checked():
    with pytest.raises(UserError, match="Did you mean 'skip'"):
        Problems("f", "skp")
