"""The report's part on the retriever: what its choice is worth, whom each prompt serves, and its map."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.evaluation.map_chart import WIDTH, map_chart
from spt_jax.evaluation.report_page import details, section, wide_figure
from spt_jax.evaluation.selection import SELECTION_DEFINITIONS
from spt_jax.evaluation.selection_charts import heat_map, heat_map_width
from spt_jax.evaluation.table import MISSING, format_number

_LABELS = {
    "effective_prompts": "Effective number of prompts",
    "usage_entropy": "Entropy of the prompts' shares (nats)",
    "score_entropy": "Entropy of a turn's selection (nats)",
    "regret": "Regret of the selected prompt (nats a token)",
    "regret_of_one": "… of the one prompt that is best for all",
    "regret_of_chance": "… of a prompt at random",
    "oracle_agreement": "Turns that select their best prompt (%)",
}


def diagnostics_section(diagnostics: Mapping[str, Any]) -> list[str]:
    """The section as markup in a list, empty where nothing was diagnosed.

    Without a choice among prompts it shows their nearest tokens alone.

    Args:
      diagnostics: As `spt_jax.evaluation.diagnostics.diagnose` gives it; any part may be absent.
    """
    parts = []
    if figures := diagnostics.get("figures"):
        parts.append(_figures(figures))
    if found := diagnostics.get("map"):
        picture = map_chart("What the retriever compares", found["contexts"], found["prompts"], found["explained"])
        parts.append(f'<figure style="margin: 16px 0; max-width: {WIDTH:g}px">{picture}</figure>')
    if personas := diagnostics.get("personas"):
        parts += _personas(personas)
    if nearest := diagnostics.get("nearest_tokens"):
        parts.append(details("Nearest vocabulary tokens of each virtual token", _nearest(nearest)))
    if not parts:
        return []
    if "figures" not in diagnostics:
        return [section("What was learned", *parts)]
    note = (
        "Regret is what the choice costs: the selected prompt's nll minus the best prompt's, known only in hindsight."
    )
    return [section("What the selection is worth", *parts, note=note)]


def _figures(figures: Mapping[str, float]) -> str:
    lines = "".join(
        f'<tr><th scope="row" title="{html.escape(SELECTION_DEFINITIONS[name])}">{html.escape(text)}</th>'
        f"<td>{format_number(figures[name], 3) if figures.get(name) is not None else MISSING}</td></tr>"
        for name, text in _LABELS.items()
    )
    return f'<table class="figures"><caption>Selection</caption><tbody>{lines}</tbody></table>'


def _personas(personas: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [str(number) for number in range(1, len(personas) + 1)]
    # A persona's own level would hide which prompt serves it.
    means = [sum(persona["nll"]) / len(persona["nll"]) for persona in personas]
    rows = [
        [mean - persona["nll"][k] for persona, mean in zip(personas, means, strict=True)]
        for k in range(len(personas[0]["nll"]))
    ]
    flat = [value for row in rows for value in row]
    best = {
        (min(range(len(rows)), key=lambda k: personas[column]["nll"][k]), column) for column in range(len(personas))
    }
    title = "What each prompt gains a persona (nats a token)"
    picture = heat_map(
        title,
        rows,
        names,
        bounds=(min(flat), max(flat)),
        legend="mean nll of all less this prompt's",
        marks=best,
        mark_legend="the persona's best prompt",
        of="personas",
    )
    width = heat_map_width(len(names))
    lines = "".join(
        f'<li value="{number}">{html.escape(" ".join(persona["lines"]))} '
        f'<span class="muted">({persona["turns"]} turns)</span></li>'
        for number, persona in zip(names, personas, strict=True)
    )
    return [wide_figure(picture, width, title), details("The personas", f"<ol>{lines}</ol>")]


def _nearest(nearest: Sequence[Sequence[Sequence[Sequence[Any]]]]) -> str:
    several = len(nearest) > 1
    rows = "".join(
        f'<tr><th scope="row">{f"prompt {prompt}, " if several else ""}token {place}</th><td>'
        + ", ".join(f"<code>{html.escape(str(text))}</code> {cosine:.2f}" for text, cosine in tokens)
        + "</td></tr>"
        for prompt, virtual in enumerate(nearest)
        for place, tokens in enumerate(virtual)
    )
    caption = "By the cosine of embeddings; a virtual token need not mean what its neighbours mean."
    return f"<table><caption>{caption}</caption><tbody>{rows}</tbody></table>"
