"""Results that are already there: the answer to the same question need not be computed twice."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import spt_jax
from spt_jax.config import Config
from spt_jax.data.dialogue import Dialogue
from spt_jax.errors import UserError
from spt_jax.json_text import is_text, json_object
from spt_jax.models.loading import OpenedLM

_OF_FIGURES = ("metrics", "bertscore", "bertscore_layers", "nli", "samples")
"""Options of the section evaluation that choose figures and what is shown."""


class Question(NamedTuple):
    """What an evaluation is asked, as hashes.

    Attributes:
        whole: A sha256 of everything that its results follow from.
        groundwork: The same of what each turn's likelihoods, reply and scores of candidates follow from, which take the
            time: not which figures are computed of them, and for which columns.
    """

    whole: str
    groundwork: str


def question(
    config: Config,
    checkpoint: Mapping[str, Any],
    lm: OpenedLM,
    dialogues: Sequence[Dialogue],
    baselines: bool,
    replies: int | None,
    demonstrations: Sequence[Dialogue] = (),
) -> Question:
    """What the results of an evaluation follow from.

    Args:
        config: The run's configuration.
        checkpoint: The JSON values beside the checkpoint, with the digests of its arrays and of the LM's weights.
        lm: What else the LM and its tokenizer are: their files may have been mended since.
        dialogues: What it is measured on.
        baselines: Whether the LM without a prompt and the bank before training are measured too.
        replies: The number of replies asked for; None for the configuration's.
        demonstrations: What few-shot prompting shows before the contexts.
    """
    parts = {
        "version": spt_jax.__version__,
        "config": config.to_dict(),
        "trainable": checkpoint["digests"]["trainable"],
        "lm": checkpoint["lm"],
        "decoder": repr(lm.config),
        "tokenizer": [lm.tokenizer.content_digest, list(lm.tokenizer.stop_ids)],
        "dialogues": [dialogue.told for dialogue in dialogues],
        "baselines": baselines,
        "replies": replies,
    }
    if demonstrations:  # without them the question is what it was before they were part of it
        parts["demonstrations"] = [dialogue.told for dialogue in demonstrations]
    evaluation = {name: value for name, value in config.evaluation.items() if name not in _OF_FIGURES}
    groundwork = parts | {
        "baselines": None,
        "config": parts["config"] | {"evaluation": evaluation, "tracking": None},
        "jax": importlib.metadata.version("jax"),
    }
    return Question(_sha256(parts), _sha256(groundwork))


def _sha256(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def kept_results(workdir: Path, asked: str) -> dict[str, Any] | None:
    """``results.json`` when it and its companions answer the question `asked`; else None.

    Results that lack a figure which was asked for do not: what was missing on the machine may be there now.
    """
    if not all((workdir / name).is_file() for name in ("results.json", "predictions.jsonl", "report.html")):
        return None
    try:
        results = json_object(workdir / "results.json")
    except UserError:
        return None
    if results.get("notes") or results.get("question") != asked:
        return None
    return results if _is_whole(results) else None


def _is_whole(results: Mapping[str, Any]) -> bool:
    """Whether results are, in what is shown of them, as they were written."""
    columns, samples = results.get("columns"), results.get("samples")
    return (
        all(type(results.get(count)) is int for count in ("turns", "replies"))
        and isinstance(results.get("settings", {}), dict)
        and isinstance(columns, dict)
        and all(isinstance(column, dict) for column in columns.values())
        and isinstance(samples, list)
        and all(isinstance(sample, dict) and _can_be_shown(sample) for sample in samples)
    )


def _can_be_shown(sample: Mapping[str, Any]) -> bool:
    texts = [sample.get(name) for name in ("persona", "history", "replies")]
    if not all(isinstance(part, list) and all(map(is_text, part)) for part in texts):
        return False
    selected = sample.get("selected")
    return bool(sample["history"]) and type(selected) is int and 0 <= selected < len(sample["replies"])
