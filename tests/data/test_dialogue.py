from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.data import Dialogue, Turn, persona_key, split_by_persona
from spt_jax.data.dialogue import _smallest_sum_at_least, dialogues_digest, draw_fraction
from spt_jax.errors import UserError


def dialogues_with(personas: list[int]) -> list[Dialogue]:
    return [
        Dialogue((f"i am number {persona}.",), (Turn("hi", f"reply {i}"),), source=f"f:{i}")
        for i, persona in enumerate(personas)
    ]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 3))
def test_split_shares_no_persona_keeps_order_and_is_as_small_as_groups_allow(personas, count, seed):
    dialogues = dialogues_with(personas)
    sizes = [personas.count(p) for p in set(personas)]
    sums = {sum(part) for n in range(len(sizes)) for part in itertools.combinations(sizes, n)}
    reachable = [total for total in sums if total >= count]
    if not reachable:
        with pytest.raises(UserError, match="at least one must remain"):
            split_by_persona(dialogues, count, seed)
        return
    rest, held = split_by_persona(dialogues, count, seed)
    assert len(held) == min(reachable)
    assert sorted(rest + held, key=dialogues.index) == dialogues
    assert rest == sorted(rest, key=dialogues.index) and held == sorted(held, key=dialogues.index)
    assert not {d.persona for d in rest} & {d.persona for d in held}
    assert (rest, held) == split_by_persona(dialogues, count, seed)


def test_split_depends_on_the_seed_and_every_persona_can_be_held_out():
    dialogues = dialogues_with(list(range(8)))
    held = {split_by_persona(dialogues, 1, seed)[1][0].persona for seed in range(60)}
    assert len(held) == 8


def test_personas_that_differ_in_order_case_or_spacing_are_the_same():
    assert persona_key(("I like  cats.", "i run.")) == persona_key(("i run. ", "i like cats."))
    same = [Dialogue(("a", "b"), (Turn("q", "r"),)), Dialogue(("B", "a "), (Turn("q", "r"),))]
    with pytest.raises(UserError):
        split_by_persona(same, 1, 0)


def test_dialogues_without_persona_are_split_one_by_one():
    rest, held = split_by_persona([Dialogue((), (Turn("q", str(i)),)) for i in range(5)], 2, 0)
    assert (len(rest), len(held)) == (3, 2)


def test_split_of_nothing_and_of_negative_counts():
    dialogues = dialogues_with([0, 1])
    assert split_by_persona(dialogues, 0, 0) == (dialogues, [])
    with pytest.raises(UserError, match="at least 0"):
        split_by_persona(dialogues, -1, 0)


@given(st.integers(1, 40), st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 5))
def test_a_fraction_is_in_order_of_the_asked_size_and_part_of_every_larger_one(count, one, other, seed):
    dialogues = dialogues_with(list(range(count)))
    fractions = sorted((one, other))
    less, more = (draw_fraction(dialogues, fraction, seed) for fraction in fractions)
    assert [len(less), len(more)] == [max(1, round(fraction * count)) for fraction in fractions]
    assert set(less) <= set(more) and more == sorted(more, key=dialogues.index)
    assert draw_fraction(dialogues, 1, seed) == dialogues and draw_fraction(dialogues, one, seed) in (less, more)


def test_a_fraction_depends_on_the_seed_and_must_be_one():
    dialogues = dialogues_with(list(range(8)))
    assert len({draw_fraction(dialogues, 0.125, seed)[0].source for seed in range(60)}) == 8
    assert draw_fraction([], 0.5, 0) == []
    for fraction in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="more than 0, up to 1"):
            draw_fraction(dialogues, fraction, 0)
    with pytest.raises(UserError, match="0 or more"):
        draw_fraction(dialogues, 0.5, -1)


def test_split_of_the_real_training_file_holds_out_exactly_what_is_asked(train_set):
    rest, held = split_by_persona(train_set.dialogues, 100, 0)
    assert len(held) == 100 and len(rest) == len(train_set) - 100
    assert not {persona_key(d.persona) for d in rest} & {persona_key(d.persona) for d in held}


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 40), st.integers(1, 60))
def test_the_groups_that_are_held_out_are_the_first_of_the_smallest_sum(sizes, count, below):
    found = _smallest_sum_at_least(sizes, count, below)
    parts = [part for n in range(len(sizes) + 1) for part in itertools.combinations(range(len(sizes)), n)]
    sums = {part: sum(sizes[i] for i in part) for part in parts}
    fitting = [part for part in parts if count <= sums[part] < below]
    if not fitting:
        assert found is None
        return
    smallest = min(sums[part] for part in fitting)
    # Early positions first: a part is before another when it has the first position in which they differ.
    expected = max(
        (part for part in fitting if sums[part] == smallest), key=lambda part: [i in part for i in range(12)]
    )
    assert found == list(expected)


def test_memory_grows_with_what_is_held_out_and_not_with_the_square_of_the_groups():
    tracemalloc.start()
    found = _smallest_sum_at_least([1] * 20_000, 5, below=20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [0, 1, 2, 3, 4]
    assert peak < 20_000 * 200


def test_a_digest_follows_from_all_that_is_said_and_its_order_but_not_from_where_it_was_read():
    one = Dialogue(("i sail .",), (Turn("hi", "hello", ("no", "hello")),), ("i fly .",), "a.txt:1")
    two = dataclasses.replace(one, persona=("i sail", "."))
    elsewhere = dataclasses.replace(one, source="b.jsonl:7")
    assert dialogues_digest([one, two]) == dialogues_digest(iter([elsewhere, two]))
    turn = one.turns[0]
    others = [
        [two, one],
        [one],
        [one, two, two],
        [dataclasses.replace(one, partner_persona=()), two],
        *(
            [dataclasses.replace(one, turns=(dataclasses.replace(turn, **{name: value}),)), two]
            for name, value in (("query", "hi!"), ("response", "hello!"), ("candidates", ()))
        ),
    ]
    assert len({dialogues_digest(dialogues) for dialogues in [[one, two], *others]}) == 1 + len(others)
