"""Figures of merit of generated replies: against references, against the persona, and of the replies among themselves.

Everything the corpus libraries do, they do (sacrebleu, rouge-score, nltk, bert-score); what is counted here is short
enough to be exact. Every figure travels with its definition and the versions that computed it.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU, BLEUScore

from spt_jax.errors import UserError
from spt_jax.evaluation.bert_score import PAPERS_MODEL, BertScores, bert_scores
from spt_jax.evaluation.diversity import distinct_ngrams, ngram_entropy, self_bleu
from spt_jax.evaluation.meteor import meteor_scores
from spt_jax.evaluation.nli import persona_consistency
from spt_jax.evaluation.normalised import normalise
from spt_jax.evaluation.persona_words import STOP_WORDS, persona_words
from spt_jax.evaluation.wordnet import WordNetMissingError
from spt_jax.metric_groups import EVERYDAY, chosen_groups, is_chosen

_ROUGE_NAMES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


@dataclass(frozen=True)
class TextMetrics:
    """Figures of a set of replies, with what they mean.

    Attributes:
      values: Name -> figure. In percent, except ``bleu_brevity_penalty`` (a factor), ``entropy_4`` (nats),
        ``persona_consistency`` (persona lines), ``reply_words`` (words a reply), ``empty_replies`` and ``pairs``
        (counts).
      definitions: Name -> one sentence, for every name in `values`.
      versions: Library -> version, for every library that computed a figure.
      per_pair: What a costly scorer found for each pair, in order, as ``predictions.jsonl`` keeps it: ``bert_score``
        (precision, recall and F1 as fractions), ``meteor`` (a fraction), ``persona_consistency``.
      notes: A sentence for every figure that was asked for and could not be computed here.
    """

    values: dict[str, float]
    definitions: dict[str, str]
    versions: dict[str, str]
    per_pair: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    personas: Sequence[Sequence[str]] | None = None,
    *,
    metrics: Iterable[str] = (EVERYDAY,),
    bert_score_model: str = "",
    bert_score_layers: int = 0,
    nli_model: str = "",
) -> TextMetrics:
    """The text figures of `predictions` against `references`, pair by pair in the same order.

    Args:
      predictions: Generated replies, one a turn; empty ones count (and score 0).
      references: The responses of the same turns.
      personas: The lines of the persona behind each reply; None leaves out what is measured against it.
      metrics: Groups of figures (`spt_jax.metric_groups`).
      bert_score_model: The encoder of BERTScore, as `spt_jax.evaluation.bert_score.bert_scores` takes it; one that is
        given asks for BERTScore. Empty for the paper's, where `metrics` ask for it.
      bert_score_layers: Layers of it that are used; 0 leaves the choice to bert-score.
      nli_model: The classifier of the consistency with the persona, as `spt_jax.evaluation.nli` takes it; one that is
        given asks for that score.

    Raises:
      UserError: There are no pairs, the numbers of texts differ, a group does not exist, or an encoder or a classifier
        cannot be used.
    """
    groups = chosen_groups(metrics) | ({"bertscore"} if bert_score_model else set()) | ({"nli"} if nli_model else set())
    if "nli" in groups and not nli_model:
        raise UserError("the group of metrics 'nli' needs a classifier of entailment; evaluation.nli names it")
    pairs = pair_figures(predictions, references, personas)
    values = {name: float(scores.mean()) for name, scores in pairs.means.items()} | _corpus_values(pairs, groups)
    values = {name: value for name, value in values.items() if is_chosen(name, groups)}
    known = metric_definitions()
    found = TextMetrics(values, {name: known[name] for name in values}, metric_versions())
    if "meteor" in groups:
        _add_meteor(found, predictions, references)
    if "bertscore" in groups:
        bert = bert_scores(predictions, references, bert_score_model or PAPERS_MODEL, num_layers=bert_score_layers)
        _add(found, bert_values(bert), bert, bert_score=[list(scores) for scores in bert.per_pair()])
    if "nli" in groups and personas is not None:
        nli = persona_consistency(predictions, personas, nli_model)
        _add(found, {"persona_consistency": float(nli.scores.mean())}, nli, persona_consistency=nli.scores.tolist())
    return found


def _corpus_values(pairs: PairFigures, groups: Iterable[str]) -> dict[str, float]:
    """The figures that are no means over pairs; self-BLEU only where it is asked for, as it takes the longest."""
    bleu = corpus_bleu(pairs.bleu.sum(axis=0))
    return {
        "bleu": float(bleu.score),
        "bleu_brevity_penalty": float(bleu.bp),
        **{f"bleu_precision_{n}": float(value) for n, value in enumerate(bleu.precisions, start=1)},
        **{f"dist_{n}": distinct_ngrams(pairs.words, n) for n in (1, 2, 3)},
        "entropy_4": ngram_entropy(pairs.words, 4),
        **({"self_bleu": self_bleu(pairs.words)} if "self_bleu" in groups else {}),
        "reply_words": sum(map(len, pairs.words)) / len(pairs.words),
        "empty_replies": float(sum(not words for words in pairs.words)),
        "pairs": float(len(pairs.words)),
    }


def _add_meteor(found: TextMetrics, predictions: Sequence[str], references: Sequence[str]) -> None:
    try:
        meteor = meteor_scores(predictions, references)
    except WordNetMissingError as error:
        found.notes.append(f"METEOR is left out: {error}.")
        return
    _add(found, {"meteor": 100.0 * float(meteor.scores.mean())}, meteor, meteor=meteor.scores.tolist())


def _add(found: TextMetrics, values: dict[str, float], scorer: Any, **per_pair: list[Any]) -> None:
    found.values.update(values)
    found.definitions.update(scorer.definitions)
    found.versions.update(scorer.versions)
    found.per_pair.update(per_pair)


def bert_values(scores: BertScores) -> dict[str, float]:
    """Means over pairs in percent: ``bert_p``, ``bert_r``, ``bert_f1``."""
    return {
        "bert_p": 100.0 * float(scores.precision.mean()),
        "bert_r": 100.0 * float(scores.recall.mean()),
        "bert_f1": 100.0 * float(scores.f1.mean()),
    }


def pair_figures(
    predictions: Sequence[str], references: Sequence[str], personas: Sequence[Sequence[str]] | None = None
) -> PairFigures:
    """What each pair contributes to the figures of the corpus.

    Args:
      predictions: N generated replies; empty ones count (and score 0).
      references: The N responses of the same turns.
      personas: The lines of the persona behind each reply; None leaves out what is measured against it.

    Raises:
      UserError: There are no pairs, or the numbers of texts differ.
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
    if personas is not None and len(personas) != len(predictions):
        raise UserError(f"Each prediction needs its persona: there are {len(personas)} for {len(predictions)}.")
    means = {
        "f1": _percents(token_f1, predictions, references),
        "f1_parlai": _percents(token_f1_parlai, predictions, references),
        **_rouge(predictions, references),
    }
    if personas is not None:
        found = 100.0 * np.asarray([persona_words(*pair) for pair in zip(predictions, personas, strict=True)])
        means |= dict(zip(("persona_recall", "persona_precision", "persona_f1"), found.T, strict=True))
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
    return _multiset_f1(normalise(prediction).split(), normalise(reference).split())


