"""Figures of merit of generated replies against references: token F1, BLEU, ROUGE, DIST.

Everything the corpus libraries do, they do (sacrebleu, rouge-score); the two token F1s and DIST are short
enough to be exact here. Every figure travels with its definition and the versions that computed it.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU

from spt_jax.errors import UserError

_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")  # the 32 marks of ASCII, as ParlAI lists them
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ROUGE_NAMES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


@dataclass(frozen=True)
class TextMetrics:
    """Figures of a set of replies, with what they mean.

    Attributes:
      values: Name -> figure. In percent, except ``bleu_brevity_penalty`` (a factor), ``reply_words`` (words a reply),
        ``empty_replies`` and ``pairs`` (counts).
      definitions: Name -> one sentence, for every name in `values`.
      versions: Library -> version, for every library that computed a figure.
    """

    values: dict[str, float]
    definitions: dict[str, str]
    versions: dict[str, str]


def text_metrics(predictions: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """All text figures of `predictions` against `references`, pair by pair in the same order.

    Args:
      predictions: Generated replies, one a turn; empty ones count (and score 0).
      references: The responses of the same turns.

    Raises:
      UserError: There are no pairs, or the two have different lengths.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise UserError("The predictions and the references are each a list of texts, not one text.")
    if len(predictions) != len(references):
        raise UserError(
            f"Each prediction needs one reference: there are {len(predictions)} predictions and "
            f"{len(references)} references."
        )
    if not predictions:
        raise UserError("There are no replies to score: give at least one prediction with its reference.")
    words = [prediction.split() for prediction in predictions]
    bleu, signature = _bleu(predictions, references)
    values = {
        "f1": _mean_percent(token_f1, predictions, references),
        "f1_parlai": _mean_percent(token_f1_parlai, predictions, references),
        **bleu,
        **_rouge(predictions, references),
        "dist_1": distinct_ngrams(words, 1),
        "dist_2": distinct_ngrams(words, 2),
        "reply_words": sum(map(len, words)) / len(words),
        "empty_replies": float(sum(not tokens for tokens in words)),
        "pairs": float(len(words)),
    }
    versions = {name: importlib.metadata.version(name) for name in ("sacrebleu", "rouge-score")}
    return TextMetrics(values, _definitions(signature, versions), versions)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the two multisets of whitespace tokens, in [0, 1]; 0 where no token is common (so where one is empty)."""
    return _multiset_f1(prediction.split(), reference.split())


def token_f1_parlai(prediction: str, reference: str) -> float:
    """`token_f1` after ParlAI's normalisation: lower case, punctuation to spaces, the words a, an, the removed."""
    return _multiset_f1(_normalise(prediction).split(), _normalise(reference).split())


def distinct_ngrams(texts: Sequence[Sequence[str]], n: int) -> float:
    """DIST-n of a corpus (arXiv 1510.03055): distinct n-grams over all n-grams of all `texts`, in percent.

    n-grams do not cross texts; a corpus without any has 0.

    Raises:
      UserError: `n` is below 1.
    """
    if n < 1:
        raise UserError(f"DIST-n counts n-grams of at least one word; n is {n}.")
    ngrams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return 100.0 * len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _multiset_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    # 2PR / (P + R) with P = common / |prediction|, R = common / |reference|.
    return 2.0 * common / (len(prediction) + len(reference)) if common else 0.0


def _normalise(text: str) -> str:
    return _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))


def _mean_percent(score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[str]) -> float:
    return 100.0 * sum(map(score, predictions, references)) / len(predictions)


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float], str]:
    # force: ConvAI2's texts are tokenised, as the paper's are; it silences sacrebleu's advice and changes no score.
    metric = BLEU(force=True)
    score = metric.corpus_score(list(predictions), [list(references)])
    values = {"bleu": float(score.score), "bleu_brevity_penalty": float(score.bp)}
    values.update({f"bleu_precision_{n}": float(value) for n, value in enumerate(score.precisions, start=1)})
    return values, str(metric.get_signature())


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    # Imported here: it brings nltk, a second that only an evaluation should pay.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    scorer = RougeScorer(list(_ROUGE_NAMES), tokenizer=DefaultTokenizer(use_stemmer=False))
    totals: Counter[str] = Counter()
    for prediction, reference in zip(predictions, references, strict=True):
        for name, score in scorer.score(target=reference, prediction=prediction).items():
            totals[name] += score.fmeasure
    return {ours: 100.0 * totals[theirs] / len(predictions) for theirs, ours in _ROUGE_NAMES.items()}


def _definitions(signature: str, versions: dict[str, str]) -> dict[str, str]:
    f1 = (
        "F1 of the multisets of whitespace tokens of reply and reference, mean over pairs, percent; 0 if none is common"
    )
    rouge = (
        f"F-measure by rouge-score {versions['rouge-score']} without stemming (lower case, ASCII letters and digits)"
    )
    precisions = {
        f"bleu_precision_{n}": f"Share of the replies' {n}-grams found in their references, clipped and smoothed as in "
        "BLEU, percent."
        for n in (1, 2, 3, 4)
    }
    return {
        "f1": f"{f1}; texts as they are, as in the paper (arXiv 2406.18187).",
        "f1_parlai": f"{f1}; after ParlAI's normalisation: lower case, no punctuation, no articles a, an, the.",
        "bleu": f"Corpus BLEU by sacrebleu, one reference a reply, 0 to 100; signature {signature}.",
        "bleu_brevity_penalty": "BLEU's factor for replies that are together shorter than their references, at most 1.",
        **precisions,
        "rouge_1": f"ROUGE-1: {rouge}, single words, mean over pairs, percent.",
        "rouge_2": f"ROUGE-2: {rouge}, pairs of words, mean over pairs, percent.",
        "rouge_l": f"ROUGE-L: {rouge}, longest common subsequence, mean over pairs, percent.",
        "dist_1": "Distinct words over all words of all replies (whitespace tokens, arXiv 1510.03055), percent.",
        "dist_2": "Distinct pairs of adjacent words over all such pairs of all replies (arXiv 1510.03055), percent.",
        "reply_words": "Mean length of a reply in whitespace words, empty replies included.",
        "empty_replies": "Number of replies without a word after the cut.",
        "pairs": "Number of replies scored, each against one reference.",
    }
