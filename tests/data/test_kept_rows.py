"""Rows from the cache folder are the rows that packing gives, or they are not taken from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_encoders import CharacterEncoder, MergingEncoder

from spt_jax.cache_folder import code_digest
from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.kept_rows import kept_rows, rows_from_bytes, rows_to_bytes
from spt_jax.data.packing import PackedRows, Row, pack

DIALOGUES = (
    Dialogue(("i sail .",), (Turn("hi", "hello é"), Turn("where ?", "at sea .")), source="a.txt:1"),
    Dialogue(("i bake .", "i sing ."), (Turn("hey", "hi"), Turn("tired ?", "no"), Turn("why ?", "well")), ("x",)),
)


def assert_same(found: PackedRows, expected: PackedRows) -> None:
    counts = [field.name for field in dataclasses.fields(PackedRows) if field.name != "rows"]
    assert [getattr(found, name) for name in counts] == [getattr(expected, name) for name in counts]
    assert len(found.rows) == len(expected.rows)
    for a, b in zip(found.rows, expected.rows, strict=True):
        assert type(a.dialogue) is int
        for field in dataclasses.fields(Row):
            one, other = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(one, other, strict=isinstance(other, np.ndarray))


def never() -> PackedRows:
    raise AssertionError("the rows were packed")


def kept(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "rows").glob("*"))


ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(lambda values: np.asarray(values, np.int32))
some_rows = st.builds(Row, ids, ids, ids, ids, ids, st.integers(0, 10**9), ids, st.none() | ids)
packed_rows = st.builds(PackedRows, st.lists(some_rows, max_size=4), *[st.integers(0, 9)] * 4)


@given(packed_rows)
def test_rows_come_back_as_they_went(packed: PackedRows) -> None:
    assert_same(rows_from_bytes(rows_to_bytes(packed)), packed)


@pytest.mark.parametrize("layout", ["dialogue", "turn"])
@pytest.mark.parametrize("encoder", [CharacterEncoder(), MergingEncoder(3)])
@pytest.mark.parametrize("max_length", [60, 300])
def test_rows_from_the_cache_equal_rows_packed_anew(
    cache_home: Path, layout: str, encoder: CharacterEncoder, max_length: int
) -> None:
    packed = pack(DIALOGUES, encoder, layout=layout, max_length=max_length)
    assert_same(kept_rows(lambda: packed, DIALOGUES, ["a"]), packed)
    assert_same(kept_rows(never, DIALOGUES, ["a"]), packed)


def test_other_dialogues_or_conditions_are_another_entry(cache_home: Path) -> None:
    first, second = DIALOGUES
    assert isinstance(first.turns, tuple)
    said = dataclasses.replace(first, turns=(dataclasses.replace(first.turns[0], response="hello e"), first.turns[1]))
    joined = dataclasses.replace(second, persona=("i bake . i sing .",))
    sets = [(first, second), (second, first), (first,), (said, second), (first, joined), ()]
    conditions = [["a"], ["b"], ["a", ""], ["", "a"]]
    for dialogues in sets:
        for depends_on in conditions:
            packed = pack(dialogues, CharacterEncoder(), layout="turn", max_length=300)
            assert_same(kept_rows(lambda packed=packed: packed, dialogues, depends_on), packed)
    assert len(kept(cache_home)) == len(sets) * len(conditions)


def test_the_place_of_a_dialogue_does_not_matter_but_everything_in_it(cache_home: Path) -> None:
    packed = pack(DIALOGUES, CharacterEncoder(), layout="turn", max_length=300)
    kept_rows(lambda: packed, DIALOGUES, [])
    moved = [dataclasses.replace(dialogue, source="b.txt:7") for dialogue in DIALOGUES]
    assert_same(kept_rows(never, moved, []), packed)
    # Official rows leave out a turn whose line, candidates and all, holds a persona's mark.
    with_candidates = dataclasses.replace(moved[0], turns=(Turn("hi", "hello é", ("no", "yes")), moved[0].turns[1]))
    for other in (with_candidates, dataclasses.replace(moved[0], partner_persona=("i sail.",))):
        with pytest.raises(AssertionError, match="were packed"):
            kept_rows(never, [other, *moved[1:]], [])


def test_rows_that_cannot_be_packed_are_not_kept(cache_home: Path) -> None:
    for _ in range(2):
        with pytest.raises(AssertionError, match="were packed"):
            kept_rows(never, DIALOGUES, [])
    assert kept(cache_home) == []


def cut(content: bytearray, place: int) -> bytes:
    return bytes(content[:place])


def flip(content: bytearray, place: int) -> bytes:
    content[place] ^= 0x10
    return bytes(content)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([cut, flip]), st.floats(0, 1, exclude_max=True))
def test_a_damaged_entry_is_never_wrong_and_is_made_anew(
    cache_home: Path, damage: Callable[[bytearray, int], bytes], place: float
) -> None:
    packed = pack(DIALOGUES, CharacterEncoder(), layout="dialogue", max_length=300)
    kept_rows(lambda: packed, DIALOGUES, [])
    [entry] = kept(cache_home)
    content = entry.read_bytes()
    entry.write_bytes(damage(bytearray(content), int(place * len(content))))
    assert_same(kept_rows(lambda: packed, DIALOGUES, []), packed)
    assert_same(kept_rows(never, DIALOGUES, []), packed)


@pytest.mark.parametrize("why", ["off", "unusable"])
def test_without_a_cache_folder_rows_are_packed(cache_home: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "off":
        monkeypatch.setenv("SPT_JAX_CACHE_GB", "0")
    else:
        cache_home.parent.write_text("a file where the folder should be")
    packed = pack(DIALOGUES, CharacterEncoder(), layout="turn", max_length=300)
    for _ in range(2):
        assert_same(kept_rows(lambda: packed, DIALOGUES, []), packed)
    assert kept(cache_home) == []


@pytest.mark.parametrize("changed", ["spt_jax.data", "spt_jax.models.tokenization"])
def test_rows_that_another_version_packed_are_packed_anew(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    packed = pack(DIALOGUES, CharacterEncoder(), layout="turn", max_length=300)
    kept_rows(lambda: packed, DIALOGUES, [])

    def of_another_version(package: str) -> str:
        return "another" if package == changed else code_digest(package)

    monkeypatch.setattr("spt_jax.data.kept_rows.code_digest", of_another_version)
    with pytest.raises(AssertionError, match="were packed"):
        kept_rows(never, DIALOGUES, [])