def _multiset_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    # 2PR / (P + R) with P = common / |prediction|, R = common / |reference|.
    return 2.0 * common / (len(prediction) + len(reference)) if common else 0.0


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
    """Library -> version, for the libraries behind the text figures that need no further data."""
    return {name: importlib.metadata.version(name) for name in ("sacrebleu", "rouge-score")}


def metric_definitions() -> dict[str, str]:
    """Name -> one sentence, for every text figure that needs no further data."""
    signature, versions = _bleu_signature(), metric_versions()
    f1 = (
        "F1 of the multisets of whitespace tokens of reply and reference, mean over pairs, percent; 0 if none is common"
    )
    rouge = (
        f"F-measure by rouge-score {versions['rouge-score']} without stemming (lower case, ASCII letters and digits)"
    )
    persona = (
        f"sets of words after ParlAI's normalisation without stop words (a list of {len(STOP_WORDS)}), "
        "as the knowledge R/P/F1 of arXiv 1902.04911; mean over pairs, percent; 0 if none is common"
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
        "dist_3": "Distinct triples of adjacent words over all such triples, as DIST-2 (arXiv 1510.03055), percent.",
        "entropy_4": "Entropy of the 4-grams of all replies together (whitespace tokens, arXiv 1809.05972), nats; it "
        "grows with the number of replies.",
        "self_bleu": "Self-BLEU (arXiv 1802.01886): BLEU of each reply with all the others as references (whitespace "
        "tokens, n-grams up to 4, equal weights, brevity penalty, 0.1 for no match: nltk's sentence_bleu with "
        "smoothing method 1), mean over all replies, percent; the lower, the more varied.",
        "persona_recall": f"Share of the persona's content words that the reply uses; {persona}.",
        "persona_precision": f"Share of the reply's content words that are the persona's; {persona}.",
        "persona_f1": f"Harmonic mean of a reply's persona recall and precision; {persona}.",
        "reply_words": "Mean length of a reply in whitespace words, empty replies included.",
        "empty_replies": "Number of replies without a word after the cut.",
        "pairs": "Number of replies scored, each against one reference.",
    }
