"""Laws of the words that a reply takes from a persona."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_jax.evaluation.persona_words import STOP_WORDS, content_words, persona_words
from spt_jax.evaluation.text_metrics import text_metrics

PERSONA = ["I have two dogs.", "I mend clocks, and I don't sail."]
WORDS = st.lists(st.sampled_from(["i", "dogs", "Clocks!", "the", "don't", "sail", "cats", "two"]), max_size=8)


def test_content_words_are_lower_case_without_punctuation_articles_and_stop_words() -> None:
    assert content_words("  I'm mending the Clock, aren't I? You'll see: an OWL!") == {"mending", "clock", "see", "owl"}
    assert content_words(" ".join(PERSONA)) == {"two", "dogs", "mend", "clocks", "sail"}
    assert content_words("yes , i do , don't you ?") == set()


def test_stop_words_are_single_words_as_normalisation_leaves_them() -> None:
    assert all(word.isascii() and word.isalpha() and word.islower() for word in STOP_WORDS)


def test_recall_precision_and_f1_of_a_known_reply() -> None:
    found = persona_words("my dogs watch clocks , they watch and watch .", PERSONA)
    assert found == pytest.approx((2 / 5, 2 / 3, 2 * 2 / (5 + 3)))
    assert persona_words("DOGS dogs", PERSONA) == pytest.approx((1 / 5, 1, 2 / 6))


@pytest.mark.parametrize(("reply", "persona"), [("", PERSONA), ("the", PERSONA), ("dogs", []), ("cats", PERSONA)])
def test_nothing_in_common_is_zero(reply: str, persona: list[str]) -> None:
    assert persona_words(reply, persona) == (0, 0, 0)


@given(WORDS, WORDS)
def test_f1_is_the_harmonic_mean_and_sides_exchange_recall_and_precision(left: list[str], right: list[str]) -> None:
    found, exchanged = persona_words(" ".join(left), right), persona_words(" ".join(right), left)
    assert found.recall == pytest.approx(exchanged.precision)
    both = found.recall + found.precision
    assert found.f1 == pytest.approx(2 * found.recall * found.precision / both if both else 0)


def test_text_metrics_take_the_means_over_pairs_in_percent() -> None:
    replies = ["my dogs watch clocks .", "hello", "two dogs"]
    values = text_metrics(replies, ["x"] * 3, [PERSONA, PERSONA, ["i like cats"]]).values
    parts = [persona_words(*pair) for pair in zip(replies, [PERSONA, PERSONA, ["i like cats"]], strict=True)]
    for name in ("recall", "precision", "f1"):
        assert values[f"persona_{name}"] == pytest.approx(100 * sum(getattr(part, name) for part in parts) / 3)
    assert "persona_f1" not in text_metrics(replies, ["x"] * 3).values
