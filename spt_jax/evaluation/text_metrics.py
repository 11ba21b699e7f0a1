"""Figures of merit of generated replies against references: token F1, BLEU, ROUGE, DIST, BERTScore.

Everything the corpus libraries do, they do (sacrebleu, rouge-score, bert-score); the two token F1s and DIST are short
enough to be exact here. Every figure travels with its definition and the versions that computed it.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from sacrebleu.metrics.bleu import BLEU, BLEUScore

from spt_jax.errors import UserError
from spt_jax.evaluation.bert_score import BertScores, bert_scores

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
      bert_score: Of each pair, in order, as fractions (precision, recall, F1); empty where it was not asked for.
    """

    values: dict[str, float]
    definitions: dict[str, str]
    versions: dict[str, str]
    bert_score: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class PairFigures:
    """What each of N pairs of reply and reference contributes to the figures of a corpus.

    Attributes:
      means: Name -> float64 ``[N]`` in percent: the figures of a corpus that are means over its pairs.
      bleu: int64 ``[N, 10]``, sufficient statistics of BLEU that add up over pairs: words of the reply, of the
        reference, then matching n-grams and n-grams of the reply for n = 1 … 4 (`corpus_bleu` takes their sum).
      words: Whitespace tokens of each reply.
    """

    means: dict[str, np.ndarray]
    bleu: np.ndarray
    words: list[list[str]]


def text_metrics(predictions: Sequence[str], references: Sequence[str], bert_score_model: str = "") -> TextMetrics:
    """All text figures of `predictions` against `references`, pair by pair in the same order.

    Args:
      predictions: Generated replies, one a turn; empty ones count (and score 0).
      references: The responses of the same turns.
      bert_score_model: The encoder of BERTScore, as `spt_jax.evaluation.bert_score.bert_scores` takes it; without one,
        BERTScore is left out.

    Raises:
      UserError: There are no pairs, the two have different lengths, or the encoder cannot be used.
    """
    pairs = pair_figures(predictions, references)
    bleu = corpus_bleu(pairs.bleu.sum(axis=0))
    means = {name: float(values.mean()) for name, values in pairs.means.items()}
    values = {
        "f1": means["f1"],
        "f1_parlai": means["f1_parlai"],
        "bleu": float(bleu.score),
        "bleu_brevity_penalty": float(bleu.bp),
        **{f"bleu_precision_{n}": float(value) for n, value in enumerate(bleu.precisions, start=1)},
        **{name: means[name] for name in _ROUGE_NAMES.values()},
        "dist_1": distinct_ngrams(pairs.words, 1),
        "dist_2": distinct_ngrams(pairs.words, 2),
        "reply_words": sum(map(len, pairs.words)) / len(pairs.words),
        "empty_replies": float(sum(not tokens for tokens in pairs.words)),
        "pairs": float(len(pairs.words)),
    }
    definitions, versions = metric_definitions(), metric_versions()
    if not bert_score_model:
        return TextMetrics(values, definitions, versions)
    bert = bert_scores(predictions, references, bert_score_model)
    return TextMetrics(
        values | bert_values(bert), definitions | bert.definitions, versions | bert.versions, bert.per_pair()
    )


def bert_values(scores: BertScores) -> dict[str, float]:
    """Means over pairs in percent: ``bert_p``, ``bert_r``, ``bert_f1``."""
    return {
        "bert_p": 100.0 * float(scores.precision.mean()),
        "bert_r": 100.0 * float(scores.recall.mean()),
        "bert_f1": 100.0 * float(scores.f1.mean()),
    }


def pair_figures(predictions: Sequence[str], references: Sequence[str]) -> PairFigures:
    """What each pair contributes to the figures of the corpus.

    Args:
      predictions: N generated replies; empty ones count (and score 0).
      references: The N responses of the same turns.

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
    means = {
        "f1": _percents(token_f1, predictions, references),
        "f1_parlai": _percents(token_f1_parlai, predictions, references),
        **_rouge(predictions, references),
    }
    return PairFigures(means, _bleu_statistics(predictions, references), [text.split() for text in predictions])


def corpus_bleu(statistics: np.ndarray) -> BLEUScore:
    """sacrebleu's corpus BLEU from the sum over pairs of `PairFigures.bleu`, ``[10]``."""
    sys_len, ref_len, *counts = (int(count) for count in statistics)
    return BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp")


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


def _percents(score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    return 100.0 * np.fromiter(map(score, predictions, references), np.float64, len(predictions))


def _bleu_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    # Counts do not depend on the order's being effective; it silences sacrebleu's advice for single sentences.
    metric = BLEU(effective_order=True)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        score = metric.sentence_score(prediction, [reference])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.asarray(rows, np.int64)


def _bleu_signature() -> str:
    # force: ConvAI2's texts are tokenised, as the paper's are; it silences sacrebleu's advice and changes no score.
    metric = BLEU(force=True)
    metric.corpus_score([""], [[""]])  # the number of references is known from here on
    return str(metric.get_signature())


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    # Imported here: it brings nltk, a second that only an evaluation should pay.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    scorer = RougeScorer(list(_ROUGE_NAMES), tokenizer=DefaultTokenizer(use_stemmer=False))
    scores = [scorer.score(target=r, prediction=p) for p, r in zip(predictions, references, strict=True)]
    return {
        ours: 100.0 * np.asarray([score[theirs].fmeasure for score in scores], np.float64)
        for theirs, ours in _ROUGE_NAMES.items()
    }


def metric_versions() -> dict[str, str]:
    """Library -> version, for the libraries behind every text figure but BERTScore."""
    return {name: importlib.metadata.version(name) for name in ("sacrebleu", "rouge-score")}


def metric_definitions() -> dict[str, str]:
    """Name -> one sentence, for every text figure but BERTScore."""
    signature, versions = _bleu_signature(), metric_versions()
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
