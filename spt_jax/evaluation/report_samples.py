"""The report's sample replies: one dialogue, every prompt's answer side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.evaluation.report_page import section


def sample_section(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section as markup in a list, empty where there are no samples.

    Args:
      samples: As `ReportInputs.samples`; any part of a sample may be absent.
    """
    if not samples:
        return []
    note = "The same context answered under every prompt; the retriever's choice is marked."
    return [
        section("Sample replies", *(_sample(number, sample) for number, sample in enumerate(samples, 1)), note=note)
    ]


def _sample(number: int, sample: Mapping[str, Any]) -> str:
    persona = "".join(f"<li>{html.escape(str(line))}</li>" for line in sample.get("persona") or ())
    history = list(sample.get("history") or ())
    # The user spoke last, so the speakers alternate backwards from the end.
    turns = "".join(_turn(str(text), own=(len(history) - index) % 2 == 0) for index, text in enumerate(history))
    rows = [
        _reply(f"prompt {prompt}", reply, selected=prompt == sample.get("selected"))
        for prompt, reply in enumerate(sample.get("replies") or ())
    ]
    if sample.get("no_prompt") is not None:
        rows.append(_reply("no soft prompt", sample["no_prompt"]))
    if sample.get("reference") is not None:
        rows.append(_reply("reference", sample["reference"]))
    return (
        f"<article>\n<h3>Dialogue {number}</h3>\n"
        + (f'<p class="muted">Persona</p><ul class="persona">{persona}</ul>' if persona else "")
        + turns
        + f'<table class="replies"><caption>Replies</caption><tbody>{"".join(rows)}</tbody></table>\n</article>'
    )


def _turn(text: str, own: bool) -> str:
    speaker, style = ("model's side (R)", "turn own") if own else ("user (Q)", "turn")
    return f'<div class="{style}"><small>{speaker}</small>{html.escape(text)}</div>'


def _reply(name: str, text: Any, selected: bool = False) -> str:
    badge = '<span class="badge">selected</span>' if selected else ""
    shown = html.escape(str(text)) if str(text).strip() else '<span class="muted">(empty reply)</span>'
    style = ' class="selected"' if selected else ""
    return f'<tr{style}><th scope="row">{html.escape(name)}{badge}</th><td>{shown}</td></tr>'
