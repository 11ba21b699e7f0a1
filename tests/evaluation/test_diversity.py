"""Laws of DIST, the entropy of n-grams and self-BLEU, against counting by hand and nltk."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from spt_jax.errors import UserError
from spt_jax.evaluation.diversity import distinct_ngrams, ngram_entropy, self_bleu

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=6), max_size=6)
REPLIES = [
    text.split()
    for text in (
        "i like to cook .",
        "i like to cook with my dog , do you ?",
        "",
        "yes",
        "yes",
        "do you like to cook to eat , to cook ?",
        "what do you do for a living ?",
        "what do you do for work ?",
        "the the the the the",
    )
]


def nltks_self_bleu(texts: list[list[str]], n: int = 4) -> float:
    """As Texygen's program has it: every reply against the list of the others."""
    weights, smoothing = (1 / n,) * n, SmoothingFunction().method1
    scores = [
        sentence_bleu(texts[:i] + texts[i + 1 :], text, weights, smoothing_function=smoothing)
        for i, text in enumerate(texts)
    ]
    return 100 * sum(scores) / len(scores)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_self_bleu_equals_nltks_of_every_reply_against_all_others(n: int) -> None:
    assert self_bleu(REPLIES, n) == pytest.approx(nltks_self_bleu(REPLIES, n), rel=1e-12)


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=7), min_size=2, max_size=7))
def test_self_bleu_equals_nltks_on_any_texts(texts: list[list[str]]) -> None:
    assert self_bleu(texts) == pytest.approx(nltks_self_bleu(texts), rel=1e-9, abs=1e-12)


def test_self_bleu_is_100_for_one_reply_said_twice_and_0_for_strangers() -> None:
    assert self_bleu([["i", "like", "to", "cook"]] * 2) == pytest.approx(100)
    assert self_bleu([["i", "like"], ["you", "eat"]]) == 0
    assert self_bleu([["alone"]]) == self_bleu([]) == 0


@given(TEXTS, st.integers(1, 4))
def test_entropy_is_that_of_the_shares_counted_by_hand(texts: list[list[str]], n: int) -> None:
    counts = Counter("".join(text[i : i + n]) for text in texts for i in range(len(text)) if i + n <= len(text))
    total = sum(counts.values())
    expected = sum(count / total * math.log(total / count) for count in counts.values())
    assert ngram_entropy(texts, n) == pytest.approx(expected, abs=1e-12)
    assert 0 <= ngram_entropy(texts, n) <= math.log(max(1, total)) + 1e-12


def test_entropy_of_small_known_sets() -> None:
    assert ngram_entropy([["a", "b", "c", "d"]]) == 0
    assert ngram_entropy([["a", "b", "c", "d"], ["b", "c", "d", "e"]]) == pytest.approx(math.log(2))
    assert ngram_entropy([["a", "b", "c", "d", "a", "b", "c", "d"]]) == pytest.approx(
        2 / 5 * math.log(5 / 2) + 3 / 5 * math.log(5)
    )
    assert ngram_entropy([["a", "b", "c"], []]) == 0


@given(TEXTS, st.integers(1, 3))
def test_dist_agrees_with_counting_by_hand(texts: list[list[str]], n: int) -> None:
    counts = Counter("".join(text[i : i + n]) for text in texts for i in range(len(text)) if i + n <= len(text))
    expected = 100 * len(counts) / sum(counts.values()) if counts else 0.0
    assert distinct_ngrams(texts, n) == pytest.approx(expected)


@pytest.mark.parametrize("figure", [distinct_ngrams, ngram_entropy, self_bleu])
def test_ngrams_of_no_words_are_refused(figure) -> None:
    with pytest.raises(UserError, match="n is 0"):
        figure([["a"], ["b"]], 0)
