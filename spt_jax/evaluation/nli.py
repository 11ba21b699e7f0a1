"""Consistency of replies with a persona, by a classifier of entailment (arXiv 1905.10033).

transformers and torch are an extra: nothing of them is imported before a score is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.evaluation.torch_models import local_model

_BATCH = 64
_WORTH = {"entail": 1.0, "neutral": 0.0, "contradict": -1.0}
_BEGINNINGS = ("entail", "neutral", "contradict")


@dataclass(frozen=True)
class Consistency:
    """The score C of N replies.

    Attributes:
        scores: float64 ``[N]``: entailed minus contradicted lines of the reply's persona.
        definitions: ``persona_consistency`` -> one sentence.
        versions: Library -> version.
    """

    scores: np.ndarray
    definitions: dict[str, str]
    versions: dict[str, str]


def persona_consistency(replies: Sequence[str], personas: Sequence[Sequence[str]], model: str) -> Consistency:
    """C of Madotto et al. (arXiv 1905.10033): ``C(u) = Σ_j NLI(u, p_j)`` over the lines p_j of the persona.

    NLI is +1 where the reply u entails the line, -1 where it contradicts it, else 0: the classifier's likeliest label
    with the reply as premise and the line as hypothesis.

    Args:
        replies: N replies; one without a word scores 0.
        personas: The N personas, each its lines.
        model: The classifier: a folder in Hugging Face's format, ``package:NAME`` or a hub id. Its labels' names begin
            with entail, neutral and contradict.

    Raises:
        UserError: torch is missing, or the classifier cannot be loaded or has other labels.
    """
    scorer = _classifier(model)
    pairs = [
        (place, reply, line)
        for place, (reply, persona) in enumerate(zip(replies, personas, strict=True))
        for line in persona
        if reply.strip() and line.strip()
    ]
    scores = np.zeros(len(replies))
    # Equal pairs are read once; alike lengths together pad little.
    distinct = sorted({(reply, line) for _, reply, line in pairs}, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    worth = dict(zip(distinct, scorer.worth(distinct), strict=True))
    for place, reply, line in pairs:
        scores[place] += worth[reply, line]
    definition = (
        f"C of arXiv 1905.10033 by the classifier {scorer.name}: persona lines that the reply entails minus lines that "
        "it contradicts (reply as premise, likeliest label), mean over replies."
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return Consistency(scores, {"persona_consistency": definition}, versions)


def check_nli(model: str) -> None:
    """Says before the work whether `persona_consistency` could run with `model`; a hub id is not looked up.

    Raises:
        UserError: torch is missing, or there is no such folder or package.
    """
    _torch()
    _find(model)


@dataclass(frozen=True)
class _Classifier:
    name: str
    tokenizer: Any
    model: Any
    worths: np.ndarray  # of each label

    def worth(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        torch, found = _torch(), []
        for start in range(0, len(pairs), _BATCH):
            premises, hypotheses = zip(*pairs[start : start + _BATCH], strict=True)
            inputs = self.tokenizer(
                list(premises), list(hypotheses), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                labels = self.model(**inputs).logits.argmax(dim=-1)
            found += self.worths[labels.numpy()].tolist()
        return found


@functools.lru_cache(maxsize=1)
def _classifier(model: str) -> _Classifier:
    _torch()
    path, name = _find(model)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        network = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False).eval()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the classifier of entailment {model!r} cannot be loaded: {reason}") from error
    labels = [network.config.id2label[i] for i in range(network.config.num_labels)]
    beginnings = [next((b for b in _BEGINNINGS if label.lower().startswith(b)), label) for label in labels]
    if sorted(beginnings) != sorted(_BEGINNINGS):
        raise UserError(
            f"the classifier {model!r} has the labels {', '.join(labels)}; allowed: three whose names begin with "
            f"{', '.join(_BEGINNINGS)}"
        )
    return _Classifier(name, tokenizer, network, np.asarray([_WORTH[b] for b in beginnings]))


def _find(model: str) -> tuple[str, str]:
    source = local_model("the classifier of entailment", model)
    if source is None:
        return model, model
    return str(source.path), f"{model} {source.revision}".strip()


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"the score of entailment needs torch, which cannot be imported here ({error}); "
            "'pip install \"spt_jax[eval]\"' installs it"
        ) from error
