from __future__ import annotations

import random
import time

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from toy_encoders import WordEncoder

from spt_jax.data import BleuSimilarity, Dialogue, Turn, pack, pair_texts
from spt_jax.errors import UserError


def oracle(hypothesis: str, reference: str) -> float:
    return sacrebleu.sentence_bleu(hypothesis, [reference]).score


def largest_difference(texts: list[str], pairs: int, seed: int) -> float:
    similarity, generator = BleuSimilarity(texts), np.random.default_rng(seed)
    differences = []
    for _ in range(-(-pairs // 400)):
        indices = generator.integers(0, len(texts), 20)
        scores = similarity.matrix(indices)
        expected = [[oracle(texts[i], texts[j]) for j in indices] for i in indices]
        differences.append(np.abs(scores - np.asarray(expected)).max())
    return float(np.max(differences))  # NaN where one is, which Python's max may pass over


@given(st.lists(st.text(alphabet="ab .,-1&\n'é", max_size=14), min_size=1, max_size=5))
def test_any_texts_score_as_in_sacrebleu(texts):
    expected = [[oracle(hypothesis, reference) for reference in texts] for hypothesis in texts]
    np.testing.assert_allclose(BleuSimilarity(texts).matrix(np.arange(len(texts))), expected, atol=1e-9)


def test_10000_pairs_of_word_soup_score_as_in_sacrebleu():
    soup = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "i",
        "like",
        "5",
        ".",
        ",",
        "don't",
        "tv-show",
        "&amp;",
        "3.5",
        "Émile",
        "<skipped>",
    ]
    texts = [" ".join(soup.choices(words, k=soup.randint(0, 24))) for _ in range(200)]
    worst = largest_difference(texts, 10_000, 0)
    print(f"largest difference {worst:.1e}")
    assert worst <= 1e-6


def test_10000_pairs_of_real_personas_and_replies_score_as_in_sacrebleu(valid_set):
    texts = [" ".join(dialogue.persona) for dialogue in valid_set.dialogues[:300]]
    texts += [turn.response for dialogue in valid_set.dialogues[:60] for turn in dialogue.turns]
    worst = largest_difference(texts, 10_000, 1)
    print(f"largest difference {worst:.1e}")
    assert worst <= 1e-6


@given(st.lists(st.integers(0, 5), max_size=12))
def test_a_matrix_is_its_pairs_one_by_one(indices):
    texts = ["a b c d", "a b", "", "b c d e f", "a b c d", "x"]
    similarity = BleuSimilarity(texts)
    scores = similarity.matrix(np.asarray(indices, dtype=np.int64))
    assert scores.shape == (len(indices), len(indices)) and scores.dtype == np.float64
    for i, a in enumerate(indices):
        for j, b in enumerate(indices):
            assert scores[i, j] == pytest.approx(oracle(texts[a], texts[b]), abs=1e-9)


def test_a_matrix_of_128_turns_takes_milliseconds(valid_set):
    similarity = BleuSimilarity([" ".join(dialogue.persona) for dialogue in valid_set.dialogues])
    seconds = []
    for start in range(0, 640, 128):
        begin = time.process_time()  # what others do on the same cores does not count
        similarity.matrix(np.arange(start, start + 128))
        seconds.append(time.process_time() - begin)
    print(f"128 x 128: {1e3 * min(seconds):.1f} ms")
    assert min(seconds) < 0.05


def test_pair_texts_are_the_same_for_a_turn_in_both_layouts():
    dialogues = [Dialogue((f"p{d}", "q"), tuple(Turn(f"q{t}", f"r{t}") for t in range(3))) for d in range(2)]
    for kind in ("persona", "context"):
        by_turn = []
        for layout in ("dialogue", "turn"):
            rows = pack(dialogues, WordEncoder(), layout=layout, max_length=15 if layout == "turn" else 999).rows
            texts = pair_texts(rows, dialogues, kind)
            by_turn.append([text for row_texts in texts for text in row_texts])
        assert by_turn[0] == by_turn[1]
    assert by_turn[0][1] == "given persona: p0 q; context: Q: q0 R: r0 Q: q1 R:"
    assert pair_texts(rows, dialogues, "persona")[0] == ["p0 q"]
    with pytest.raises(UserError, match="Did you mean 'context'"):
        pair_texts(rows, dialogues, "contxt")
