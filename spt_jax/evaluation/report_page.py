"""The shell of the report: the page around its sections, with its style sheet; nothing is loaded from outside."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1d2430; --muted: #5b6675; --grid: #e3e7ed; --accent: #1f6f8b;
  --accent-soft: #e4f0f4; --heat: #1f6f8b; --on-heat: #ffffff;
  --series-0: #2767b1; --series-1: #c65a11; --series-2: #12806a;
  --series-3: #8a4bb0; --series-4: #b63a6b; --series-5: #6d7a12;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --ink: #e8ecf2; --muted: #9aa6b6; --grid: #323b48; --accent: #6fc0da;
    --accent-soft: #203842; --heat: #6fc0da; --on-heat: #0e1a20;
    --series-0: #79b0f0; --series-1: #f0985a; --series-2: #4fc4a8;
    --series-3: #c193e6; --series-4: #f083ac; --series-5: #bcc95a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-size: 16px;
}
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 0 0 12px; }
.muted, caption, figcaption { color: var(--muted); font-size: .9rem; }
section {
  background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 20px 22px; margin-top: 18px;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 18px; }
.tile.lead { background: var(--accent-soft); border-color: var(--accent); }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 650; text-wrap: balance;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .88rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 8px; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
th { font-weight: 600; }
tbody th { font-weight: 400; }
.figures td, .figures thead th { text-align: right; white-space: nowrap; }
.figures thead th:first-child { text-align: left; }
.figures td.best { font-weight: 700; color: var(--accent); }
tbody tr:last-child > * { border-bottom: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 20px 28px; }
figure { margin: 0; min-width: 0; max-width: 560px; }
header p { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
.wide svg { width: var(--width); max-width: none; }
.wide + .wide { margin-top: 18px; }
article { border-top: 1px solid var(--grid); padding-top: 16px; margin-top: 16px; }
.persona { padding: 0 0 0 18px; margin: 0 0 12px; }
.turn { margin: 0 0 6px; padding: 7px 12px; border-radius: 10px; background: var(--page); width: fit-content;
  max-width: 85%; overflow-wrap: anywhere; }
.turn.own { margin-left: auto; background: var(--accent-soft); }
.turn small { display: block; color: var(--muted); font-size: .75rem; }
.said { margin: 0 0 10px auto; width: fit-content; max-width: 85%; }
.replies { margin-top: 12px; }
.replies th { width: 11em; white-space: nowrap; }
.replies td { overflow-wrap: anywhere; }
.replies tr.selected > * { background: var(--accent-soft); }
.badge { background: var(--accent); color: var(--card); border-radius: 99px; padding: 1px 8px; margin-left: 6px;
  font-size: .72rem; font-weight: 600; }
pre { background: var(--page); border: 1px solid var(--grid); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  margin: 8px 0 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88rem; }
td code { overflow-wrap: anywhere; }
details { border-top: 1px solid var(--grid); padding: 10px 0; }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: 10px; }
dl { margin: 0; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 20px 12px 40px; }
  section { padding: 16px 14px; }
  th, td { padding: 6px; }
  .figures td, .figures thead th { white-space: normal; font-size: .9rem; }
  .replies th, .replies td { display: block; width: auto; white-space: normal; }
  .replies th { border-bottom: 0; padding-bottom: 0; font-weight: 600; }
}
@media print {
  body { background: none; }
  section, .tile { break-inside: avoid; }
}
"""

# The browser refuses every load: the page is what is in the file, wherever it is opened.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML document around `body`, which is markup already; `title` is text."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(title: str, *content: str, note: str = "") -> str:
    """A card with a heading, an explanatory line of text, and `content` as markup."""
    introduction = f'<p class="muted">{html.escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{introduction}{''.join(content)}\n</section>"


def wide_figure(picture: str, width: float, name: str) -> str:
    """A picture that keeps its size, at most `width` pixels wide, and scrolls sideways where the page is narrower."""
    return (
        f'<div class="scroll wide" tabindex="0" role="region" aria-label="{html.escape(name)}" '
        f'style="--width: {width:g}px">{picture}</div>'
    )


def details(summary: str, content: str) -> str:
    """A part that opens on a click; `summary` is text, `content` markup."""
    return f"<details>\n<summary>{html.escape(summary)}</summary>\n{content}\n</details>"
