"""What evaluations left in working directories, read back to be compared, and which runs are seeds of one another."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.config import flatten
from spt_jax.errors import UserError
from spt_jax.evaluation.resampling import KEPT

MEASURED = "after training"
_BESIDE_THE_METHOD = ("seed", "tracking.")


@dataclass(frozen=True)
class EvaluatedRun:
    """The replies of one run, U of them, by dialogue and turn.

    Attributes:
        name: Its working directory as the user wrote it.
        settings: Its configuration, flat, with the identities of LM and tokenizer; without seed and tracking.
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
    if not (workdir / "config.json").is_file():
        raise UserError(f"{name} is not the working directory of a run: it has no config.json")
    if not all((workdir / file).is_file() for file in ("results.json", "predictions.jsonl")):
        raise UserError(f"{name} has not been evaluated; run: spt-jax evaluate --workdir={name}")
    record, results = _json(workdir / "config.json"), _json(workdir / "results.json")
    if not isinstance(record.get("config"), dict):
        raise UserError(f"{workdir / 'config.json'} cannot be read: it has no 'config'")
    flat = flatten(record["config"])
    settings = {key: value for key, value in flat.items() if not key.startswith(_BESIDE_THE_METHOD)}
    lm = record.get("lm")
    settings |= {"lm": lm.get("sha256") if isinstance(lm, dict) else lm, "tokenizer": record.get("tokenizer")}
    rows = _predictions(workdir / "predictions.jsonl")
    if results.get("replies", len(rows)) != len(rows):
        raise UserError(
            f"{workdir / 'predictions.jsonl'} holds {len(rows)} replies, but results.json speaks of "
            f"{results['replies']}; run again: spt-jax evaluate --workdir={name}"
        )
    selected_nll = [_selected_nll(row) for row in rows]
    tokens = [row.get("target_tokens") for row in rows]
    bert = [row.get("bert_score") for row in rows]
    complete = [isinstance(value, list) and len(value) == 3 for value in bert]
    return EvaluatedRun(
        name=name,
        settings=settings,
        seed=int(flat.get("seed", 0)),
        dialogue=np.asarray([row["dialogue"] for row in rows]),
        turn=np.asarray([row["turn"] for row in rows]),
        references=[row["reference"] for row in rows],
        predictions=[row["prediction"] for row in rows],
        nll=None if None in selected_nll else np.asarray(selected_nll, np.float64),
        target_tokens=None if None in tokens else np.asarray(tokens, np.int64),
        bert_score=np.asarray(bert, np.float64) if all(complete) else None,
        personas=[row["persona"] for row in rows] if all("persona" in row for row in rows) else None,
        histories=[row["history"] for row in rows] if all("history" in row for row in rows) else None,
        kept={
            name: np.asarray([row[name] for row in rows], np.float64)
            for name in KEPT
            if all(isinstance(row.get(name), int | float) for row in rows)
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
            if members[0].settings == run.settings and run.seed not in [member.seed for member in members]:
                members.append(run)
                break
        else:
            found.append([run])
    names = _short_names([run.name for run in runs])
    labels = [_label([names[run.name] for run in members]) for members in found]
    if len(set(labels)) < len(labels):
        labels = [members[0].name for members in found]
    return [RunGroup(label, tuple(members)) for label, members in zip(labels, found, strict=True)]


def turn_name(dialogue: int, turn: int) -> str:
    """A turn as a sentence names it."""
    return f"turn {turn} of dialogue {dialogue}"


def differing_settings(groups: Sequence[RunGroup], section: str) -> dict[str, list[Any]]:
    """Options of a section (``"evaluation."``) whose values are not the same in every group -> one value a group."""
    names = {key for group in groups for key in group.runs[0].settings if key.startswith(section)}
    values = {key: [group.runs[0].settings.get(key) for group in groups] for key in sorted(names)}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return value


def _predictions(path: Path) -> list[dict[str, Any]]:
    rows, places = [], {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
        for key, kind in (("dialogue", int), ("turn", int), ("reference", str), ("prediction", str)):
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                what = "a whole number" if kind is int else "a text"
                raise UserError(
                    f"{path}:{number} has no {key!r} that is {what}; each line is one reply as evaluate writes it"
                )
        place = (row["dialogue"], row["turn"])
        if place in places:
            raise UserError(f"{path}:{number} answers {turn_name(*place)} once more, after line {places[place]}")
        places[place] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no reply; run evaluate without --replies, or with more of them")
    return sorted(rows, key=lambda row: (row["dialogue"], row["turn"]))


def _selected_nll(row: dict[str, Any]) -> float | None:
    """Of the prompt that answered: the record keeps one figure a prompt, or one alone."""
    nll, selected = row.get("nll"), row.get("selected", 0)
    if isinstance(nll, list) and isinstance(selected, int) and 0 <= selected < len(nll):
        nll = nll[selected]
    return float(nll) if isinstance(nll, int | float) else None


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
    shared = re.sub(r"[-_./ ]*(seed|s)?[-_./ =]*$", "", shared)
    return shared or f"{names[0]} and {len(names) - 1} more"
