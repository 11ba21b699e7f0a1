"""Laws of resampled corpus figures: equal to recomputation, and statistics that hold where theory is known."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from evaluated_folders import WORDS, references, replies
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, norm

from spt_jax.evaluation.resampling import (
    FIGURES,
    KEPT,
    CorpusStatistics,
    DistinctCounter,
    bootstrap,
    bootstrap_counts,
    corpus_statistics,
    holm,
    jackknife_interval,
    leave_one_out,
    observed,
    p_values,
    percentile_interval,
    randomised_differences,
)
from spt_jax.evaluation.text_metrics import PairFigures, pair_figures, text_metrics

TURNS = references(30)
RESPONSES = [response for _, _, response in TURNS]
DIALOGUE = np.asarray([dialogue for dialogue, _, _ in TURNS])
TEXT_FIGURES = ("f1", "bleu", "rouge_1", "rouge_2", "rouge_l", "dist_1", "dist_2", "dist_3", "persona_f1")
PERSONAS = [[" ".join(WORDS[dialogue % 5 :: 5])] for dialogue in DIALOGUE]
DRAWS = 20


def statistics_of(texts: list[str], vocabulary: dict[str, int]) -> CorpusStatistics:
    return corpus_statistics(pair_figures(texts, RESPONSES, PERSONAS), DIALOGUE, vocabulary)


def synthetic(means: np.ndarray) -> CorpusStatistics:
    """A dialogue of one pair each, whose F1 is given; the rest is constant."""
    count, zeros = len(means), np.zeros(len(means))
    pairs = PairFigures(
        {"f1": means, "rouge_1": zeros, "rouge_2": zeros, "rouge_l": zeros},
        np.tile([4, 4, 4, 3, 2, 1, 4, 3, 2, 1], (count, 1)),
        [["a"]] * count,
    )
    return corpus_statistics(pairs, np.arange(count), {})


def recomputed(texts: list[str], chosen: list[int]) -> np.ndarray:
    """By the corpus functions themselves, on a corpus of the chosen dialogues written out."""
    places = [i for dialogue in chosen for i in np.flatnonzero(dialogue == DIALOGUE)]
    chosen_texts = [[source[i] for i in places] for source in (texts, RESPONSES, PERSONAS)]
    metrics = text_metrics(*chosen_texts).values
    assert (
        metrics["bleu"]
        == sacrebleu.corpus_bleu([texts[i] for i in places], [[RESPONSES[i] for i in places]], force=True).score
    )
    return np.asarray([metrics[name] for name in TEXT_FIGURES])


def columns(figures: np.ndarray) -> np.ndarray:
    return figures[..., [FIGURES.index(name) for name in TEXT_FIGURES]]


def test_resampled_figures_equal_recomputation_on_the_same_resample() -> None:
    texts = replies(TURNS, 0.3, 1)
    run = statistics_of(texts, {"unused": 0})
    counts = np.concatenate(list(bootstrap_counts(30, DRAWS, seed=5)), axis=1)
    assert (counts.sum(axis=0) == 30).all()
    expected = [recomputed(texts, [d for d in range(30) for _ in range(counts[d, b])]) for b in range(DRAWS)]
    np.testing.assert_allclose(columns(bootstrap([run], DRAWS, seed=5)[0]), expected, rtol=1e-12)
    without = [recomputed(texts, [d for d in range(30) if d != left]) for left in range(DRAWS)]
    np.testing.assert_allclose(columns(leave_one_out([run])[0][:DRAWS]), without, rtol=1e-12)
    np.testing.assert_allclose(columns(observed(run)), recomputed(texts, list(range(30))), rtol=1e-12)


def test_what_evaluations_keep_is_a_sum_over_all_turns_too() -> None:
    rng = np.random.default_rng(0)
    nll, tokens, bert = rng.random(len(TURNS)), rng.integers(1, 9, len(TURNS)), rng.random((len(TURNS), 3))
    pairs = pair_figures(replies(TURNS, 0.3, 1), RESPONSES)
    kept = {name: rng.random(len(TURNS)) for name in KEPT}
    run = corpus_statistics(pairs, DIALOGUE, {}, bert_score=bert, nll=nll, target_tokens=tokens, kept=kept)
    figures = dict(zip(FIGURES, observed(run), strict=True))
    assert figures["perplexity"] == pytest.approx(np.exp((nll * tokens).sum() / tokens.sum()))
    assert [figures[name] for name in ("bert_p", "bert_r", "bert_f1")] == pytest.approx(100 * bert.mean(axis=0))
    assert [figures[name] for name in KEPT] == pytest.approx([KEPT[name] * kept[name].mean() for name in KEPT])
    bare = dict(zip(FIGURES, observed(corpus_statistics(pairs, DIALOGUE, {})), strict=True))
    assert {name for name, value in bare.items() if np.isnan(value)} == {
        *("perplexity", "bert_p", "bert_r", "bert_f1", "persona_f1"),
        *KEPT,
    }


def test_permuted_figures_equal_recomputation_for_every_exchange_of_two_dialogues() -> None:
    """Of two dialogues there are four exchanges: each draw's difference is one of them, and all occur."""
    keep = DIALOGUE < 2
    a, b = replies(TURNS, 0.9, 1), replies(TURNS, 0.1, 2)
    responses = [r for r, kept in zip(RESPONSES, keep, strict=True) if kept]
    personas = [p for p, kept in zip(PERSONAS, keep, strict=True) if kept]
    vocabulary: dict[str, int] = {}

    def run(texts: list[str]) -> CorpusStatistics:
        kept = [text for text, k in zip(texts, keep, strict=True) if k]
        return corpus_statistics(pair_figures(kept, responses, personas), DIALOGUE[keep], vocabulary)

    def figures(texts: list[str]) -> np.ndarray:
        values = text_metrics([t for t, k in zip(texts, keep, strict=True) if k], responses, personas).values
        return np.asarray([values[name] for name in TEXT_FIGURES])

    draws = columns(randomised_differences([run(a)], [run(b)], 200))
    expected = []
    for swapped in ([], [0], [1], [0, 1]):
        left = [y if d in swapped else x for x, y, d in zip(a, b, DIALOGUE, strict=True)]
        right = [x if d in swapped else y for x, y, d in zip(a, b, DIALOGUE, strict=True)]
        expected.append(figures(left) - figures(right))
    nearest = np.abs(draws[:, None] - np.asarray(expected)).max(axis=2)
    assert nearest.min(axis=1).max() < 1e-9
    assert set(nearest.argmin(axis=1)) == {0, 1, 2, 3}


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=40),
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=70),
)
def test_distinct_counts_are_the_sizes_of_unions(held: set[tuple[int, int]], included: list[list[bool]]) -> None:
    types, holders = (np.asarray([pair[i] for pair in held], np.int64) for i in (0, 1))
    found = DistinctCounter(types, holders, 6).count(np.asarray(included).T)
    assert found.tolist() == [len({t for t, holder in held if union[holder]}) for union in included]


