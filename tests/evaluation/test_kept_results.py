"""Results vouch for one question: whatever they follow from makes it another."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import tiny

import spt_jax
from spt_jax.config import Config, default_config
from spt_jax.data import Dialogue, Turn
from spt_jax.evaluation.kept_results import Question, question
from spt_jax.models.decoder_config import DecoderConfig

TURN = Turn("hi", "hello", ("no", "hello"))
DIALOGUE = Dialogue(("i sing.",), (TURN,), ("i dance.",), "a.txt:1")
CHECKPOINT = {"digests": {"trainable": "a"}, "lm": {"sha256": "b"}}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    content_digest: str = "c"
    stop_ids: tuple[int, ...] = (2,)


@dataclasses.dataclass(frozen=True)
class LM:
    config: DecoderConfig = tiny.CONFIG
    tokenizer: Tokenizer = Tokenizer()


def asked(
    *, config=None, checkpoint=None, lm=LM(), dialogue=DIALOGUE, baselines=True, replies=None, shown=()
) -> Question:
    return question(config or default_config(), checkpoint or CHECKPOINT, lm, [dialogue], baselines, replies, shown)


def config_with(name: str, value: object) -> Config:
    config = default_config()
    config.update_from_flattened_dict({name: value})
    return config


@pytest.mark.parametrize(
    "changed",
    [
        {"config": config_with("evaluation.batch", 17)},
        {"config": config_with("evaluation.max_new_tokens", 17)},
        {"config": config_with("evaluation.seed", 17)},
        {"config": config_with("evaluation.selection", "soft")},
        {"config": config_with("evaluation.selection_noise", 0.5)},
        {"config": config_with("generation.beams", 2)},
        {"config": config_with("data.max_length", 256)},
        {"checkpoint": CHECKPOINT | {"digests": {"trainable": "c"}}},
        {"checkpoint": CHECKPOINT | {"lm": {"sha256": "c"}}},
        {"lm": LM(dataclasses.replace(tiny.CONFIG, norm_eps=1e-3))},
        {"lm": LM(tokenizer=Tokenizer("d"))},
        {"lm": LM(tokenizer=Tokenizer(stop_ids=(2, 3)))},
        {"replies": 3},
        {"shown": [DIALOGUE]},
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
    assert asked(**changed).whole != asked().whole
    assert asked(**changed).groundwork != asked().groundwork


@pytest.mark.parametrize(
    "changed",
    [
        {"baselines": False},
        {"config": config_with("evaluation.metrics", ("default", "hits"))},
        {"config": config_with("evaluation.bertscore", "package:x")},
        {"config": config_with("evaluation.bertscore_layers", 3)},
        {"config": config_with("evaluation.nli", "package:x")},
        {"config": config_with("evaluation.samples", 9)},
        {"config": config_with("tracking.wandb", True)},
    ],
)
def test_other_figures_of_the_same_replies_are_another_question_on_the_same_groundwork(changed):
    assert asked(**changed).whole != asked().whole
    assert asked(**changed).groundwork == asked().groundwork


def test_where_a_dialogue_was_read_does_not():
    moved = dataclasses.replace(DIALOGUE, source="b.txt:9")
    assert asked(dialogue=moved) == asked()
    assert asked(shown=[moved]) == asked(shown=[DIALOGUE])


def test_what_is_demonstrated_makes_another_question_and_nothing_demonstrated_the_one_it_was():
    other = dataclasses.replace(DIALOGUE, turns=(dataclasses.replace(TURN, response="ho"),))
    assert asked(shown=[other]) != asked(shown=[DIALOGUE])
    parts = {
        "version": spt_jax.__version__,
        "config": default_config().to_dict(),
        "trainable": CHECKPOINT["digests"]["trainable"],
        "lm": CHECKPOINT["lm"],
        "decoder": repr(tiny.CONFIG),
        "tokenizer": ["c", [2]],
        "dialogues": [DIALOGUE.told],
        "baselines": True,
        "replies": None,
    }
    assert asked().whole == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
