"""A sweep's pictures: trials as lines over one axis an option, and how much each option matters."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from spt_jax.evaluation.svg import (
    GRID,
    HEAT,
    MUTED,
    TEXT,
    element,
    figure,
    label,
    series_color,
    text_width,
    tick_labels,
    ticks,
)

_HEIGHT, _TOP, _BOTTOM = 320.0, 64.0, 20.0
_AXIS_GAP, _SIDE = 150.0, 70.0


def coordinates_width(options: int) -> float:
    """The width in pixels of `parallel_coordinates` with so many options."""
    return 2 * _SIDE + _AXIS_GAP * options


def parallel_coordinates(
    space: Mapping[str, BaseDistribution],
    trials: Sequence[tuple[int, Mapping[str, Any], float]],
    objective: str,
    *,
    minimize: bool,
) -> str:
    """Each trial a line from option to option and to its value; the darker the better, the best in another colour.

    Args:
        space: The options and their distributions, an axis each.
        trials: ``(number, values by option, objective)``; those whose objective is not finite are left out.
        objective: Its name, the last axis.
        minimize: Whether small is good.
    """
    title = "Parallel coordinates"
    drawn = [trial for trial in trials if math.isfinite(trial[2])]
    heading = label(0, 16, title, size=14, fill=TEXT, font_weight="600")
    width = coordinates_width(len(space))
    if not drawn:
        empty = label(width / 2, _HEIGHT / 2, "no trial is complete", text_anchor="middle")
        return figure(width, _HEIGHT, title, "No trial is complete.", heading, empty)
    ordered = sorted(drawn, key=lambda trial: trial[2], reverse=minimize)
    values = [value for _, _, value in drawn]
    axes = [_option_axis(name, distribution, drawn) for name, distribution in space.items()]
    axes.append(_Axis(objective, *_range(values), False))
    parts = [heading]
    for rank, (number, params, value) in enumerate(ordered):
        heights = [
            axis.height(at)
            for axis, at in zip(axes, [*(params.get(name) for name in space), value], strict=True)
            if at is not None
        ]
        points = " ".join(f"{_SIDE + place * _AXIS_GAP:.1f},{y:.1f}" for place, y in enumerate(heights))
        best = rank == len(ordered) - 1
        tooltip = ", ".join(f"{name} {params.get(name)}" for name in space)
        parts.append(
            element(
                "polyline",
                element("title", html.escape(f"trial {number}: {tooltip}, {objective} {value:.5g}")),
                points=points,
                fill="none",
                stroke=series_color(1) if best else HEAT,
                stroke_width=3 if best else 1.5,
                stroke_opacity=1.0 if best else 0.15 + 0.6 * rank / len(ordered),
                stroke_linejoin="round",
            )
        )
    for place, axis in enumerate(axes):  # over the lines, which would cross their labels
        parts += axis.drawn(_SIDE + place * _AXIS_GAP)
    number, params, value = ordered[-1]
    chosen = ", ".join(f"{name} {params.get(name)}" for name in space)
    description = f"{len(drawn)} trials. The best is trial {number} with {objective} {value:.5g}: {chosen}."
    return figure(width, _HEIGHT, title, description, *parts)


class _Axis:
    """A vertical axis: numbers in a range, linear or logarithmic, or choices evenly apart."""

    def __init__(self, name: str, low: float, high: float, log: bool, choices: Sequence[Any] = ()) -> None:
        self.name, self._low, self._high, self._log, self._choices = name, low, high, log, choices

    def height(self, value: Any) -> float:
        """Pixels from the top at which a value lies."""
        share = self._share(value)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def _share(self, value: Any) -> float:
        if self._choices:
            return (self._choices.index(value) + 0.5) / len(self._choices)
        if self._high == self._low:
            return 0.5
        if self._log:
            return math.log(value / self._low) / math.log(self._high / self._low)
        return (value - self._low) / (self._high - self._low)

    def _marks(self) -> list[tuple[Any, str]]:
        if self._choices:
            return [(choice, str(choice)) for choice in self._choices]
        if self._log:
            powers = range(math.ceil(math.log10(self._low)), math.floor(math.log10(self._high)) + 1)
            values = [10.0**power for power in powers] if len(powers) > 1 else [self._low, self._high]
            return [(value, f"{value:.3g}") for value in values]
        values = ticks(self._low, self._high)
        return list(zip(values, tick_labels(values), strict=True))

    def drawn(self, x: float) -> list[str]:
        """The axis at `x` pixels, its marks and its name."""
        section, _, option = self.name.rpartition(".")
        parts = [
            label(x, 36, f"{section}." if section else "", size=10.5, text_anchor="middle"),
            label(x, 50, option, size=11.5, fill=TEXT, text_anchor="middle"),
            element("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, stroke=MUTED),
        ]
        for value, text in self._marks():
            y = self.height(value)
            parts.append(element("line", x1=x - 4, x2=x, y1=y, y2=y, stroke=MUTED))
            halo = {"stroke": "var(--card, #ffffff)", "stroke_width": 3, "paint_order": "stroke"}
            parts.append(label(x - 7, y + 4, text, size=10.5, text_anchor="end", **halo))
        return parts


def _option_axis(
    name: str, distribution: BaseDistribution, trials: Sequence[tuple[int, Mapping[str, Any], float]]
) -> _Axis:
    if isinstance(distribution, CategoricalDistribution):
        return _Axis(name, 0.0, 1.0, False, distribution.choices)
    low, high = _range([params[name] for _, params, _ in trials if name in params])
    return _Axis(name, low, high, getattr(distribution, "log", False))


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values, default=0.0), max(values, default=1.0)


def importance_chart(importances: Mapping[str, float]) -> str:
    """A bar an option, the most important first; the importances add up to 1."""
    title = "Importance of the options"
    row, left = 30.0, 16 + max((text_width(name) for name in importances), default=0.0)
    width, height = left + 330, 40 + row * max(1, len(importances))
    parts = [label(0, 16, title, size=14, fill=TEXT, font_weight="600")]
    for place, (name, share) in enumerate(sorted(importances.items(), key=lambda item: -item[1])):
        y = 34 + place * row
        parts.append(label(left - 8, y + 14, name, fill=TEXT, text_anchor="end"))
        parts.append(element("rect", x=left, y=y, width=260, height=18, rx=3, fill=GRID))
        parts.append(element("rect", x=left, y=y, width=260 * share, height=18, rx=3, fill=series_color(0)))
        parts.append(label(left + 268, y + 14, f"{100 * share:.0f} %"))
    described = ", ".join(f"{name} {100 * share:.0f} %" for name, share in importances.items())
    return figure(width, height, title, f"Shares of the objective's variation: {described or 'none'}.", *parts)
