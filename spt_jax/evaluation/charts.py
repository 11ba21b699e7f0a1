"""Curves over training steps as SVG: data in, picture out."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from spt_jax.errors import UserError
from spt_jax.evaluation.svg import (
    GRID,
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

WIDTH, HEIGHT = 440.0, 250.0
_TOP, _BOTTOM = 34.0, 36.0
_SMOOTH_ABOVE = 50  # points; fewer are drawn as they are
_MARK_UP_TO = 30  # points; so few carry a dot each, with its value on hover
_MOST_POINTS = 400  # more do not show at this width, and would weigh down the page
_LABEL_GAP = 14.0
_LARGEST = 1e300  # the difference of two larger ones may be infinite


@dataclass(frozen=True)
class Series:
    """One curve: values `y` at steps `x`, of equal length; None, NaN and values beyond ±1e300 are left out.

    Attributes:
      name: Written at the curve's end where a chart has several.
      x: Steps, ascending.
      y: Values.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]

    def points(self) -> list[tuple[float, float]]:
        """The points that a chart has room for.

        Raises:
          UserError: `x` and `y` differ in length.
        """
        if len(self.x) != len(self.y):
            raise UserError(f"The series {self.name!r} has {len(self.x)} steps and {len(self.y)} values.")
        points = [(float(x), float(y)) for x, y in zip(self.x, self.y, strict=True) if y is not None]
        return [point for point in points if all(abs(value) <= _LARGEST for value in point)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    bounds: tuple[float, float] | None = None,
    percent: bool = False,
    smoothed: bool = True,
    first_color: int = 0,
) -> str:
    """A chart of one or several curves with axes, ticks and direct labels.

    A curve of more than 50 points is drawn faint, with its moving average over it, unless `smoothed` is False.

    Args:
      title: Stands above the chart and names it to a screen reader.
      series: The curves; each takes the next colour from `first_color` on.
      x_label: What the horizontal axis counts.
      bounds: Range of the vertical axis; by default that of the data.
      percent: Show values in [0, 1] as percentages.
      smoothed: False draws every curve as it is.
      first_color: Colour of the first curve.
    """
    drawn = [(index, entry.name, points) for index, entry in enumerate(series) if (points := entry.points())]
    heading = label(0, 16, title, size=14, fill=TEXT, font_weight="600")
    if not drawn:
        empty = label(WIDTH / 2, HEIGHT / 2, "no values were logged", text_anchor="middle")
        return figure(WIDTH, HEIGHT, title, "No values were logged.", heading, empty)
    y_low, y_high = bounds or _padded([y for _, _, points in drawn for _, y in points])
    x_low, x_high = _widened([x for _, _, points in drawn for x, _ in points])
    y_ticks = ticks(y_low, y_high, count=6)
    y_texts = [f"{100 * tick:.0f} %" for tick in y_ticks] if percent else tick_labels(y_ticks)
    left = 12 + max(text_width(text, 11.5) for text in y_texts)
    names = [name for _, name, _ in drawn]
    right = WIDTH - (12 + 1.1 * max(text_width(name, 11.5) for name in names) if len(drawn) > 1 else 18)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = left + (right - left) * (point[0] - x_low) / (x_high - x_low)
        y = HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (point[1] - y_low) / (y_high - y_low)
        return x, min(max(y, _TOP), HEIGHT - _BOTTOM)

    parts = [heading, *_axes(place, y_ticks, y_texts, (x_low, x_high), (left, right), x_label)]
    ends: list[tuple[float, float]] = []
    for index, _, points in drawn:
        color = series_color(first_color + index)
        noisy = smoothed and len(points) > _SMOOTH_ABOVE
        trend = smooth(points) if noisy else points
        if noisy:
            parts.append(_curve([place(point) for point in thin(points, _MOST_POINTS)], color, faint=True))
        parts.append(_curve([place(point) for point in thin(trend, _MOST_POINTS)], color))
        if len(points) <= _MARK_UP_TO:
            parts += [_mark(place(point), point, color, x_label) for point in points]
        x, y = place(trend[-1])
        parts.append(element("circle", cx=x, cy=y, r=3, fill=color))
        ends.append((y, trend[-1][1]))
    if len(drawn) > 1:
        for (index, name, _), y in zip(
            drawn, spread([end[0] for end in ends], _LABEL_GAP, _TOP, HEIGHT - _BOTTOM), strict=True
        ):
            color = series_color(first_color + index)
            parts.append(label(right + 8, y + 4, name, size=11.5, fill=color, font_weight="600"))
    else:
        last = ends[0][1]
        shown = f"{100 * last:.0f} %" if percent else f"{last:.4g}"
        parts.append(label(right, 16, f"ends at {shown}", fill=MUTED, text_anchor="end"))
    return figure(WIDTH, HEIGHT, title, _describe(drawn, x_label), *parts)


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The centred moving average over a tenth of the points, at least 5; at the ends over those of them that exist."""
    half = max(2, len(points) // 20)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    averaged = []
    for index, (x, _) in enumerate(points):
        start, stop = max(0, index - half), min(len(points), index + half + 1)
        averaged.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return averaged


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs of neighbours, with the first and the last point kept as they are."""
    if len(points) <= most:
        return list(points)
    edges = [1 + index * (len(points) - 2) // (most - 2) for index in range(most - 1)]
    runs = [points[start:stop] for start, stop in pairwise(edges)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [points[0], *means, points[-1]]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions pushed apart to lie `gap` from one another, in their order, within [`low`, `high`]."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    placed = dict.fromkeys(order, low)
    floor = low
    for index in order:
        placed[index] = max(positions[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return [placed[index] for index in range(len(positions))]


def _axes(
    place: Callable[[tuple[float, float]], tuple[float, float]],
    y_ticks: Sequence[float],
    y_texts: Sequence[str],
    x_range: tuple[float, float],
    x_pixels: tuple[float, float],
    x_label: str,
) -> list[str]:
    (left, right), base = x_pixels, HEIGHT - _BOTTOM
    parts = []
    for tick, text in zip(y_ticks, y_texts, strict=True):
        y = place((x_range[0], tick))[1]
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, stroke=GRID))
        parts.append(label(left - 6, y + 4, text, size=11.5, text_anchor="end"))
    parts.append(element("line", x1=left, x2=right, y1=base, y2=base, stroke=MUTED))
    x_ticks = [tick for tick in ticks(*x_range, count=6) if float(tick).is_integer()]
    for tick, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = place((tick, y_ticks[0]))[0]
        parts.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, stroke=MUTED))
        parts.append(label(x, base + 17, text, size=11.5, text_anchor="middle"))
    parts.append(label((left + right) / 2, HEIGHT - 4, x_label, size=11.5, text_anchor="middle"))
    return parts


