"""Beam search against a search that sees everything."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.generation.beam import Search, _best
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.engine import GenerationEngine

CHOICES, EOS, DEPTH = 5, 2, 3


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def every_sequence(tiny, prompt, context: list[int], length_penalty: float) -> list[tuple[float, list[int]]]:
    """All sequences over the first `CHOICES` tokens, ended or `DEPTH` long, by score; full forwards, no cache."""
    log_p = {}
    for length in range(DEPTH):
        for before in itertools.product(range(CHOICES), repeat=length):
            if EOS not in before:
                log_p[before] = log_softmax(tiny.logits_after(prompt, [*context, *before])[:CHOICES])
    found = []
    for before in log_p:
        for token in range(CHOICES):
            ids = (*before, token)
            if token == EOS or len(ids) == DEPTH:
                total = sum(log_p[ids[:place]][ids[place]] for place in range(len(ids)))
                found.append((total / len(ids) ** length_penalty, [t for t in ids if t != EOS]))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_search_wide_enough_finds_the_best_of_all_sequences(tiny, contexts, selected, length_penalty):
    beams = CHOICES**2
    engine = GenerationEngine(tiny.config, tiny.params, eos_ids=[EOS], pad_id=0, vocab_size=CHOICES)
    decoding = Decoding(beams=beams, samples=4, length_penalty=length_penalty, early_stopping="never")
    rows = engine.continuations(tiny.bank, contexts[:4], selected[:4], max_new_tokens=DEPTH, decoding=decoding)
    for row, context, prompt in zip(rows, contexts, selected, strict=False):
        best = every_sequence(tiny, tiny.bank[prompt], context, length_penalty)[:4]
        assert [found.tokens for found in row] == [ids for _, ids in best]
        np.testing.assert_allclose([found.score for found in row], [score for score, _ in best], rtol=1e-4, atol=1e-4)


def test_scores_fall_and_no_hypothesis_is_found_twice(tiny, contexts, selected):
    engine = GenerationEngine(tiny.config, tiny.params, eos_ids=[EOS, 7], pad_id=0)
    rows = engine.continuations(
        tiny.bank, contexts, selected, max_new_tokens=6, decoding=Decoding(beams=6, samples=6, no_repeat_ngram=2)
    )
    for row in rows:
        scores = [found.score for found in row]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(found.tokens) for found in row}) == 6
        for ids in (found.tokens for found in row):
            pairs = list(itertools.pairwise(ids))
            assert len(set(pairs)) == len(pairs)


def test_a_search_that_the_host_watches_finds_the_same_and_a_text_ends_a_hypothesis_as_eos_does(
    tiny, contexts, selected
):
    last = set(range(30, 36))
    engine = GenerationEngine(tiny.config, tiny.params, eos_ids=[EOS, *last], pad_id=0, max_batch=8)
    other = GenerationEngine(tiny.config, tiny.params, eos_ids=[EOS], pad_id=0, max_batch=8)
    arguments = {"max_new_tokens": 6, "decoding": Decoding(beams=3, samples=3)}
    free = engine.continuations(tiny.bank, contexts, selected, **arguments)
    watched = engine.continuations(tiny.bank, contexts, selected, stopped=lambda ids: False, **arguments)
    assert watched == free
    by_text = other.continuations(tiny.bank, contexts, selected, stopped=lambda ids: bool(last & {*ids}), **arguments)
    assert any(last & {*continued.tokens} for row in by_text for continued in row)
    for row, texts in zip(free, by_text, strict=True):
        # A hypothesis keeps what ended it; an end-of-sequence token it does not.
        assert [c.tokens for c in row] == [[t for t in c.tokens if t not in last] for c in texts]
        np.testing.assert_allclose([c.score for c in row], [c.score for c in texts], rtol=1e-6)


def test_the_best_of_many_scores_are_found_in_chunks():
    scores = jax.random.normal(jax.random.key(0), (5, 3, 1000))
    values, beams, tokens = _best(scores, 12)
    expected, places = jax.lax.top_k(scores.reshape(5, -1), 12)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(beams * 1000 + tokens, places)
    one_chunk = jnp.where(jnp.arange(1000) < 20, scores + 100, scores)
    values, beams, tokens = _best(one_chunk, 40)
    np.testing.assert_array_equal(beams * 1000 + tokens, jax.lax.top_k(one_chunk.reshape(5, -1), 40)[1])


def test_divisors_are_lengths_to_the_penalty():
    np.testing.assert_allclose(Search(2, 3, 0.5).divisors, [0, 1, 2**0.5, 3**0.5], rtol=1e-6)
    assert (Search(2, 3, -1.0).divisors[1:] == np.array([1, 1 / 2, 1 / 3], np.float32)).all()
