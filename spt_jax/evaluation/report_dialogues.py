"""The report's browser of dialogues: each opens to its turns, with the reply beside what was really said.

Without a script: a dialogue is a ``details`` element of one group, so that opening one closes the last, and its content
has an id, so that a link (``report.html#dialogue-7``) opens it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.evaluation.report_page import details, section
from spt_jax.evaluation.report_samples import bubble, reply_table


def dialogues_section(dialogues: Sequence[Mapping[str, Any]], *, mixes: bool = False) -> list[str]:
    """The section as markup in a list, empty where there are no dialogues.

    Args:
      dialogues: As `ReportInputs.dialogues`.
      mixes: Whether a mixture of the prompts answers, and not one of them.
    """
    if not dialogues:
        return []
    note = "Open a dialogue to read it with the model's replies; what was really said stands below each reply."
    if any(len(turn.get("replies", ())) > 1 for dialogue in dialogues for turn in dialogue["turns"]):
        note += " Dialogues marked with a diamond have a turn answered under every prompt."
    return [section("Dialogues", *(_dialogue(dialogue, mixes) for dialogue in dialogues), note=note)]


def _dialogue(dialogue: Mapping[str, Any], mixes: bool) -> str:
    number, turns = dialogue["number"], dialogue["turns"]
    answered = [turn for turn in turns if "reply" in turn]
    mark = "◆ " if any(len(turn.get("replies", ())) > 1 for turn in turns) else ""
    persona = html.escape(_short(" ".join(dialogue["persona"]), 90))
    facts = f"{len(answered)} of {len(turns)} turns answered" + (f" · {persona}" if persona else "")
    summary = f'{mark}{html.escape(str(dialogue["name"]))} <span class="muted">{facts}</span>'
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in dialogue["persona"])
    body = f'<p class="muted">Persona</p><ul class="persona">{lines}</ul>' if lines else ""
    body += "".join(_turn(turn, mixes) for turn in turns)
    # A link opens what surrounds its target, so the id is the content's.
    return (
        f'<details name="dialogues"><summary>{summary}</summary>\n<div id="dialogue-{number}">{body}</div>\n</details>'
    )


def _turn(turn: Mapping[str, Any], mixes: bool) -> str:
    query = bubble(turn["query"], "user (Q)", own=False) if turn.get("query") else ""
    if "reply" not in turn:
        return query + bubble(turn["reference"], "as it was said (R)", own=True)
    shown = turn["reply"] if str(turn["reply"]).strip() else "(empty reply)"
    said = f'<p class="said muted">as it was said: {html.escape(str(turn["reference"]))}</p>'
    others = ""
    if "replies" in turn:
        table = reply_table(turn["replies"], turn.get("selected"), turn.get("no_prompt"))
        several = len(turn["replies"]) > 1
        others = details("What every prompt would have said" if several else "The reply beside the LM's alone", table)
    who = "reply"
    if "selected" in turn:
        who += f", a mixture, prompt {turn['selected']} the most" if mixes else f", prompt {turn['selected']}"
    return query + bubble(shown, who, own=True) + said + others


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
