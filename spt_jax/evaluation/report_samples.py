"""The report's sample replies: one dialogue, every prompt's answer side by side."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spt_jax.evaluation.report_page import section


def sample_section(samples: Sequence[Mapping[str, Any]], *, mixes: bool = False) -> list[str]:
    """The section as markup in a list, empty where there are no samples.

    Args:
      samples: As `ReportInputs.samples`; any part of a sample may be absent.
      mixes: Whether a mixture of the prompts answers, and not one of them.
    """
    if not samples:
        return []
    note = ""
    if any(len(sample.get("replies") or ()) > 1 for sample in samples):
        marked = "the one that weighs most in the mixture that answers" if mixes else "the retriever's choice"
        note = f"The same context answered under every prompt; {marked} is marked."
    return [
        section("Sample replies", *(_sample(number, sample) for number, sample in enumerate(samples, 1)), note=note)
    ]


def _sample(number: int, sample: Mapping[str, Any]) -> str:
    """A sample; `number` names it where it does not tell its dialogue."""
    turn = f", turn {sample['turn']}" if "turn" in sample else ""
    persona = "".join(f"<li>{html.escape(str(line))}</li>" for line in sample.get("persona") or ())
    history = list(sample.get("history") or ())
    # The speakers alternate backwards from the end, where the user spoke unless a persona is to be told.
    sides = ("user (Q)", "model's side (R)")
    own_last = bool(sample.get("own_last"))
    turns = "".join(
        bubble(text, sides[own], own=own)
        for text, own in ((text, (len(history) - index) % 2 == own_last) for index, text in enumerate(history))
    )
    table = reply_table(
        sample.get("replies") or (), sample.get("selected"), sample.get("no_prompt"), sample.get("reference")
    )
    return (
        f"<article>\n<h3>Dialogue {sample.get('dialogue', number)}{turn}</h3>\n"
        + (f'<p class="muted">Persona</p><ul class="persona">{persona}</ul>' if persona else "")
        + turns
        + f"{table}\n</article>"
    )


def bubble(text: Any, speaker: str, *, own: bool) -> str:
    """An utterance, on the right where it is the model's `own` side's."""
    style = "turn own" if own else "turn"
    return f'<div class="{style}"><small>{html.escape(speaker)}</small>{html.escape(str(text))}</div>'


def reply_table(replies: Sequence[Any], selected: int | None, no_prompt: Any = None, reference: Any = None) -> str:
    """Every prompt's reply to one context, the selected one marked; the LM's alone and the reference where given."""
    if len(replies) > 1:
        rows = [reply_row(f"prompt {k}", reply, selected=k == selected) for k, reply in enumerate(replies)]
    else:
        rows = [reply_row("reply", reply) for reply in replies]
    if no_prompt is not None:
        rows.append(reply_row("no soft prompt", no_prompt))
    if reference is not None:
        rows.append(reply_row("reference", reference))
    return replies_table(rows)


def replies_table(rows: Iterable[str]) -> str:
    """The table of rows that `reply_row` made."""
    return f'<table class="replies"><caption>Replies</caption><tbody>{"".join(rows)}</tbody></table>'


def reply_row(name: str, text: Any, selected: bool = False) -> str:
    """A reply under the name of who gives it."""
    badge = '<span class="badge">selected</span>' if selected else ""
    shown = html.escape(str(text)) if str(text).strip() else '<span class="muted">(empty reply)</span>'
    style = ' class="selected"' if selected else ""
    return f'<tr{style}><th scope="row">{html.escape(name)}{badge}</th><td>{shown}</td></tr>'
