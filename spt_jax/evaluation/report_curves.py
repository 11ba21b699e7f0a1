"""The report's curves: loss terms, the development split, selection over time, and how the run went."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.evaluation.charts import Series, line_chart
from spt_jax.evaluation.report_page import section

_TERMS = {
    "loss/total": "Total loss",
    "loss/lm": "LM loss",
    "loss/selection": "Selection loss",
    "loss/contrastive": "Contrastive loss",
    "loss/fusion": "Fusion loss",
}
_DEVELOPMENT = {
    "development/perplexity": "Perplexity of the selected prompt",
    "development/oracle_perplexity": "Best prompt in hindsight",
}
_COURSE = {
    "learning_rate": "Learning rate",
    "gradient_norm/bank": "Gradient norm: bank",
    "gradient_norm/retriever": "Gradient norm: retriever",
    "tokens_per_second": "Tokens per second",
}


def curve_sections(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sections with curves that `metrics` has values for, as markup.

    Args:
      metrics: Rows of metrics.jsonl; any name may be absent from any row, rows without ``step`` are left out.
    """
    sections = []
    for title, names, note in (
        (
            "Loss terms",
            _TERMS,
            "The terms before their weights, the total with them; faint: every logged step, solid: moving average.",
        ),
        ("Development split", _DEVELOPMENT, "Dialogues that share no persona with the training dialogues."),
    ):
        charts = [
            line_chart(label, [series], first_color=index)
            for index, (key, label) in enumerate(names.items())
            if (series := column(metrics, key)).x
        ]
        sections += [_grid(title, charts, note)] if charts else []
    sections += _selection_over_time(metrics)
    charts = [
        line_chart(label, [series], smoothed=key != "learning_rate", first_color=5)
        for key, label in _COURSE.items()
        if (series := column(metrics, key)).x
    ]
    return sections + ([_grid("The run", charts)] if charts else [])


def column(metrics: Sequence[Mapping[str, Any]], key: str) -> Series:
    """The finite values logged under `key` and their steps, in the order of steps; a repeated step's last row wins."""
    points = {}
    for row in metrics:
        step, value = row.get("step"), row.get(key)
        if _is_number(step) and _is_number(value):
            points[float(step)] = float(value)  # pyright: ignore[reportArgumentType]
    steps = sorted(points)
    return Series(key, steps, [points[step] for step in steps])


def _selection_over_time(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    prompts = sorted(
        {int(match[1]) for row in metrics for key in row if (match := re.fullmatch(r"usage/([0-9]{1,6})", key))}
    )
    shares = [column(metrics, f"usage/{prompt}") for prompt in prompts]
    series = [
        Series(f"prompt {prompt}", share.x, share.y) for prompt, share in zip(prompts, shares, strict=True) if share.x
    ]
    charts = []
    if series:
        largest = max(value for entry in series for value in entry.y if value is not None)
        bounds = (0.0, min(1.0, max(1.15 * largest, 0.1)))
        charts.append(line_chart("Share of turns each prompt is selected for", series, bounds=bounds, percent=True))
    entropy = column(metrics, "selection_entropy")
    if entropy.x:
        charts.append(line_chart("Selection entropy (nats)", [entropy], first_color=3))
    note = "A share that stays at 0 is a prompt out of use; an entropy of 0 is one prompt for everything."
    return [_grid("Selection while training", charts, note)] if charts else []


def _grid(title: str, charts: Sequence[str], note: str = "") -> str:
    return section(
        title, f'<div class="charts">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>', note=note
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