def _curve(pixels: Sequence[tuple[float, float]], color: str, faint: bool = False) -> str:
    return element(
        "polyline",
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in pixels),
        fill="none",
        stroke=color,
        stroke_width=1 if faint else 2,
        stroke_opacity=0.3 if faint else 1,
        stroke_linejoin="round",
        stroke_linecap="round",
    )


def _mark(pixel: tuple[float, float], point: tuple[float, float], color: str, x_label: str) -> str:
    tooltip = element("title", html.escape(f"{x_label} {point[0]:g}: {point[1]:.4g}"))
    return element("circle", tooltip, cx=pixel[0], cy=pixel[1], r=2.5, fill=color)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return (low - 1.0, low + 1.0) if low == 0 else (low - 0.1 * abs(low), low + 0.1 * abs(low))
    pad = 0.05 * (high - low)
    return (0.0 if 0 <= low < pad else low - pad), high + pad


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max(1.0, 1e-9 * abs(low))  # one more is no more beside a number of twenty digits
    return (low, high) if high > low else (low - pad, high + pad)


def _describe(drawn: Sequence[tuple[int, str, Sequence[tuple[float, float]]]], x_label: str) -> str:
    sentences = [
        f"{name}: from {points[0][1]:.4g} at {x_label} {points[0][0]:g} to {points[-1][1]:.4g} at {points[-1][0]:g}, "
        f"lowest {min(y for _, y in points):.4g}."
        for _, name, points in drawn
    ]
    return " ".join(sentences)
