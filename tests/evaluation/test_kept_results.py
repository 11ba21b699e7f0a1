"""Results vouch for one question: whatever they follow from makes it another."""

from __future__ import annotations

import dataclasses

import pytest

from spt_jax.config import default_config
from spt_jax.data import Dialogue, Turn
from spt_jax.evaluation.kept_results import question

TURN = Turn("hi", "hello", ("no", "hello"))
DIALOGUE = Dialogue(("i sing.",), (TURN,), ("i dance.",), "a.txt:1")
CHECKPOINT = {"digests": {"trainable": "a"}, "lm": {"sha256": "b"}}


def asked(*, config=None, checkpoint=None, dialogue=DIALOGUE, baselines=True, replies=None) -> str:
    return question(config or default_config(), checkpoint or CHECKPOINT, [dialogue], baselines, replies)


def other_config():
    config = default_config()
    config.evaluation.batch += 1
    return config


@pytest.mark.parametrize(
    "changed",
    [
        {"config": other_config()},
        {"checkpoint": CHECKPOINT | {"digests": {"trainable": "c"}}},
        {"checkpoint": CHECKPOINT | {"lm": {"sha256": "c"}}},
        {"baselines": False},
        {"replies": 3},
        *(
            {"dialogue": dataclasses.replace(DIALOGUE, **part)}
            for part in (
                {"persona": ("i sail.",)},
                {"partner_persona": ("i sail.",)},
                {"turns": (dataclasses.replace(TURN, query="ho"),)},
                {"turns": (dataclasses.replace(TURN, response="ho"),)},
                {"turns": (dataclasses.replace(TURN, candidates=("hello", "no")),)},
            )
        ),
    ],
)
def test_whatever_results_follow_from_makes_it_another_question(changed):
    assert asked(**changed) != asked()


def test_where_a_dialogue_was_read_does_not():
    assert asked(dialogue=dataclasses.replace(DIALOGUE, source="b.txt:9")) == asked()
