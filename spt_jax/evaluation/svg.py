"""Small pieces that every chart shares: elements, escaping, axes' ticks, the palette of both themes."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

TEXT = "var(--ink, #1d2430)"
MUTED = "var(--muted, #5b6675)"
GRID = "var(--grid, #e3e7ed)"
HEAT = "var(--heat, #1f6f8b)"
ON_HEAT = "var(--on-heat, #ffffff)"

# Distinct in hue and in lightness on both themes; the page's style sheet redefines them for the dark one.
_SERIES = ("#2767b1", "#c65a11", "#12806a", "#8a4bb0", "#b63a6b", "#6d7a12")


def series_color(index: int) -> str:
    """The colour of series or prompt `index`, as a CSS value with the light theme's colour as its fall-back."""
    index %= len(_SERIES)
    return f"var(--series-{index}, {_SERIES[index]})"


def element(tag: str, *children: str, **attributes: str | float) -> str:
    """One element as markup; `children` are markup already, attribute values are escaped.

    Attribute names: ``_`` becomes ``-``, a trailing one is dropped (``class_``). Numbers keep two decimals.
    """
    parts = [tag]
    for name, value in attributes.items():
        shown = value if isinstance(value, str) else f"{round(float(value), 2):g}"
        parts.append(f'{name.rstrip("_").replace("_", "-")}="{html.escape(shown)}"')
    opening = " ".join(parts)
    return f"<{opening}>{''.join(children)}</{tag}>"


def label(x: float, y: float, text: str, *, size: float = 12, fill: str = MUTED, **attributes: str | float) -> str:
    """A line of text at (`x`, `y`) in pixels, escaped."""
    return element("text", html.escape(text), x=x, y=y, font_size=size, fill=fill, **attributes)


def figure(width: float, height: float, title: str, description: str, *children: str) -> str:
    """A whole SVG picture, `width` by `height` pixels at full size, that a screen reader announces and describes."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "chart"
    return element(
        "svg",
        element("title", html.escape(title), id=f"{name}-title"),
        element("desc", html.escape(description), id=f"{name}-description"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-description",
        font_family="system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    )


def text_width(text: str, size: float = 12) -> float:
    """An estimate of the width of `text` in pixels, a little on the wide side."""
    return 0.58 * size * len(text)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [`low`, `high`], about `count` of them, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not (math.isfinite(span) and span > 1e-300):  # spans that are not 0, but whose parts are, included
        return [low]
    rough = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [index * spacing for index in range(first, last + 1)] or [low]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Short labels that tell neighbouring ticks apart: ``0.25``, ``1.5k``, ``1e-4``."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e4:
        unit, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k")
        return [_trim(value / unit) + (suffix if value else "") for value in values]
    if 0 < largest < 1e-2:
        return [re.sub(r"e([+-])0*", r"e\1", f"{value:.3g}") if value else "0" for value in values]
    return [_trim(value) for value in values]


def _trim(value: float) -> str:
    return f"{round(value, 6):.6g}".replace("-", "−")
