"""What is left when a sweep ends: ``best.py``, ``trials.json`` and ``report.html``."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from spt_jax.atomic_file import write_atomically
from spt_jax.evaluation.charts import Series, line_chart
from spt_jax.evaluation.report_page import details, page, section, wide_figure
from spt_jax.sweeps.config_file import config_file
from spt_jax.sweeps.description import Sweep, trial_config
from spt_jax.sweeps.pictures import coordinates_width, importance_chart, parallel_coordinates
from spt_jax.sweeps.worker import ERROR, Workplace
from spt_jax.training.absolute_paths import absolute_paths

_LEAST_FOR_IMPORTANCE = 4
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def write_results(at: Workplace) -> FrozenTrial | None:
    """Writes the files into the sweep's folder, from what is complete by now; returns the best trial.

    Returns:
        None, and no ``best.py``, while no trial is complete.

    Raises:
        UserError: A file cannot be written.
    """
    trials = at.trials()
    best = best_trial(trials, at.sweep)
    if best is not None:
        write_atomically(at.folder / "best.py", best_config_file(at, best))
    rows = [
        {"trial": t.number, "state": t.state.name, "value": _finite(t)}
        | {"params": t.params, "error": t.user_attrs.get(ERROR)}
        for t in trials
    ]
    write_atomically(at.folder / "trials.json", json.dumps(rows, indent=2) + "\n")
    write_atomically(at.folder / "report.html", report(at, trials, best))
    return best


def best_trial(trials: Sequence[FrozenTrial], sweep: Sweep) -> FrozenTrial | None:
    """The complete trial with the best objective, of equals the first; None if there is none."""
    sign = 1.0 if sweep.objective.direction == "minimize" else -1.0
    complete = [trial for trial in trials if _complete(trial)]
    return min(complete, key=lambda trial: (sign * _value(trial), trial.number), default=None)


def best_config_file(at: Workplace, best: FrozenTrial) -> str:
    """A config file that gives exactly the configuration which the best trial's first seed was trained with."""
    config = trial_config(at.base, best.params, at.sweep.seeds[0])
    absolute_paths(config)
    value = f"{at.sweep.objective.metric} {_value(best):.6g}"
    return config_file(config, f"Trial {best.number}, the best of the sweep {at.study.study_name}: {value}.")


def report(at: Workplace, trials: Sequence[FrozenTrial], best: FrozenTrial | None) -> str:
    """The page: the best trial, the pictures, every trial."""
    sweep, metric = at.sweep, at.sweep.objective.metric
    complete = [trial for trial in trials if _complete(trial)]
    drawn = [(trial.number, trial.params, _value(trial)) for trial in complete]
    minimize = sweep.objective.direction == "minimize"
    picture = parallel_coordinates(sweep.space, drawn, metric, minimize=minimize)
    states = [_STATES[trial.state] for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    header = (
        f"<header><h1>Sweep {html.escape(at.study.study_name)}</h1><p class='muted'>{html.escape(counts)}</p></header>"
    )
    body = [header, *_tiles(best, sweep)]
    note = "A line is a trial, the darker the better; the best is in another colour. Hover for its values."
    body.append(
        section(
            "Where the good ones lie", wide_figure(picture, coordinates_width(len(sweep.space)), "Trials"), note=note
        )
    )
    body.append(_importance_section(at, complete))
    body.append(section("As the sweep went", f"<figure>{_history(complete, minimize, metric)}</figure>"))
    body.append(section("Trials", _table(trials, sweep)))
    if best is not None:
        body.append(
            section(
                "The best configuration", details("best.py", f"<pre>{html.escape(best_config_file(at, best))}</pre>")
            )
        )
    return page(f"Sweep {at.study.study_name}", body)


def _complete(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE


def _value(trial: FrozenTrial) -> float:
    return math.nan if trial.value is None else trial.value


def _finite(trial: FrozenTrial) -> float | None:
    """The value of a complete trial; None for infinity too, which is no number of JSON."""
    return _value(trial) if _complete(trial) and math.isfinite(_value(trial)) else None


def _tiles(best: FrozenTrial | None, sweep: Sweep) -> list[str]:
    if best is None:
        return [section("No trial is complete", note="The tables below say how far each has come.")]
    tiles = [(f"{_value(best):.5g}", f"{sweep.objective.metric} of the best, trial {best.number}")]
    tiles += [(_shown(best.params[name]), name) for name in sweep.space]
    kinds = ["tile lead", *["tile"] * len(sweep.space)]
    boxes = [
        f'<div class="{kind}"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for kind, (value, name) in zip(kinds, tiles, strict=True)
    ]
    return [f'<div class="tiles">{"".join(boxes)}</div>']


def _importance_section(at: Workplace, complete: Sequence[FrozenTrial]) -> str:
    title = "What matters"
    finite = [trial for trial in complete if math.isfinite(_value(trial))]
    if len(at.sweep.space) < 2 or len(finite) < _LEAST_FOR_IMPORTANCE:
        note = f"Importances need two options or more and {_LEAST_FOR_IMPORTANCE} complete trials."
        return section(title, note=note)
    note = "By Optuna's PED-ANOVA: what tells the better trials from all, as shares. Few trials say little."
    return section(title, f"<figure>{importance_chart(importances(at.sweep, finite))}</figure>", note=note)


def importances(sweep: Sweep, trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Optuna's importances of the options over complete trials with finite values; they add up to 1."""
    study = optuna.create_study(direction=sweep.objective.direction)
    study.add_trials(trials)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(sweep.space))
    return {name: float(share) for name, share in found.items()}


def _history(complete: Sequence[FrozenTrial], minimize: bool, metric: str) -> str:
    numbers = [trial.number for trial in complete]
    values = [_value(trial) for trial in complete]
    best = np.minimum.accumulate(values) if minimize else np.maximum.accumulate(values)
    series = [Series("each", numbers, values), Series("best", numbers, [float(value) for value in best])]
    return line_chart(metric, series, x_label="trial", smoothed=False)


def _table(trials: Sequence[FrozenTrial], sweep: Sweep) -> str:
    sign = 1.0 if sweep.objective.direction == "minimize" else -1.0
    ordered = sorted(trials, key=lambda t: (not _complete(t), sign * _value(t) if _complete(t) else 0.0, t.number))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", sweep.objective.metric, *sweep.space, "state"))
    rows = []
    for trial in ordered:
        cells: list[Any] = [_value(trial) if _complete(trial) else None, *(trial.params.get(n) for n in sweep.space)]
        state, error = _STATES[trial.state], trial.user_attrs.get(ERROR)
        if error and not _complete(trial):
            state += f": {error}" if trial.state == TrialState.FAIL else f", failed before: {error}"
        shown = "".join(f"<td>{html.escape(_shown(cell))}</td>" for cell in cells)
        rows.append(f"<tr><th>{trial.number}</th>{shown}<td>{html.escape(state)}</td></tr>")
    table = f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Trials">{table}</div>'


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def results_of(folder: Path) -> list[Path]:
    """The files that `write_results` has written."""
    return [folder / name for name in ("best.py", "report.html", "trials.json") if (folder / name).exists()]
