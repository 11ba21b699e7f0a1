from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_jax.generation.replies import ReplyText, cut_reply, cut_reply_official
from spt_jax.generation.streaming import ReplyStream

# Fragments that make markers likely, and characters of one to four bytes.
FRAGMENTS = [
    "R",
    "Q",
    ":",
    "R:",
    "Q:",
    "Sum",
    "mary:",
    "Summary:",
    "\n",
    " ",
    "  ",
    "a",
    "hi",
    "é",
    "好",
    "🙂",
    "\ufffd",
    "5:30",
    "\0",
]
STOPS = ["", "a", "hi", "good bye", " ", "aa", "aab", "Q", "hi R"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join) | st.text(max_size=30)


def decode(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@settings(deadline=None)
@given(text=texts, official=st.booleans(), stop=st.lists(st.sampled_from(STOPS).filter(bool), max_size=2))
def test_streamed_pieces_add_up_to_the_cut_reply(text, official, stop):
    cut = cut_reply_official if official else cut_reply
    reply = ReplyText(decode, cut, tuple(stop))
    stream = ReplyStream(text.encode("utf-8"), reply)
    pieces = list(stream)
    before_stop = text
    for ending in stop:
        before_stop = before_stop.split(ending)[0]
    assert "".join(pieces) == cut(before_stop) == stream.text == reply.of(text.encode("utf-8"))
    assert all(pieces)


@settings(deadline=None)
@given(text=texts, stop=st.lists(st.sampled_from(STOPS).filter(bool), max_size=2))
def test_once_a_reply_has_ended_more_tokens_change_nothing(text, stop):
    reply, ids = ReplyText(decode, cut_reply, tuple(stop)), text.encode("utf-8")
    ended = [reply.ended(ids[:count]) for count in range(len(ids) + 1)]
    assert ended == sorted(ended)
    if any(ended):
        assert reply.of(ids[: ended.index(True)]) == reply.of(ids)


@settings(deadline=None)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14))
def test_tokens_of_several_characters_add_up_too(fragments):
    pieces = ReplyStream(range(len(fragments)), ReplyText(lambda ids: "".join(fragments[i] for i in ids)))
    assert "".join(pieces) == cut_reply("".join(fragments))


@given(data=st.binary(max_size=20))
def test_bytes_that_are_no_text_add_up_too(data):
    assert "".join(ReplyStream(data, ReplyText(decode))) == cut_reply(decode(data))


@pytest.mark.parametrize("said", ["d", "d\0", "\0", "d \0"])
@pytest.mark.parametrize("marker", [" Q:", "\n"])
def test_a_marker_ends_a_reply_whatever_stands_before_it(said, marker):
    assert ReplyText(decode).over(said + marker)
    assert not ReplyText(decode).over(said)


@pytest.mark.parametrize("marker", ["R:", "Q:", "Summary:", "\n"])
def test_nothing_is_generated_after_a_cut(marker):
    asked = []

    def ids():
        for byte in f"fine. {marker} more and more text".encode():
            asked.append(byte)
            yield byte

    assert "".join(ReplyStream(ids(), ReplyText(decode))) == "fine."
    assert bytes(asked).decode() == f"fine. {marker}"


def test_nothing_is_generated_after_a_stop_string_nor_shown_of_one():
    ids, stop = iter(b"we say good bye and more"), ("good bye",)
    assert "".join(ReplyStream(ids, ReplyText(decode, cut_reply, stop))) == "we say"
    assert bytes(ids) == b" and more"


def test_words_are_shown_before_the_reply_is_complete():
    shown = []
    ids = iter(b"one two three")
    stream = iter(ReplyStream(ids, ReplyText(decode)))
    shown.append(next(stream))
    assert shown == ["one"]
    assert next(ids) == ord("t"), "the first word comes out at the space behind it, not at the end"


def test_text_without_spaces_flows_too():
    ids = iter("好" * 40)
    stream = iter(ReplyStream(map(ord, ids), ReplyText(lambda seen: "".join(map(chr, seen)))))
    assert next(stream) == "好"
    assert sum(1 for _ in ids) > 20


def test_an_incomplete_character_is_held_back():
    pieces = list(ReplyStream("a 🙂🙂 b".encode(), ReplyText(decode)))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == "a 🙂🙂 b"
