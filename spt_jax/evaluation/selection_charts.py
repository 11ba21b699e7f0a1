"""Pictures of which prompt serves what: the prompt-by-dialogue heat map and bars of each prompt's share."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence

from spt_jax.errors import UserError
from spt_jax.evaluation.svg import (
    GRID,
    HEAT,
    MUTED,
    ON_HEAT,
    TEXT,
    element,
    figure,
    label,
    series_color,
    text_width,
)

_ROW = 30.0
_LEFT = 78.0
_TOP = 34.0
_LEGEND_STEPS = 5
_NAME = 6  # characters of a column's


def heat_map_width(columns: int) -> float:
    """Pixels of a heat map with so many columns, at full size."""
    return max(_LEFT + _cell_width(columns) * columns + 4, 460.0)


def _cell_width(columns: int) -> float:
    return min(38.0, max(9.0, 860.0 / max(1, columns)))


def heat_map(
    title: str,
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    *,
    bounds: tuple[float, float],
    legend: str,
    percent: bool = False,
    marks: Collection[tuple[int, int]] = (),
    mark_legend: str = "",
    of: str = "dialogues",
) -> str:
    """Rows of prompts, columns of dialogues or others, values as depths of one colour; a cell tells its own on hover.

    Args:
      title: Stands above the chart and names it to a screen reader.
      values: [K, columns], NaN for unknown.
      columns: Name of each column.
      bounds: Values of the palest and of the deepest colour.
      legend: What the colour means.
      percent: Show values in [0, 1] as percentages.
      marks: (row, column) of cells that carry a dot.
      mark_legend: What the dot means.
      of: What a column is one of.

    Raises:
      UserError: A row's length is not the number of columns.
    """
    for index, row in enumerate(values):
        if len(row) != len(columns):
            raise UserError(f"Row {index} of the heat map {title!r} has {len(row)} values for {len(columns)} columns.")
    cell, width = _cell_width(len(columns)), heat_map_width(len(columns))
    base = _TOP + _ROW * len(values)
    parts = [label(0, 16, title, size=14, fill=TEXT, font_weight="600")]
    for row, line in enumerate(values):
        middle = _TOP + _ROW * row + _ROW / 2
        parts.append(element("rect", x=0, y=middle - 5, width=10, height=10, rx=2, fill=series_color(row)))
        parts.append(label(16, middle + 4, f"prompt {row}", fill=TEXT))
        for column, value in enumerate(line):
            tooltip = f"{columns[column]} · prompt {row}: {_shown(value, percent)}"
            dot = (row, column) in marks
            if dot and mark_legend:
                tooltip += f" · {mark_legend}"
            x, y = _LEFT + cell * column, _TOP + _ROW * row
            parts.append(_cell(x, y, cell, _depth(value, bounds), _shown(value, percent, short=True), tooltip, dot))
    # One name in every so many: two that overlap tell nothing.
    longest = min(_NAME, max(map(len, columns), default=0))
    every = max(1, math.ceil(max(28.0, 4.0 + 6.0 * longest) / cell))
    for column in range(0, len(columns), every):
        x = _LEFT + cell * (column + 0.5)
        parts.append(label(x, base + 14, _ellipsis(columns[column], _NAME), size=10, text_anchor="middle"))
    parts.append(_legend(_LEFT, base + 28, legend, _shown(bounds[0], percent), _shown(bounds[1], percent), mark_legend))
    description = f"Rows are {len(values)} prompts, columns {len(columns)} {of}. Colour: {legend}."
    return figure(width, base + (64 if mark_legend else 46), title, description, *parts)


def usage_bars(title: str, usage: Mapping[str, Sequence[float]]) -> str:
    """One bar a prompt for each model: the share of turns that select it. The last model's bars carry the colour.

    Args:
      title: Stands above the chart and names it to a screen reader.
      usage: Model -> K shares in [0, 1]; the same K for all.

    Raises:
      UserError: There is no model, or they differ in K.
    """
    sizes = {len(shares) for shares in usage.values()}
    if len(sizes) != 1:
        raise UserError(f"Every model's usage has one share a prompt; the numbers of shares are {sorted(sizes)}.")
    thick, thin, gap, width = 18.0, 9.0, 14.0, 440.0
    full = width - _LEFT - 150
    group = thick + (thin + 3) * (len(usage) - 1) + gap
    names = list(usage)
    parts = [label(0, 16, title, size=14, fill=TEXT, font_weight="600")]
    for prompt in range(sizes.pop()):
        y = _TOP + group * prompt
        parts.append(label(0, y + thick / 2 + 4, f"prompt {prompt}", fill=TEXT))
        for name in reversed(names):
            share = usage[name][prompt]
            main = name == names[-1]
            height = thick if main else thin
            fill = series_color(prompt) if main else GRID
            length = max(full * min(max(share, 0.0), 1.0), 1.0)
            parts.append(element("rect", x=_LEFT, y=y, width=length, height=height, rx=2, fill=fill))
            text = f"{100 * share:.0f} %" + (f" {name}" if len(names) > 1 and (not main or prompt == 0) else "")
            size = 12 if main else 10
            parts.append(label(_LEFT + length + 6, y + height / 2 + 4, text, size=size, fill=TEXT if main else MUTED))
            y += height + 3
    description = " ".join(
        f"{name}: " + ", ".join(f"prompt {k} {100 * share:.0f} %" for k, share in enumerate(shares)) + "."
        for name, shares in usage.items()
    )
    height = _TOP + group * len(usage[names[0]])
    return figure(width, height, title, description, *parts)


def _cell(x: float, y: float, size: float, depth: float | None, text: str, tooltip: str, dot: bool) -> str:
    box = {"x": x + 0.75, "y": y + 0.75, "width": size - 1.5, "height": _ROW - 1.5, "rx": 2}
    parts = [element("title", html.escape(tooltip)), element("rect", fill=GRID, fill_opacity=0.6, **box)]
    if depth is not None:
        parts.append(element("rect", fill=HEAT, fill_opacity=depth, **box))
    ink = ON_HEAT if depth is not None and depth > 0.55 else TEXT
    if size >= 26:
        parts.append(label(x + size / 2, y + _ROW / 2 + 4, text, size=10.5, fill=ink, text_anchor="middle"))
    if dot:
        parts.append(element("circle", cx=x + size - 5 if size >= 14 else x + size / 2, cy=y + 6, r=2.4, fill=ink))
    return element("g", *parts)


def _legend(x: float, y: float, text: str, low: str, high: str, mark_legend: str) -> str:
    left, parts = x, [label(x, y + 10, low, size=11)]
    x += text_width(low, 11) + 6
    for step in range(_LEGEND_STEPS):
        box = {"x": x + 16 * step, "y": y, "width": 15, "height": 12}
        parts.append(element("rect", fill=GRID, fill_opacity=0.6, **box))
        parts.append(element("rect", fill=HEAT, fill_opacity=step / (_LEGEND_STEPS - 1), **box))
    x += 16 * _LEGEND_STEPS + 6
    parts.append(label(x, y + 10, f"{high} · {text}", size=11))
    if mark_legend:
        # On a line of its own, so that both are whole on a narrow page.
        parts.append(element("circle", cx=left + 3, cy=y + 24, r=2.6, fill=TEXT))
        parts.append(label(left + 11, y + 28, mark_legend, size=11))
    return element("g", *parts)


def _depth(value: float, bounds: tuple[float, float]) -> float | None:
    if not math.isfinite(value):
        return None
    low, high = bounds
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0


def _shown(value: float, percent: bool, short: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.0f}" + ("" if short else " %")
    return f"{value:.2f}" if short else f"{value:.3g}"


def _ellipsis(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
