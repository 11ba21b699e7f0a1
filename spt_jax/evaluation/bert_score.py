"""BERTScore (arXiv 1904.09675) of replies against references, by the library bert-score with any encoder.

The library is an extra, for it brings torch: nothing of it is imported before a score is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.evaluation.torch_models import local_model
from spt_jax.json_text import json_object

PAPERS_MODEL = "microsoft/deberta-xlarge-mnli"
_BATCH = 64
_NO_LIMIT = 10**9
"""Tokens; transformers' word for none is larger."""


@dataclass(frozen=True)
class BertScores:
    """BERTScore of N pairs.

    Attributes:
        precision: float64 ``[N]``, a fraction: how well the reply's tokens are found in the reference.
        recall: float64 ``[N]``, how well the reference's tokens are found in the reply.
        f1: float64 ``[N]``, their harmonic mean.
        definitions: ``bert_p``, ``bert_r`` and ``bert_f1`` -> one sentence with encoder and layer.
        versions: Library -> version.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    definitions: dict[str, str]
    versions: dict[str, str]

    def per_pair(self) -> list[tuple[float, float, float]]:
        """(precision, recall, F1) of every pair, as fractions."""
        columns = (self.precision.tolist(), self.recall.tolist(), self.f1.tolist())
        return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class Encoder:
    """An encoder that bert-score can load.

    Attributes:
        model_type: The folder or the hub id.
        layer: Number of layers used; the hidden states behind the last of them are compared.
        name: The source as the user wrote it, with an installed package's version.
    """

    model_type: str
    layer: int
    name: str


def bert_scores(
    predictions: Sequence[str], references: Sequence[str], model: str = PAPERS_MODEL, *, num_layers: int = 0
) -> BertScores:
    """Scores each prediction against the reference of the same place; without idf weights, not rescaled.

    Args:
        predictions: N replies; one without a word scores 0 and is counted.
        references: The N responses of the same turns.
        model: The encoder: a folder in Hugging Face's format, ``package:NAME`` for the folder inside an installed
            distribution, or a hub id (the paper's is `PAPERS_MODEL`).
        num_layers: Layers used; see `find_encoder`.

    Raises:
        UserError: The library is missing, or the encoder cannot be loaded.
    """
    if len(predictions) != len(references):
        raise UserError(
            f"BERTScore needs one reference a prediction: there are {len(predictions)} predictions and "
            f"{len(references)} references"
        )
    library = _library()
    encoder = find_encoder(model, num_layers)
    scored = [i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(map(str.strip, pair))]
    scores = np.zeros((3, len(predictions)))
    if scored:
        scorer = _scorer(library, encoder.model_type, encoder.layer)
        found = scorer.score([predictions[i] for i in scored], [references[i] for i in scored], batch_size=_BATCH)
        # Characters that an encoder drops (control marks, say) leave a text without tokens: 0 / 0.
        scores[:, scored] = np.nan_to_num(np.asarray([part.double().numpy() for part in found]))
    versions = {name: importlib.metadata.version(name) for name in ("bert-score", "torch", "transformers")}
    how = (
        f"by bert-score {versions['bert-score']} with {encoder.name}, layer {encoder.layer}, no idf, not rescaled, "
        "mean over pairs, percent; a pair without a word on either side scores 0"
    )
    definitions = {
        "bert_p": f"BERTScore precision {how}.",
        "bert_r": f"BERTScore recall {how}.",
        "bert_f1": f"BERTScore F1 {how}.",
    }
    return BertScores(scores[0], scores[1], scores[2], definitions, versions)


def check_bert_score(model: str, num_layers: int = 0) -> None:
    """Says before the work whether `bert_scores` could run with the encoder `model` and so many of its layers.

    A hub id is not looked up, but for the number of layers of one that bert-score does not know; whether it has as many
    as are asked for is seen when it is loaded.

    Raises:
        UserError: The library is missing, there is no such folder or package, or it has fewer layers.
    """
    _library()
    find_encoder(model, num_layers)


def find_encoder(model: str, num_layers: int = 0) -> Encoder:
    """The encoder that `bert_scores` would use.

    Args:
        model: As there.
        num_layers: Layers used; 0 for bert-score's own choice for a model it knows, by its hub id or by the name of
            the folder that holds a copy of it, else for all of them.

    Raises:
        UserError: There is no such encoder, it has fewer layers than asked for, or their number is not known.
    """
    source = local_model("BERTScore's encoder", model)
    known: dict[str, int] = importlib.import_module("bert_score.utils").model2layers
    if source is None:
        layers = num_layers or known.get(model) or _layers_of_hub_model(model)
        return Encoder(model, layers, model)
    try:
        config = json_object(source.path / "config.json")
        most = int(config.get("num_hidden_layers") or config.get("n_layers") or config["num_layers"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # a UserError is a ValueError
        raise UserError(
            f"{source.path / 'config.json'} does not say how many layers BERTScore's encoder has"
        ) from error
    if not 0 <= num_layers <= most:
        raise UserError(
            f"BERTScore was asked for {num_layers} layers; allowed: 1 to {most}, those of the encoder {model!r}, or 0"
        )
    best = {name.rpartition("/")[2]: layers for name, layers in known.items()}.get(source.path.name, most)
    return Encoder(str(source.path), num_layers or min(best, most) or most, f"{model} {source.revision}".strip())


def _layers_of_hub_model(model: str) -> int:
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model, trust_remote_code=False).num_hidden_layers)
    except Exception as error:
        raise _cannot_load(model, error) from error


def _library() -> Any:
    try:
        return importlib.import_module("bert_score")
    except ImportError as error:
        raise UserError(
            "BERTScore needs the library bert-score, which cannot be imported here "
            f"({error}); 'pip install \"spt_jax[eval]\"' installs it"
        ) from error


@functools.lru_cache(maxsize=1)
def _scorer(library: Any, model_type: str, layer: int) -> Any:
    try:
        # Loading prints a bar for every encoder.
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            scorer = library.BERTScorer(model_type=model_type, num_layers=layer)
    except Exception as error:
        raise _cannot_load(model_type, error) from error
    # A tokenizer whose files name no limit, as DeBERTa's, has one that no integer of its own code can hold.
    tokenizer = scorer._tokenizer
    if tokenizer.model_max_length > _NO_LIMIT:
        tokenizer.model_max_length = getattr(scorer._model.config, "max_position_embeddings", None) or _NO_LIMIT
    return scorer


def _cannot_load(model: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"BERTScore's encoder {model!r} cannot be loaded: {reason}")
