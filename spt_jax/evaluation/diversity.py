"""How varied a set of replies is, whatever the references: DIST-n, the entropy of n-grams, self-BLEU.

A reply is its whitespace tokens; n-grams do not cross replies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from spt_jax.errors import UserError

_EPSILON = 0.1
"""What stands for a count of no match: `nltk`'s smoothing method 1 (Chen and Cherry, 2014), as Texygen's."""

Words = Sequence[str]
"""One reply."""


def distinct_ngrams(texts: Sequence[Words], n: int) -> float:
    """DIST-n of a corpus (arXiv 1510.03055): distinct n-grams over all n-grams of all `texts`, in percent.

    A corpus without any has 0.

    Raises:
      UserError: `n` is below 1.
    """
    counts = _ngram_counts(texts, n)
    return 100.0 * len(counts) / counts.total() if counts else 0.0


def ngram_entropy(texts: Sequence[Words], n: int = 4) -> float:
    """Ent-n (arXiv 1809.05972, "Ent-n"): entropy of the n-grams of all `texts`, in nats.

    ``-Σ_w p(w) ln p(w)`` over the distinct n-grams w, p(w) their share of all n-grams. It is at most the logarithm of
    the number of n-grams, so that sets of different sizes cannot be compared. A corpus without any has 0.

    Args:
      texts: The replies.
      n: Words of an n-gram; the field's figure is that of 4.

    Raises:
      UserError: `n` is below 1.
    """
    counts = np.fromiter(_ngram_counts(texts, n).values(), np.float64)
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    # max: the entropy of one certain n-gram is 0, not -0.
    return max(0.0, float(-np.sum(shares * np.log(shares))))


def self_bleu(texts: Sequence[Words], n: int = 4) -> float:
    """Self-BLEU (arXiv 1802.01886): the mean BLEU of each reply against all others as its references, 0 to 100.

    The lower, the more varied. Each is nltk's ``sentence_bleu`` with n equal weights and smoothing method 1, the
    function of Texygen's program, over all replies, none drawn and none left out. A count is clipped at its highest
    among the others: at the highest of all, or at the second highest for the reply that has it. So a pass over all
    n-grams serves every reply, instead of one over all pairs.

    Args:
      texts: The replies. An empty one scores 0; fewer than two have no others and score 0.
      n: The longest n-grams.

    Raises:
      UserError: `n` is below 1.
    """
    _check(n)
    if len(texts) < 2:
        return 0.0
    counts = [[Counter(_ngrams(words, k)) for words in texts] for k in range(1, n + 1)]
    most = [_highest_counts(order) for order in counts]
    lengths = Counter(len(words) for words in texts)
    scores = [
        _bleu_against_others(i, [order[i] for order in counts], most, len(words), lengths)
        for i, words in enumerate(texts)
    ]
    return 100.0 * math.fsum(scores) / len(texts)


_Highest = dict[tuple[str, ...], tuple[int, int, int]]
"""n-gram -> (highest count in one reply, that reply, highest count in any other)."""


def _highest_counts(counts: Sequence[Counter[tuple[str, ...]]]) -> _Highest:
    found: _Highest = {}
    for reply, own in enumerate(counts):
        for ngram, count in own.items():
            first, holder, second = found.get(ngram, (0, -1, 0))
            if count > first:
                found[ngram] = (count, reply, first)
            elif count > second:
                found[ngram] = (first, holder, count)
    return found


def _bleu_against_others(
    reply: int,
    counts: Sequence[Counter[tuple[str, ...]]],
    most: Sequence[_Highest],
    length: int,
    lengths: Counter[int],
) -> float:
    logarithms = []
    for order, own in enumerate(counts):
        matches = 0
        for ngram, count in own.items():
            first, holder, second = most[order][ngram]
            matches += min(count, second if holder == reply else first)
        if order == 0 and not matches:
            return 0.0
        # nltk divides by at least 1, so that a reply shorter than the n-gram counts as one without a match.
        logarithms.append(math.log((matches or _EPSILON) / max(1, own.total())))
    others = (other for other, number in lengths.items() if number > (other == length))
    closest = min(others, key=lambda other: (abs(other - length), other))
    penalty = 1.0 if length > closest else math.exp(1.0 - closest / length)
    return penalty * math.exp(math.fsum(logarithms) / len(counts))


def _ngram_counts(texts: Sequence[Words], n: int) -> Counter[tuple[str, ...]]:
    _check(n)
    return Counter(ngram for words in texts for ngram in _ngrams(words, n))


def _ngrams(words: Words, n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _check(n: int) -> None:
    if n < 1:
        raise UserError(f"an n-gram has at least one word; n is {n}.")
