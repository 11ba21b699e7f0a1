"""Laws of the cut of replies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.generation.replies import cut_reply, cut_reply_official

TEXTS = st.text(alphabet="RQSummary: \n5.é", max_size=40)


@pytest.mark.parametrize(
    ("text", "ours", "official"),
    [
        (" i wake up at 5:30 . Q: why ?", "i wake up at 5:30 .", "i wake up at 5"),
        (" hello there\nR: again", "hello there", "hello there"),
        (" my faq FAQ: says no R: yes", "my faq FAQ: says no", "my faq FA"),
        (" fine . Summary: a chat", "fine .", "fine ."),
        (" i like: tea", "i like: tea", "i like"),
        ("R: at once", "", ""),
        ("\n", "", ""),
        ("", "", ""),
        ("  nothing to cut  ", "nothing to cut", "nothing to cut"),
        ("(R: in brackets", "(", "("),
        ("carriage\r\nreturn", "carriage", "carriage"),
    ],
)
def test_reply_ends_at_the_first_marker(text: str, ours: str, official: str) -> None:
    assert cut_reply(text) == ours
    assert cut_reply_official(text) == official


@given(TEXTS)
def test_cutting_is_idempotent_and_the_authors_reply_begins_ours(text: str) -> None:
    assert cut_reply(cut_reply(text)) == cut_reply(text)
    assert cut_reply_official(cut_reply_official(text)) == cut_reply_official(text)
    assert cut_reply(text).startswith(cut_reply_official(text))
    assert "\n" not in cut_reply(text)
    assert ":" not in cut_reply_official(text)


@given(TEXTS, TEXTS)
def test_what_follows_the_next_role_marker_never_changes_the_reply(reply: str, rest: str) -> None:
    assert cut_reply(f"{reply} Q: {rest}") == cut_reply(f"{reply} Q:")
