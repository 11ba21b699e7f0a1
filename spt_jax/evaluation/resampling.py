"""Corpus figures of many resamples of dialogues at once: bootstrap, jackknife and the randomisation test.

A resample repeats, drops or exchanges whole dialogues, for the turns of one are not independent. Every figure but DIST
follows from sums over dialogues. DIST needs the number of n-grams that occur at least once: each n-gram keeps the list
of units (a run's replies in one dialogue) that hold it, the resamples that hold a unit are the bits of a row, and the
n-gram's resamples are the OR of its units' rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.evaluation.text_metrics import PairFigures, corpus_bleu

KEPT = {"meteor": 100.0, "persona_consistency": 1.0, "hits_1": 100.0, "hits_1_total": 100.0}
"""Means of what ``predictions.jsonl`` keeps for each pair, with the factor to the unit of the figure."""
MEANS = ("f1", "rouge_1", "rouge_2", "rouge_l", "bert_f1", "bert_p", "bert_r", "persona_f1", *KEPT)
DIST = ("dist_1", "dist_2", "dist_3")
FIGURES = (*MEANS, "bleu", *DIST, "perplexity")
"""The F figures, the order of the last axis of every array of figures here; one that is not known is NaN."""

_PAIRS, _MEANS = 0, slice(1, 1 + len(MEANS))
_BLEU = slice(_MEANS.stop, _MEANS.stop + 10)
_TOTALS = slice(_BLEU.stop, _BLEU.stop + len(DIST))
_NATS, _TOKENS = _TOTALS.stop, _TOTALS.stop + 1
_WIDTH = _TOTALS.stop + 2
_WORD_BITS = 21
_CHUNK = 1024  # resamples at once: a few tens of megabytes for a thousand dialogues


@dataclass(frozen=True)
class CorpusStatistics:
    """What every figure of a run follows from, over D dialogues.

    Attributes:
        sums: float64 ``[D, W]``, W sums over a dialogue's replies: pairs, means, BLEU's counts, n-grams for n = 1, 2
            and 3, nats, target tokens. NaN where not known.
        types: For n = 1, 2, 3: int64 ``[E]``, the n-gram of each (n-gram, dialogue) that occurs.
        holders: For n = 1, 2, 3: int64 ``[E]``, its dialogue's place.
    """

    sums: np.ndarray
    types: tuple[np.ndarray, ...]
    holders: tuple[np.ndarray, ...]

    @property
    def dialogues(self) -> int:
        """D."""
        return len(self.sums)


def corpus_statistics(
    pairs: PairFigures,
    dialogue: np.ndarray,
    vocabulary: dict[str, int],
    *,
    bert_score: np.ndarray | None = None,
    nll: np.ndarray | None = None,
    target_tokens: np.ndarray | None = None,
    kept: Mapping[str, np.ndarray] | None = None,
) -> CorpusStatistics:
    """Sums a run's pairs over their dialogues.

    Args:
        pairs: The contributions of U pairs.
        dialogue: int ``[U]``, any numbers; equal ones are one dialogue.
        vocabulary: Word -> number, shared by all runs that are compared; new words are added.
        bert_score: float ``[U, 3]``, precision, recall, F1 as fractions.
        nll: float ``[U]``, mean nats a target token.
        target_tokens: int ``[U]``.
        kept: Names of `KEPT` to ``[U]``, as ``predictions.jsonl`` has them.
    """
    places = np.unique(dialogue, return_inverse=True)[1].reshape(-1)
    per_pair = np.full((len(places), _WIDTH), np.nan)
    per_pair[:, _PAIRS] = 1.0
    means = dict(pairs.means)
    if bert_score is not None:
        means |= dict(zip(("bert_p", "bert_r", "bert_f1"), 100.0 * np.asarray(bert_score).T, strict=True))
    means |= {name: KEPT[name] * np.asarray(values, np.float64) for name, values in (kept or {}).items()}
    for column, name in enumerate(MEANS):
        if name in means:
            per_pair[:, _MEANS.start + column] = means[name]
    per_pair[:, _BLEU] = pairs.bleu
    lengths = np.asarray([len(words) for words in pairs.words], np.int64)
    per_pair[:, _TOTALS] = np.maximum(lengths[:, None] - np.arange(len(DIST)), 0)
    if nll is not None and target_tokens is not None:
        per_pair[:, _NATS], per_pair[:, _TOKENS] = nll * target_tokens, target_tokens
    sums = np.zeros((int(places.max()) + 1, _WIDTH))
    np.add.at(sums, places, per_pair)
    types, holders = _incidence(pairs.words, lengths, places, vocabulary)
    return CorpusStatistics(sums, types, holders)


def _incidence(
    words: Sequence[Sequence[str]], lengths: np.ndarray, places: np.ndarray, vocabulary: dict[str, int]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    ids = np.asarray([vocabulary.setdefault(word, len(vocabulary)) for text in words for word in text], np.int64)
    pair = np.repeat(np.arange(len(lengths)), lengths)
    types, holders = [], []
    for n in range(1, len(DIST) + 1):
        first = max(0, len(ids) - n + 1)
        inside = pair[:first] == pair[n - 1 :]  # n-grams do not cross replies
        # 21 bits a word: three fit into 63, and no corpus has two million distinct words.
        ngrams = sum(ids[k : first + k] << _WORD_BITS * (n - 1 - k) for k in range(n))
        ngrams, owner = np.asarray(ngrams, np.int64)[inside], pair[:first][inside]
        kinds, number = np.unique(ngrams, return_inverse=True)
        count = int(places.max()) + 1
        once = np.unique(number.reshape(-1) * count + places[owner])
        types.append(kinds[once // count])
        holders.append(once % count)
    return tuple(types), tuple(holders)


class DistinctCounter:
    """Counts how many n-grams occur in unions of units.

    Args:
        types: int64 ``[E]``, n-grams.
        holders: int64 ``[E]``, the unit of each, 0 … units - 1; no (n-gram, unit) twice.
        units: How many units there are.
    """

    def __init__(self, types: np.ndarray, holders: np.ndarray, units: int) -> None:
        _, number, occurrences = np.unique(types, return_inverse=True, return_counts=True)
        shared = occurrences[number.reshape(-1)] > 1
        # An n-gram of one unit occurs where its unit does: their counts add up.
        self._alone = np.bincount(holders[~shared], minlength=units).astype(np.float64)
        order = np.argsort(types[shared], kind="stable")
        self._holders = holders[shared][order]
        ordered = types[shared][order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.array([], int)

    def count(self, included: np.ndarray) -> np.ndarray:
        """Distinct n-grams, float64 ``[B]``, of B unions of units: `included` is bool ``[units, B]``."""
        counts = self._alone @ included
        if not len(self._starts):
            return counts
        packed = np.packbits(included, axis=1)
        bits = np.zeros((len(packed), -(-packed.shape[1] // 8)), np.uint64)  # whole words are ORed eight times as fast
        bits.view(np.uint8)[:, : packed.shape[1]] = packed
        ends = np.r_[self._starts[1:], len(self._holders)]
        for low in range(0, len(self._starts), 4096):  # bounds the memory of the unpacked bits
            starts = self._starts[low : low + 4096]
            rows = bits[self._holders[starts[0] : ends[low : low + 4096][-1]]]
            occurs = np.bitwise_or.reduceat(rows, starts - starts[0], axis=0)
            counts += np.unpackbits(occurs.view(np.uint8), axis=1, count=included.shape[1]).sum(axis=0, dtype=np.int32)
        return counts


def figures_of(sums: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """Corpus figures, float64 ``[B, F]`` in the order of `FIGURES`.

    Args:
        sums: float64 ``[B, W]``, the sum of `CorpusStatistics.sums` over each of B corpora's dialogues.
        distinct: float64 ``[B, 3]``, each corpus's distinct words, pairs and triples of words.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums[:, _MEANS] / sums[:, [_PAIRS]]
        bleu = [corpus_bleu(counts).score for counts in np.rint(sums[:, _BLEU])]
        totals = sums[:, _TOTALS]
        dist = 100.0 * np.divide(distinct, totals, out=np.zeros_like(totals), where=totals > 0)
        perplexity = np.exp(sums[:, _NATS] / sums[:, _TOKENS])
    return np.column_stack([means, bleu, dist, perplexity])


