"""hits@1: how often a turn's true response is the likeliest of its candidates (20 in ConvAI2, arXiv 1902.00098)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.evaluation.candidate_scores import CandidateScores
from spt_jax.evaluation.candidates import RankedTurn

DEFINITIONS = {
    "hits_1": "Share of ranked turns whose true response has the least mean nll a token of all candidates, behind the "
    "selected prompt, end of sequence included, percent; among equals the first candidate counts.",
    "hits_1_total": "As hits_1 by the total nll, which favours short candidates, percent.",
    "hits_turns": "Number of turns ranked: those that get a reply and whose candidates hold the true response.",
    "hits_ties": "Number of ranked turns whose least mean or total nll several different candidates share.",
}


@dataclass(frozen=True)
class Hits:
    """What ranking U turns found.

    Attributes:
        by_mean: bool ``[U]``, whether the true response has the least mean nll a token; the first among equals.
        by_total: bool ``[U]``, the same by the total nll.
        tied: bool ``[U]``, whether either order has several candidates at its top.
    """

    by_mean: np.ndarray
    by_total: np.ndarray
    tied: np.ndarray

    @property
    def values(self) -> dict[str, float]:
        """Name -> figure, as in ``results.json``; empty where no turn was ranked."""
        if not len(self.by_mean):
            return {}
        return {
            "hits_1": 100.0 * float(self.by_mean.mean()),
            "hits_1_total": 100.0 * float(self.by_total.mean()),
            "hits_turns": float(len(self.by_mean)),
            "hits_ties": float(self.tied.sum()),
        }


def rank(turns: Sequence[RankedTurn], scores: Sequence[CandidateScores]) -> Hits:
    """hits@1 of turns by the scores of their candidates, two ways.

    Args:
        turns: U turns.
        scores: One entry a turn, `spt_jax.evaluation.candidate_scores.score_candidates`.
    """
    pairs = list(zip(turns, scores, strict=True))
    return Hits(
        by_mean=np.asarray([int(np.argmin(s.mean_nll)) == turn.response for turn, s in pairs], bool),
        by_total=np.asarray([int(np.argmin(s.nll)) == turn.response for turn, s in pairs], bool),
        tied=np.asarray([any(_tied(values) for values in (s.mean_nll, s.nll)) for _, s in pairs], bool),
    )


def _tied(values: np.ndarray) -> bool:
    return int((values == values.min()).sum()) > 1
