"""The objective's values, read from what a run writes into its working directory."""

from __future__ import annotations

import math
from pathlib import Path

from spt_jax.errors import UserError, nearest
from spt_jax.json_text import is_number, json_object
from spt_jax.sweeps.description import Objective
from spt_jax.training.tracking import METRICS_FILE, logged_rows


def logged_values(workdir: Path, objective: Objective) -> list[tuple[int, float]]:
    """``(step, value)`` of each row of metrics.jsonl that has the objective's metric, one a step.

    A value that was not finite is the worst there is. A row that is being written is left for later.

    Raises:
        UserError: The file cannot be read.
    """
    worst = math.inf if objective.direction == "minimize" else -math.inf
    values: dict[int, float] = {}
    for row in logged_rows(workdir / METRICS_FILE):
        if objective.metric in row:
            value = row[objective.metric]
            values[row["step"]] = worst if value is None else float(value)
    return sorted(values.items())


def final_value(workdir: Path, objective: Objective) -> float:
    """What a finished run is worth.

    Raises:
        UserError: The metric is not where the objective says.
    """
    if objective.file == "results.json":
        return _evaluated(workdir, objective)
    values = [value for _, value in logged_values(workdir, objective)]
    if not values:
        raise UserError(
            f"{workdir / METRICS_FILE} has no {objective.metric!r}.{nearest(objective.metric, _names(workdir))}"
        )
    if objective.take == "last":
        return values[-1]
    return min(values) if objective.direction == "minimize" else max(values)


def _names(workdir: Path) -> set[str]:
    return {name for row in logged_rows(workdir / METRICS_FILE) for name in row}


def _evaluated(workdir: Path, objective: Objective) -> float:
    from spt_jax.evaluation.evaluated_runs import MEASURED  # with scipy, which no other objective needs

    path = workdir / "results.json"
    try:
        figures = dict(json_object(path)["columns"][MEASURED])
    except (ValueError, KeyError, TypeError) as error:  # a UserError is a ValueError
        raise UserError(f"{path} has no figures of the column {MEASURED!r}") from error
    value = figures.get(objective.metric)
    if not is_number(value):
        numbers = [name for name, figure in figures.items() if is_number(figure)]
        raise UserError(f"{path} has no number under {objective.metric!r}.{nearest(objective.metric, numbers)}")
    return float(value)
