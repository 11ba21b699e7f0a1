"""The retriever's map as a picture: contexts as dots in the colour of the prompt they select, prompts as diamonds."""

from __future__ import annotations

import html
from collections.abc import Sequence

from spt_jax.evaluation.svg import GRID, MUTED, TEXT, element, figure, label, series_color

WIDTH = 440.0
_TOP, _BOTTOM, _SIDE = 34.0, 24.0, 8.0


def map_chart(
    title: str, contexts: Sequence[Sequence[float]], prompts: Sequence[Sequence[float]], explained: Sequence[float]
) -> str:
    """A square plane; both axes have one scale, so that distances mean what they mean to the retriever.

    Args:
      title: Stands above the chart and names it to a screen reader.
      contexts: ``[x, y, selected prompt, dialogue, turn]`` of every context.
      prompts: ``[x, y]`` of each prompt.
      explained: Share of the contexts' variance along either axis.
    """
    known = [(x, y) for x, y, *_ in (*contexts, *prompts)]
    low = [min(point[axis] for point in known) for axis in (0, 1)]
    high = [max(point[axis] for point in known) for axis in (0, 1)]
    span = max(high[0] - low[0], high[1] - low[1], 1e-9)
    side = WIDTH - 2 * _SIDE - 24
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]

    def place(x: float, y: float) -> tuple[float, float]:
        return WIDTH / 2 + (x - middle[0]) / span * side, _TOP + side / 2 + 12 - (y - middle[1]) / span * side

    box = {"x": _SIDE, "y": _TOP, "width": WIDTH - 2 * _SIDE, "height": side + 24, "rx": 6}
    parts = [
        label(0, 16, title, size=14, fill=TEXT, font_weight="600"),
        element("rect", fill="none", stroke=GRID, **box),
    ]
    for x, y, prompt, dialogue, turn in contexts:
        tooltip = f"dialogue {dialogue:.0f}, turn {turn:.0f}: selects prompt {prompt:.0f}"
        cx, cy = place(x, y)
        dot = element("circle", cx=cx, cy=cy, r=2.6, fill=series_color(int(prompt)), fill_opacity=0.55)
        parts.append(element("g", element("title", html.escape(tooltip)), dot))
    for prompt, (x, y) in enumerate(prompts):
        cx, cy = place(x, y)
        corners = " ".join(f"{cx + dx:.2f},{cy + dy:.2f}" for dx, dy in ((0, -7), (7, 0), (0, 7), (-7, 0)))
        shape = element("polygon", points=corners, fill=series_color(prompt), stroke=TEXT, stroke_width=1)
        parts.append(element("g", element("title", f"prompt {prompt}"), shape))
        # On the side where there is room.
        right = cx < WIDTH - 80
        anchor = "start" if right else "end"
        parts.append(
            label(cx + (11 if right else -11), cy + 4, f"prompt {prompt}", size=11.5, fill=TEXT, text_anchor=anchor)
        )
    height = _TOP + side + 24 + _BOTTOM
    shares = " and ".join(f"{100 * share:.0f} %" for share in explained)
    parts.append(label(_SIDE, height - 8, f"the axes hold {shares} of the contexts' variance", size=11, fill=MUTED))
    description = (
        f"{len(contexts)} contexts and {len(prompts)} prompts by the direction of the retriever's vectors, "
        f"on two principal components with {shares} of the variance."
    )
    return figure(WIDTH, height, title, description, *parts)
