"""METEOR (Lavie and Agarwal, 2007) of replies against references, by nltk."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.evaluation.wordnet import find_wordnet


@dataclass(frozen=True)
class MeteorScores:
    """METEOR of N pairs.

    Attributes:
        scores: float64 ``[N]``, fractions; 0 where no word is matched, so where one side has none.
        definitions: ``meteor`` -> one sentence.
        versions: Library -> version.
    """

    scores: np.ndarray
    definitions: dict[str, str]
    versions: dict[str, str]


def meteor_scores(predictions: Sequence[str], references: Sequence[str]) -> MeteorScores:
    """Scores each prediction against the reference of the same place, by ``nltk.translate.meteor_score``.

    Words are whitespace tokens in lower case; they match as they are, by Porter's stem, or through WordNet's synonyms.

    Args:
        predictions: N replies.
        references: The N responses of the same turns.

    Raises:
        WordNetMissingError: This machine has no WordNet; the sentence says how to get it.
        UserError: An environment variable names a folder that holds none.
    """
    wordnet = find_wordnet()
    # Imported here: nltk takes a second that only an evaluation should pay.
    from nltk.translate.meteor_score import meteor_score

    scores = [
        meteor_score([reference.split()], prediction.split(), wordnet=wordnet)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    version = importlib.metadata.version("nltk")
    definition = (
        f"METEOR by nltk {version} with WordNet {wordnet.get_version()} (α 0.9, β 3, γ 0.5, Porter's stems; whitespace "
        "tokens, lower case), one reference a reply, mean over pairs, percent; 0 if no word matches."
    )
    versions = {"nltk": version, "WordNet": str(wordnet.get_version())}
    return MeteorScores(np.asarray(scores, np.float64), {"meteor": definition}, versions)