def test_the_bootstrap_interval_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(1).normal(20, 6, 400)
    low, high = percentile_interval(bootstrap([synthetic(values)], 10_000)[0])[:, FIGURES.index("f1")]
    half = norm.ppf(0.975) * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04 * half)


def test_the_jackknife_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(1).normal(20, 6, 50)
    run = synthetic(values)
    bounds = jackknife_interval(observed(run), leave_one_out([run])[0])[:, FIGURES.index("f1")]
    half = norm.ppf(0.975) * values.std(ddof=1) / np.sqrt(50)
    assert bounds == pytest.approx([values.mean() - half, values.mean() + half])


def test_the_jackknife_covers_dist_where_the_bootstrap_misses_it() -> None:
    """Words of a Zipf law, 200 corpora: the truth is the mean DIST of such corpora."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 2001)
    dist, jackknife, percentiles = FIGURES.index("dist_1"), [], []
    values = []
    for corpus in range(200):
        words = [[str(w) for w in rng.choice(2000, 12, p=weights / weights.sum())] for _ in range(40)]
        zeros = np.zeros(40)
        pairs = PairFigures(
            dict.fromkeys(("f1", "rouge_1", "rouge_2", "rouge_l"), zeros), np.zeros((40, 10), np.int64), words
        )
        run = corpus_statistics(pairs, np.arange(40), {})
        values.append(observed(run)[dist])
        jackknife.append(jackknife_interval(observed(run), leave_one_out([run])[0])[:, dist])
        if corpus < 20:
            percentiles.append(percentile_interval(bootstrap([run], 200)[0])[:, dist])
    low, high = np.transpose(jackknife)
    assert 0.9 < np.mean((low <= np.mean(values)) & (np.mean(values) <= high)) <= 0.99
    assert np.max(percentiles) < np.mean(values)


def test_p_is_uniform_where_runs_do_not_differ() -> None:
    rng = np.random.default_rng(3)
    found = []
    for draw in range(300):
        a, b = (synthetic(rng.normal(20, 6, 25)) for _ in range(2))
        draws = randomised_differences([a], [b], 199, seed=draw)
        found.append(p_values(observed(a) - observed(b), draws)[FIGURES.index("f1")])
    assert chisquare(np.histogram(found, bins=10, range=(0, 1))[0]).pvalue > 0.01


def test_p_is_small_for_a_real_difference_and_one_for_none() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(20, 6, 200)
    first, second = synthetic(a), synthetic(a - rng.normal(1, 2, 200))
    p = p_values(observed(first) - observed(second), randomised_differences([first], [second], 999))
    assert p[FIGURES.index("f1")] == 1 / 1000
    same = p_values(observed(first) - observed(first), randomised_differences([first], [first], 99))
    assert (same[~np.isnan(same)] == 1).all()


def test_several_seeds_against_one_are_tested_as_their_mean() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(20, 3, 100)
    method = [synthetic(base + 1 + rng.normal(0, 1, 100)) for _ in range(3)]
    other, null = synthetic(base), synthetic(base + rng.normal(0, 1, 100))
    f1 = FIGURES.index("f1")

    def p(second: CorpusStatistics, first: list[CorpusStatistics]) -> float:
        difference = np.mean([observed(run) for run in first], axis=0) - observed(second)
        return float(p_values(difference, randomised_differences(first, [second], 499))[f1])

    assert p(other, method) == 1 / 500
    assert p(other, [null]) > 0.05


def test_holm_steps_down_and_skips_what_is_not_known() -> None:
    adjusted = holm(np.asarray([0.04, np.nan, 0.01, 0.03, 0.5]))
    assert adjusted[[0, 2, 3, 4]] == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert np.isnan(adjusted[1])


def test_draws_are_a_function_of_the_seed_and_paired_across_runs() -> None:
    run = statistics_of(replies(TURNS, 0.3, 1), {})
    first = bootstrap([run, run], 50, seed=7)
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first, bootstrap([run, run], 50, seed=7))
    assert not np.array_equal(first[0], bootstrap([run], 50, seed=8)[0])
