"""Sentence BLEU between all texts of a batch at once, equal to sacrebleu's (13a, exp smoothing, effective order)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.packing import Row
from spt_jax.data.template import context_text, turn_history
from spt_jax.errors import UserError, nearest

PAIR_KINDS = ("persona", "context")
_MAX_ORDER = 4


def pair_texts(rows: Sequence[Row], dialogues: Sequence[Dialogue], kind: str) -> list[list[str]]:
    """The text of every turn of every row whose similarities make the contrastive pairs.

    Args:
      rows: packed rows of `dialogues`.
      dialogues: the set the rows' `dialogue` indexes.
      kind: "persona" (its lines joined by spaces: the authors' program) or "context" (the whole inference prompt, no
        history dropped: the paper's M(C_i, C_j)).

    Returns:
      One list a row, one text a turn; the same for the same turn in both layouts.

    Raises:
      UserError: an unknown kind.
    """
    if kind not in PAIR_KINDS:
        raise UserError(f"The text of pairs is {kind!r}, allowed are {PAIR_KINDS}.{nearest(kind, PAIR_KINDS)}")
    if kind == "persona":
        return [[" ".join(dialogues[row.dialogue].persona)] * len(row.turns) for row in rows]
    return [
        [
            context_text(dialogues[row.dialogue].persona, turn_history(dialogues[row.dialogue], int(turn)))
            for turn in row.turns
        ]
        for row in rows
    ]


class BleuSimilarity:
    """Sentence BLEU among a fixed list of texts.

    The k-th occurrence of an n-gram in a text is a feature of its own, so the clipped matches of two texts,
    sum over n-grams of min(count_i, count_j), are the size of the intersection of two sets: a product of 0/1 matrices.

    Args:
      texts: every text that may be compared; equal texts are counted once.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # with lxml, for one who may have no pairs

        unique: dict[str, int] = {}
        self._text = np.asarray([unique.setdefault(text, len(unique)) for text in texts], dtype=np.int64)
        vocabulary: dict[str, int] = {}
        tokenize = Tokenizer13a()
        words = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text.rstrip()).split()]
            for text in unique
        ]
        self._lengths = np.asarray([len(ids) for ids in words], dtype=np.int64)
        flat = np.asarray([word for ids in words for word in ids], dtype=np.int64)
        self._features = [
            _features(grams, owners, len(words)) for grams, owners in _ngrams(flat, self._lengths, len(vocabulary))
        ]

    def matrix(self, indices: np.ndarray) -> np.ndarray:
        """BLEU of pairs of texts.

        Args:
          indices: [n] positions in `texts`.

        Returns:
          [n, n] float64 in 0..100; entry (i, j) has hypothesis `texts[indices[i]]` and reference `texts[indices[j]]`.
        """
        texts, inverse = np.unique(self._text[np.asarray(indices, dtype=np.int64)], return_inverse=True)
        lengths = self._lengths[texts]
        log_precision = np.zeros((len(texts), len(texts)))
        misses = np.zeros((len(texts), len(texts)))
        any_match = np.zeros((len(texts), len(texts)), dtype=bool)
        for order, features in enumerate(self._features, start=1):
            totals = np.maximum(lengths - order + 1, 0)[:, None]
            matches = features.intersections(texts)
            # Without a shared word there is no shared n-gram, and sacrebleu gives 0.
            any_match |= matches > 0
            # Each order without a match halves its floor once more (sacrebleu's "exp"); orders a short hypothesis
            # does not have are left out (effective order).
            misses += (matches == 0) & (totals > 0)
            precision = 100 * np.where(matches > 0, matches, 0.5**misses) / np.maximum(totals, 1)
            log_precision += np.where(totals > 0, np.log(precision), 0.0)
        orders = np.clip(lengths, 1, _MAX_ORDER)[:, None]
        hypothesis, reference = np.maximum(lengths, 1)[:, None], lengths[None, :]
        brevity = np.exp(np.minimum(0.0, 1 - reference / hypothesis))
        scores = np.where(any_match, brevity * np.exp(log_precision / orders), 0.0)
        return scores[np.ix_(inverse, inverse)]


class _FeatureSets:
    """Sets of integers by text, in compressed rows: `ids[starts[i]:starts[i + 1]]` are text i's."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray) -> None:
        self._ids = ids
        self._starts = starts

    def intersections(self, texts: np.ndarray) -> np.ndarray:
        """[n, n] float64: how many features each two of `texts` (distinct) share."""
        import scipy.sparse  # a fifth of a second that one who has no pairs need not wait

        sizes = self._starts[texts + 1] - self._starts[texts]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        features, columns = np.unique(self._ids[np.repeat(self._starts[texts], sizes) + offsets], return_inverse=True)
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        # Sparse, not for memory: a dense product wakes BLAS's threads, which stall beside a busy training step.
        member = scipy.sparse.csr_array((np.ones(len(columns)), columns, bounds), shape=(len(texts), len(features)))
        return (member @ member.T).toarray()


def _ngrams(words: np.ndarray, lengths: np.ndarray, vocabulary: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For orders 1..4: n-gram ids and the texts they stand in, over texts laid end to end as `words`."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    ids = words
    yield ids, owners
    for order in range(2, _MAX_ORDER + 1):
        # An n-gram is an (n-1)-gram and the word behind it, numbered densely so that the next order cannot overflow.
        last = words[order - 1 :]
        within = owners[: len(last)] == owners[order - 1 :]
        pairs = ids[: len(last)] * vocabulary + last
        ids = np.full(len(last), -1, dtype=np.int64)
        ids[within] = np.unique(pairs[within], return_inverse=True)[1]
        yield ids[within], owners[: len(last)][within]


def _features(grams: np.ndarray, owners: np.ndarray, texts: int) -> _FeatureSets:
    """Numbers the occurrences of every n-gram within its text; an (n-gram, occurrence) pair is one feature."""
    order = np.lexsort((grams, owners))
    grams, owners = grams[order], owners[order]
    position = np.arange(len(grams))
    begins = np.ones(len(grams), dtype=bool)
    begins[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
    occurrence = position - np.maximum.accumulate(np.where(begins, position, 0))
    width = int(occurrence.max(initial=0)) + 1
    ids = np.unique(grams * width + occurrence, return_inverse=True)[1].astype(np.int32)
    return _FeatureSets(ids, np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=texts))]))
