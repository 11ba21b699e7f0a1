"""Whatever a file holds, it is JSON or a ValueError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spt_jax.errors import UserError
from spt_jax.json_text import is_number, is_text, json_object, parse_json, whole_objects

DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, "9" * 5000, "", "{", b"\xff", '{"a": 1}}'])
def test_every_refusal_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_lines_that_are_no_objects_are_left_out() -> None:
    rows = [{"a": 1}, {"b": "é\u2028"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    content = b"\n".join([lines[0], b"", b"3", DEEP.encode(), b"\xff", lines[1], lines[0][:-1]])
    assert list(whole_objects(content)) == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "is not a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (DEEP.encode(), "nested too deeply"),
        (b'{"a": ["\\ud83d"]}', "half of a surrogate pair"),
        (b'{"\\uD83D": 1}', "half of a surrogate pair"),
    ],
)
def test_an_object_that_cannot_be_read_is_one_sentence_with_its_place(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        json_object(path)
    assert str(path) in str(error.value)
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert json_object(path) == {"a": "\N{GRINNING FACE}"}


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        json_object(tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, True),
        (-2.5, True),
        (True, False),
        (float("nan"), False),
        (float("inf"), False),
        (10**400, False),
        ("3", False),
    ],
)
def test_numbers_are_those_that_a_float_holds(value: object, expected: bool) -> None:
    assert is_number(value) is expected


@pytest.mark.parametrize(("value", "expected"), [("a", True), ("\ud83d", False), (3, False), (None, False)])
def test_half_of_a_surrogate_pair_is_no_text(value: object, expected: bool) -> None:
    assert is_text(value) is expected