def observed(run: CorpusStatistics) -> np.ndarray:
    """The figures of the run itself, float64 ``[F]``."""
    distinct = [float(len(np.unique(types))) for types in run.types]
    return figures_of(run.sums.sum(axis=0)[None], np.asarray([distinct]))[0]


def bootstrap_counts(dialogues: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of resamples with replacement: how often each dialogue is drawn, int64 ``[D, B]``."""
    generator = np.random.default_rng([seed, 0])
    for size in _blocks(samples):
        drawn = generator.integers(0, dialogues, (dialogues, size)) * size + np.arange(size)
        yield np.bincount(drawn.reshape(-1), minlength=dialogues * size).reshape(dialogues, size)


def bootstrap(runs: Sequence[CorpusStatistics], samples: int, seed: int = 0) -> np.ndarray:
    """Figures of resamples of dialogues, the same ones for every run (paired): float64 ``[runs, samples, F]``.

    The DIST of a resample is no estimate of the run's: a dialogue that is drawn twice brings its n-grams once. Its
    interval is `jackknife_interval`'s.
    """
    blocks = bootstrap_counts(runs[0].dialogues, samples, seed)
    return np.concatenate(list(_resampled(runs, blocks)), axis=1)


def leave_one_out(runs: Sequence[CorpusStatistics]) -> np.ndarray:
    """Figures without one dialogue, for each of D dialogues in turn: float64 ``[runs, D, F]``."""
    dialogues = runs[0].dialogues
    places = np.arange(dialogues)
    blocks = ((places[:, None] != places[low : low + _CHUNK]).astype(np.int64) for low in range(0, dialogues, _CHUNK))
    return np.concatenate(list(_resampled(runs, blocks)), axis=1)


def _resampled(runs: Sequence[CorpusStatistics], blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Figures ``[runs, B, F]`` of blocks of resamples, each int64 ``[D, B]``: how often each dialogue counts."""
    counters = [
        [DistinctCounter(t, h, run.dialogues) for t, h in zip(run.types, run.holders, strict=True)] for run in runs
    ]
    for counts in blocks:
        weights, drawn = counts.astype(np.float64), counts > 0
        block = []
        for run, counting in zip(runs, counters, strict=True):
            distinct = np.column_stack([counter.count(drawn) for counter in counting])
            block.append(figures_of((run.sums.T @ weights).T, distinct))
        yield np.stack(block)


def randomised_differences(
    first: Sequence[CorpusStatistics], second: Sequence[CorpusStatistics], samples: int, seed: int = 0
) -> np.ndarray:
    """Differences under the hypothesis that it makes no difference which run gave a dialogue's replies.

    Each draw permutes, dialogue by dialogue, whose replies are whose among all runs of both sides (with one run a side:
    it swaps them or not), and takes mean figure of the first side minus mean figure of the second.

    Args:
        first: The seeds of one method.
        second: The seeds of the other, on the same dialogues.
        samples: How many draws.
        seed: Of the draws.

    Returns:
        float64 ``[samples, F]``.
    """
    runs = [*first, *second]
    dialogues, sides = runs[0].dialogues, len(runs)
    counters = [
        DistinctCounter(
            np.concatenate([run.types[n] for run in runs]),
            np.concatenate([run.holders[n] + r * dialogues for r, run in enumerate(runs)]),
            sides * dialogues,
        )
        for n in range(len(DIST))
    ]
    sums = np.concatenate([run.sums for run in runs]).T
    generator = np.random.default_rng([seed, 1])
    blocks = []
    for size in _blocks(samples):
        order = _permutations(generator, sides, (dialogues, size))
        total = np.zeros((size, len(FIGURES)))
        for slot in range(sides):
            included = (order[slot] == np.arange(sides)[:, None, None]).reshape(sides * dialogues, size)
            distinct = np.column_stack([counter.count(included) for counter in counters])
            figures = figures_of((sums @ included.astype(np.float64)).T, distinct)
            total += figures / len(first) if slot < len(first) else -figures / len(second)
        blocks.append(total)
    return np.concatenate(blocks)


def _permutations(generator: np.random.Generator, sides: int, shape: tuple[int, int]) -> np.ndarray:
    """Independent uniform permutations of ``0 … sides - 1`` along the first axis, int8 ``[sides, *shape]``."""
    order = np.broadcast_to(np.arange(sides, dtype=np.int8)[:, None, None], (sides, *shape)).copy()
    for last in range(sides - 1, 0, -1):  # Fisher and Yates
        chosen = generator.integers(0, last + 1, shape, np.int8)[None]
        moved = np.take_along_axis(order, chosen.astype(np.intp), axis=0)
        np.put_along_axis(order, chosen.astype(np.intp), order[last : last + 1].copy(), axis=0)
        order[last] = moved[0]
    return order


def p_values(difference: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Two-sided p-values ``(b + 1) / (n + 1)``, b draws at least as far from 0 as the difference; NaN remains NaN.

    Args:
        difference: float64 ``[C]``, as observed.
        draws: float64 ``[n, C]``, `randomised_differences`.
    """
    # Sums in another order differ in their last digits; a tie is a tie.
    at_least = (np.abs(draws) >= np.abs(difference) - 1e-9).sum(axis=0)
    return np.where(np.isnan(difference), np.nan, (at_least + 1.0) / (len(draws) + 1.0))


def holm(values: np.ndarray) -> np.ndarray:
    """p-values ``[C]`` after Holm's step-down correction over those that are not NaN."""
    adjusted, known = np.full(len(values), np.nan), np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Percentile interval of finite draws, ``[n, ...]`` -> ``[2, ...]``; NaN where a draw is NaN."""
    tail = 100.0 * (1.0 - level) / 2.0
    return np.percentile(draws, [tail, 100.0 - tail], axis=0)


def jackknife_interval(values: np.ndarray, without: np.ndarray) -> np.ndarray:
    """95 % interval, value ± 1.96 standard errors, for figures that a repeated dialogue would distort (DIST).

    Args:
        values: float64 ``[C]``, of all D dialogues.
        without: float64 ``[D, C]``, without each dialogue; the squared error is (D - 1) / D times the sum of squared
            deviations from their mean (Efron and Stein, 1981).

    Returns:
        float64 ``[2, C]``.
    """
    dialogues = len(without)
    error = np.sqrt((dialogues - 1) / dialogues * np.square(without - without.mean(axis=0)).sum(axis=0))
    return np.stack([values - 1.959964 * error, values + 1.959964 * error])


def _blocks(samples: int) -> list[int]:
    return [min(_CHUNK, samples - low) for low in range(0, samples, _CHUNK)]
