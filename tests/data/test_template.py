from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_encoders import CharacterEncoder, NoBosEncoder, WordEncoder

from spt_jax.data import Dialogue, DialogueTooLongError, Turn, context_text, encode_context
from spt_jax.data.template import response_text, turn_history
from spt_jax.errors import UserError

PERSONA = ("i run.", "i like cats.")
WORDS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=9)


def test_the_text_is_the_papers():
    dialogue = Dialogue(PERSONA, (Turn("hi", "hello ."), Turn("you ?", "fine .")))
    context = context_text(PERSONA, turn_history(dialogue, 1))
    assert context == "given persona: i run. i like cats.; context: Q: hi R: hello . Q: you ? R:"
    assert response_text(context, "fine .") == context + " fine ."
    assert context_text(PERSONA, turn_history(dialogue, 1, start=1)).endswith("context: Q: you ? R:")


def test_a_history_that_begins_with_the_personas_words_keeps_the_roles():
    assert context_text((), ["hello .", "hi"]) == "given persona: ; context: R: hello . Q: hi R:"


@given(WORDS)
def test_a_prompt_that_fits_is_bos_and_the_whole_context(history):
    text = context_text(PERSONA, history)
    whole = CharacterEncoder().encode([text])[0]
    assert encode_context(CharacterEncoder(), PERSONA, history, max_length=len(whole) + 1) == [0, *whole]
    assert encode_context(NoBosEncoder(), PERSONA, history, max_length=len(whole)) == whole


@given(WORDS, st.integers(10, 30))
def test_too_long_a_prompt_loses_the_fewest_oldest_utterances_and_begins_with_a_query(history, limit):
    encoder = WordEncoder()
    fitting = [
        tokens
        for start in range(len(history))
        if start == 0 or (len(history) - start) % 2
        if len(tokens := [0, *encoder.encode([context_text(PERSONA, history[start:])])[0]]) <= limit
    ]
    if fitting:
        assert encode_context(encoder, PERSONA, history, max_length=limit) == fitting[0]
    else:
        with pytest.raises(
            DialogueTooLongError, match=rf"^f\.jsonl:7: persona and last query need \d+ tokens, .* {limit}"
        ):
            encode_context(encoder, PERSONA, history, max_length=limit, place="f.jsonl:7")


def test_an_empty_history_is_refused():
    with pytest.raises(UserError, match="history is empty"):
        encode_context(CharacterEncoder(), PERSONA, [], max_length=100)
