"""What evaluations left in working directories, read back to be compared, and which runs are seeds of one another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.evaluation.evaluation_files import predictions_of, results_of, selected_nll, settings_of
from spt_jax.evaluation.resampling import KEPT
from spt_jax.json_text import is_number
from spt_jax.user_paths import present

MEASURED = "after training"
CHECKPOINT = "evaluation.checkpoint"
"""What `EvaluatedRun.settings` calls the checkpoint that an evaluation was asked for; older results do not tell it."""


@dataclass(frozen=True)
class EvaluatedRun:
    """The replies of one run, U of them, by dialogue and turn.

    Attributes:
        name: Its working directory as the user wrote it.
        settings: Its configuration, flat, as it was evaluated, with the identities of LM and tokenizer and, where the
            results tell it, `CHECKPOINT`; without seed and tracking.
        seed: The configuration's seed.
        dialogue: int ``[U]``, number of the dialogue.
        turn: int ``[U]``, number of the turn in it.
        references: U responses of the data.
        predictions: U replies of the run.
        nll: float64 ``[U]``, mean nats a target token under the selected prompt; None where the record lacks it.
        target_tokens: int64 ``[U]``, end-of-sequence included; None where the record lacks them.
        bert_score: float64 ``[U, 3]``, precision, recall and F1 as fractions; None where evaluation did not ask for it.
        personas: U personas, each its lines; None where the record lacks them.
        histories: U lists of utterances, the user's last; None where the record lacks them.
        kept: Names of `spt_jax.evaluation.resampling.KEPT` to what evaluation kept for each reply, float64 ``[U]``;
            those that every reply has.
        results: ``results.json``.
    """

    name: str
    settings: dict[str, Any]
    seed: int
    dialogue: np.ndarray
    turn: np.ndarray
    references: list[str]
    predictions: list[str]
    nll: np.ndarray | None
    target_tokens: np.ndarray | None
    bert_score: np.ndarray | None
    personas: list[list[str]] | None
    histories: list[list[str]] | None
    kept: dict[str, np.ndarray]
    results: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that its evaluation wrote for the trained model."""
        columns = self.results.get("columns") or {}
        return columns.get(MEASURED) or next(reversed(columns.values()), {})


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed alone: one row of a comparison."""

    label: str
    runs: tuple[EvaluatedRun, ...]


def read_run(name: str, folder: Path | None = None) -> EvaluatedRun:
    """The evaluation in the working directory `name`.

    Args:
        name: What the user calls it.
        folder: Where it lies; None for `name` itself.

    Raises:
        UserError: It is not a run, has not been evaluated, or a file (with its line) cannot be read.
    """
    workdir = folder or Path(name)
    if not (present(workdir / "config.json", "the run") and (workdir / "config.json").is_file()):
        raise UserError(f"{name} is not the working directory of a run: it has no config.json")
    if not all((workdir / file).is_file() for file in ("results.json", "predictions.jsonl")):
        raise UserError(f"{name} has not been evaluated; run: spt-jax evaluate --workdir={name}")
    settings, seed = settings_of(workdir / "config.json")
    results = results_of(workdir / "results.json")
    rows = predictions_of(workdir / "predictions.jsonl")
    if results.get("replies", len(rows)) != len(rows):
        raise UserError(
            f"{workdir / 'predictions.jsonl'} holds {len(rows)} replies, but results.json speaks of "
            f"{results['replies']}; run again: spt-jax evaluate --workdir={name}"
        )
    nll = [selected_nll(row) for row in rows]
    tokens = [row.get("target_tokens") for row in rows]
    bert = [row.get("bert_score") for row in rows]
    asked = {CHECKPOINT: results["checkpoint"]} if "checkpoint" in results else {}
    scored = all(isinstance(value, list) and len(value) == 3 and all(map(is_number, value)) for value in bert)
    return EvaluatedRun(
        name=name,
        settings=settings | results["settings"] | asked,
        seed=seed,
        dialogue=np.asarray([row["dialogue"] for row in rows]),
        turn=np.asarray([row["turn"] for row in rows]),
        references=[row["reference"] for row in rows],
        predictions=[row["prediction"] for row in rows],
        nll=None if None in nll else np.asarray(nll, np.float64),
        target_tokens=None if None in tokens else np.asarray(tokens, np.int64),
        bert_score=np.asarray(bert, np.float64) if scored else None,
        personas=[row["persona"] for row in rows] if all(row.get("persona") is not None for row in rows) else None,
        histories=[row["history"] for row in rows] if all(row.get("history") is not None for row in rows) else None,
        kept={
            name: np.asarray([row[name] for row in rows], np.float64)
            for name in KEPT
            if all(isinstance(row.get(name), bool) or is_number(row.get(name)) for row in rows)
        },
        results=results,
    )


def group_by_seed(runs: Sequence[EvaluatedRun], *, group: bool = True) -> list[RunGroup]:
    """Rows of a comparison, in the order of their first runs: runs with equal settings and distinct seeds share one.

    Args:
        runs: In the user's order.
        group: False gives every run its own row.
    """
    found: list[list[EvaluatedRun]] = []
    for run in runs:
        for members in found if group else ():
            alike = all(_alike(member.settings, run.settings) for member in members)
            if alike and run.seed not in [member.seed for member in members]:
                members.append(run)
                break
        else:
            found.append([run])
    names = _short_names([run.name for run in runs])
    labels = [_label([names[run.name] for run in members]) for members in found]
    if len(set(labels)) < len(labels):
        labels = [members[0].name for members in found]
    return [RunGroup(label, tuple(members)) for label, members in zip(labels, found, strict=True)]


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether settings are equal; a checkpoint that one of them does not tell parts nothing."""
    untold = {CHECKPOINT} - (first.keys() & second.keys())
    return all(first.get(key, ...) == second.get(key, ...) for key in (first.keys() | second.keys()) - untold)


def differing_settings(groups: Sequence[RunGroup], section: str) -> dict[str, list[Any]]:
    """Options of a section (``"evaluation."``) whose values are not the same in every group -> one value a group.

    None stands for what no run of a group tells.
    """
    names = {key for group in groups for run in group.runs for key in run.settings if key.startswith(section)}
    values = {key: [_told(group, key) for group in groups] for key in sorted(names)}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _told(group: RunGroup, key: str) -> Any:
    return next((run.settings[key] for run in group.runs if key in run.settings), None)


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Last parts of the paths where they tell the runs apart, else the paths themselves."""
    last = [Path(name).resolve().name for name in names]
    return dict(zip(names, last if len(set(last)) == len(names) else names, strict=True))


def _label(names: Sequence[str]) -> str:
    """What the names of one group share (``spt-seed0``, ``spt-seed1`` -> ``spt``), else the first and a count."""
    if len(names) == 1:
        return names[0]
    shared = names[0]
    for name in names[1:]:
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, name, strict=False)) if a != b), len(name))]
    if any(name[len(shared) :][:1].isdigit() for name in names):
        shared = shared.rstrip("0123456789")  # seeds 10 and 11 share their first digit
    shared = re.sub(r"([-_./ ]s|[-_./ ]*seed)?[-_./ =]*$", "", shared)
    return shared or f"{names[0]} and {len(names) - 1} more"
