from __future__ import annotations

import json

import pytest

from spt_jax.commands.conversation import ORDERS, Conversation, Exchange, Order, read_order
from spt_jax.errors import UserError


def exchange(message: str, reply: str) -> Exchange:
    return Exchange(message, reply, prompt=1, scores=(0.25, 0.75))


@pytest.mark.parametrize(("line", "name"), [("clear", "clear"), (" r ", "retry"), ("save", "save"), ("exit", "exit")])
def test_the_authors_words_are_commands_alone_on_a_line(line, name):
    assert read_order(line) == Order(name)


@pytest.mark.parametrize("line", ["clear skies today", "r u ok?", "save me", "the exit", "Exit", "R", "hello"])
def test_the_authors_words_inside_a_sentence_are_speech(line):
    assert read_order(line) == Order("say", line)


@pytest.mark.parametrize("name", ORDERS)
def test_every_listed_command_is_understood(name):
    assert read_order(f"/{name}") == Order(name)


def test_commands_that_take_something_get_it_whole():
    assert read_order("/persona i have  two dogs. ") == Order("persona", "i have  two dogs.")
    assert read_order("/save a b.json") == Order("save", "a b.json")


def test_a_mistyped_command_gets_the_nearest():
    with pytest.raises(UserError, match=r"no command /retyr.*Did you mean '/retry'"):
        read_order("/retyr")
    with pytest.raises(UserError, match="/clear takes nothing after it, but got 'all'"):
        read_order("/clear all")


def test_history_alternates_and_ends_with_the_message():
    conversation = Conversation(("i sing.",)).answered(exchange("hi", "hello")).answered(exchange("how", "fine"))
    assert conversation.history("bye") == ["hi", "hello", "how", "fine", "bye"]


def test_an_empty_reply_leaves_no_trace_in_the_history_but_one_in_the_transcript():
    conversation = Conversation().answered(exchange("hi", "")).answered(exchange("hey", "hello"))
    assert conversation.history("bye") == ["hey", "hello", "bye"]
    assert [turn["reply"] for turn in conversation.transcript()["turns"]] == ["", "hello"]


def test_taking_back_is_the_inverse_of_answering():
    conversation = Conversation().answered(exchange("hi", "hello"))
    assert conversation.answered(exchange("how", "fine")).taken_back() == (conversation, "how")
    with pytest.raises(UserError, match="no reply to retry"):
        Conversation().taken_back()


def test_clearing_keeps_the_persona_and_its_removal_keeps_the_exchanges():
    conversation = Conversation(("i sing.",)).with_persona("i ski.").answered(exchange("hi", "hello"))
    assert conversation.cleared() == Conversation(("i sing.", "i ski."))
    assert conversation.without_persona() == Conversation((), conversation.exchanges)


def test_a_transcript_survives_json():
    transcript = Conversation(("i sing.",)).answered(exchange("hé", "好")).transcript()
    assert json.loads(json.dumps(transcript)) == transcript
    said = {"message": "hé", "reply": "好", "prompt": 1, "scores": [0.25, 0.75], "seed": 0}
    assert transcript["turns"] == [said | {"persona": [], "decoding": None}]
