"""The report's selection part: which prompt serves which dialogue, how often, and how well it was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.errors import UserError
from spt_jax.evaluation.report_page import section, wide_figure
from spt_jax.evaluation.selection_charts import heat_map, heat_map_width, usage_bars
from spt_jax.evaluation.table import prompt_usage

_MOST_DIALOGUES = 96  # columns that can still be told apart


def selection_section(
    selection: Sequence[Mapping[str, Any]], columns: Mapping[str, Mapping[str, Any]], *, mixes: bool = False
) -> list[str]:
    """The section as markup in a list, empty where there is nothing to show.

    Dialogues stand in the order of the prompt they select most, so that a retriever that tells dialogues apart shows
    as a staircase; of more than 96, every so many-th is shown.

    Args:
      selection: As `ReportInputs.selection`.
      columns: As ``results["columns"]``, for the bars.
      mixes: Whether a mixture of the prompts answers, and not one of them.

    Raises:
      UserError: Lists over prompts differ in length K.
    """
    figures = []
    usage = {name: shares for name, column in columns.items() if (shares := prompt_usage(column))}
    if usage:
        bars = usage_bars("Share of turns by prompt", usage)
        figures.append(wide_figure(bars, 440, "Share of turns by prompt"))
    if selection:
        figures = _maps(selection) + figures
    answers = (
        "a mixture of all answers, by their scores, and a turn counts for the highest"
        if mixes
        else ("the highest score answers")
    )
    note = f"Every turn's context is compared with every prompt; {answers}. Numbers name dialogues."
    return [section("Which prompt serves what", *figures, note=note)] if figures else []


def _maps(selection: Sequence[Mapping[str, Any]]) -> list[str]:
    prompts = _number_of_prompts(selection)
    chosen = _sample(sorted(selection, key=lambda dialogue: _main_prompt(dialogue.get("usage"))), _MOST_DIALOGUES)
    names = [str(dialogue.get("dialogue", index)) for index, dialogue in enumerate(chosen)]
    width = heat_map_width(len(names))
    figures = []
    for key, title, legend in (
        ("usage", "Selection by dialogue", "share of the dialogue's turns"),
        ("scores", "Mean score by dialogue", "the retriever's, of context and prompt"),
    ):
        rows = _transposed(chosen, key, prompts)
        known = [value for row in rows for value in row if math.isfinite(value)]
        if not known:
            continue
        share = key == "usage"
        picture = heat_map(
            f"{title} (%)" if share else title,
            rows,
            names,
            bounds=(0.0, 1.0) if share else (min(known), max(known)),
            legend=legend,
            percent=share,
            marks=_lowest(_transposed(chosen, "nll", prompts)) if share else (),
            mark_legend="the dialogue's lowest nll" if share else "",
        )
        figures.append(wide_figure(picture, width, title))
    if len(chosen) < len(selection):
        figures.append(f'<p class="muted">{len(chosen)} of {len(selection)} dialogues, evenly chosen.</p>')
    return figures


def _number_of_prompts(selection: Sequence[Mapping[str, Any]]) -> int:
    sizes = {len(dialogue[key]) for dialogue in selection for key in ("usage", "scores", "nll") if dialogue.get(key)}
    if len(sizes) != 1:
        raise UserError(
            "Each dialogue of the selection has one usage, score and nll a prompt; their numbers are "
            f"{sorted(sizes) or 'none'}."
        )
    return sizes.pop()


def _transposed(dialogues: Sequence[Mapping[str, Any]], key: str, prompts: int) -> list[list[float]]:
    lists = [dialogue.get(key) or [math.nan] * prompts for dialogue in dialogues]
    return [[math.nan if values[k] is None else float(values[k]) for values in lists] for k in range(prompts)]


def _lowest(nll: Sequence[Sequence[float]]) -> set[tuple[int, int]]:
    marks = set()
    for column, values in enumerate(zip(*nll, strict=True)):
        finite = [(value, row) for row, value in enumerate(values) if math.isfinite(value)]
        if len(finite) > 1:
            marks.add((min(finite)[1], column))
    return marks


def _main_prompt(usage: Sequence[float] | None) -> tuple[int, float]:
    if not usage:
        return (1 << 30, 0.0)
    best = max(range(len(usage)), key=lambda k: (usage[k] or 0.0, -k))
    return (best, -(usage[best] or 0.0))


def _sample(items: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]
