from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from toy_encoders import CharacterEncoder, MergingEncoder, NoBosEncoder, WordEncoder

from spt_jax.commands.restored import Run
from spt_jax.config import default_config
from spt_jax.data import Dialogue, DialogueSet, DialogueTooLongError, Turn, encode_context, pack
from spt_jax.data.persona_task import PersonaTemplate, persona_context_text
from spt_jax.data.template import PlainTemplate, encode_continued, turn_history
from spt_jax.errors import UserError
from spt_jax.generation.replies import ReplyText, cut_reply
from spt_jax.generation.streaming import ReplyStream
from spt_jax.models.loading import load_tokenizer

TASK = PersonaTemplate()
WORDS = st.text("ab c", min_size=1, max_size=8).map(str.strip).filter(bool)
DIALOGUES = st.lists(
    st.builds(
        Dialogue,
        st.lists(WORDS, min_size=1, max_size=3).map(tuple),
        st.lists(st.builds(Turn, WORDS, WORDS), min_size=1, max_size=5).map(tuple),
    ),
    max_size=4,
)
ENCODERS = st.one_of(
    st.builds(CharacterEncoder),
    st.builds(NoBosEncoder),
    st.builds(WordEncoder),
    st.builds(MergingEncoder, st.integers(2, 5)),
)


def utterances(dialogue: Dialogue) -> list[str]:
    return [said for turn in dialogue.turns for said in (turn.query, turn.response)]


def test_the_text_is_the_methods():
    dialogue = Dialogue(("i run .", "i sing ."), (Turn("hi", "hello ."), Turn("you ?", "fine .")))
    encoder = WordEncoder()
    [row] = pack([dialogue], encoder, layout="dialogue", max_length=99, template=TASK).rows
    text = "context: Q: hi R: hello . Q: you ? R: fine .; persona: i run . i sing ."
    assert row.tokens.tolist() == [encoder.bos_id, *encoder.encode([text])[0]]
    assert row.target_ids.tolist() == [*encoder.encode(["i run . i sing ."])[0], encoder.eos_id]
    assert (row.turns.tolist(), row.dialogue) == ([1], 0)


@given(DIALOGUES, ENCODERS, st.integers(20, 120), st.sampled_from(["dialogue", "turn"]), st.integers(0, 3))
def test_every_dialogue_is_one_row_that_learns_its_persona_from_the_context_of_inference(
    dialogues, encoder, limit, layout, max_turns
):
    try:
        packed = pack(dialogues, encoder, layout=layout, max_length=limit, max_turns=max_turns, template=TASK)
    except DialogueTooLongError:
        contexts = [persona_context_text(utterances(d)[-2:]) for d in dialogues]
        turns = encode_continued(encoder, contexts, [" ".join(d.persona) for d in dialogues])
        assert max(len(turn.tokens) for turn in turns) > limit
        return
    assert [row.dialogue for row in packed.rows] == list(range(len(dialogues)))
    for row, dialogue in zip(packed.rows, dialogues, strict=True):
        assert row.turns.tolist() == [len(dialogue.turns) - 1] and len(row) <= limit
        (length,) = row.context_lengths.tolist()
        assert row.target_positions.tolist() == list(range(length - 1, len(row)))
        assert np.array_equal(row.target_ids, [*row.tokens[length:], encoder.eos_id])
        pairs = [utterances(dialogue)[start:] for start in range(0, 2 * len(dialogue.turns), 2)]
        contexts = [encode_context(encoder, (), said, max_length=9999, template=TASK) for said in pairs]
        assert row.tokens[:length].tolist() in (contexts[-max_turns:] if max_turns else contexts)


def test_too_long_a_dialogue_loses_its_oldest_pairs():
    encoder = WordEncoder()
    said = [f"word {i}" for i in range(6)]
    whole = encode_context(encoder, (), said, max_length=99, template=TASK)
    short = encode_context(encoder, (), said, max_length=len(whole) - 1, template=TASK)
    assert short == [encoder.bos_id, *encoder.encode([persona_context_text(said[2:])])[0]]
    assert persona_context_text(said[4:]) == "context: Q: word 4 R: word 5; persona:"
    assert persona_context_text(said[:1]) == "context: R: word 0; persona:"
    with pytest.raises(DialogueTooLongError, match="f:2: the last exchange needs"):
        encode_context(encoder, (), said, max_length=5, place="f:2", template=TASK)


def test_a_dialogue_without_a_persona_and_an_empty_history_are_refused():
    nobody = Dialogue((" ",), (Turn("q", "r"),), source="f.txt:4")
    with pytest.raises(UserError, match=r"^f\.txt:4 has no persona"):
        pack([nobody], WordEncoder(), layout="turn", max_length=99, template=TASK)
    with pytest.raises(UserError, match="history is empty"):
        encode_context(WordEncoder(), (), [], max_length=99, template=TASK)


def test_a_persona_is_cut_at_a_line_break_alone():
    assert TASK.cut(" i run . R: i sing .\ncontext: Q:") == "i run . R: i sing ."
    assert TASK.cut(" \n ") == "" == TASK.cut("")


@given(st.lists(st.sampled_from(["R:", "Q:", "Summary:", "FAQ:", "\n", " ", "a", "5:30", "é"])).map("".join))
def test_a_plain_reply_is_cut_as_generation_cuts_it_and_every_cut_can_be_streamed(text):
    assert PlainTemplate().cut(text) == cut_reply(text)
    for template in (PlainTemplate(), TASK):
        once = template.cut(text)
        assert template.cut(once) == once
        reply = ReplyText(lambda ids: bytes(ids).decode(errors="replace"), template.cut)
        pieces = ReplyStream(text.encode(), reply)
        assert "".join(pieces) == once


def test_real_dialogues_learn_their_personas(smollm2_source: str, valid_set: DialogueSet) -> None:
    tokenizer = load_tokenizer(smollm2_source)
    dialogues = valid_set.dialogues[:80]
    packed = pack(dialogues, tokenizer, layout="dialogue", max_length=512, template=TASK)
    assert (len(packed.rows), packed.fallbacks, packed.truncated_turns, packed.split_turns) == (80, 0, 0, 0)
    for row, dialogue in zip(packed.rows, dialogues, strict=True):
        assert tokenizer.decode(row.target_ids.tolist()) == " " + " ".join(dialogue.persona)
        last = len(dialogue.turns) - 1
        said = [*turn_history(dialogue, last), dialogue.turns[last].response]
        assert tokenizer.decode(row.tokens[1 : row.context_lengths[0]].tolist()) == persona_context_text(said)


@pytest.mark.parametrize("max_turns", [1, 2, 9])
def test_a_context_of_few_exchanges_is_the_same_in_training_and_behind_a_request(max_turns):
    config = default_config()
    config.data.task, config.data.layout, config.data.max_turns = "persona", "turn", max_turns
    dialogue, encoder = Dialogue(("p",), tuple(Turn(f"q{i}", f"r{i}") for i in range(4))), CharacterEncoder()
    [row] = pack([dialogue], encoder, layout="turn", max_length=512, max_turns=max_turns, template=TASK).rows
    lm = SimpleNamespace(config=dataclasses.replace(tiny.CONFIG, max_position_embeddings=4096), tokenizer=encoder)
    model = SimpleNamespace(official=False)
    run = Run(Path(), SimpleNamespace(config=config, lm=lm, model=model), {}, 0)  # pyright: ignore[reportArgumentType]
    assert run.encode_context([], utterances(dialogue)) == row.tokens[: row.context_lengths[0]].tolist()
