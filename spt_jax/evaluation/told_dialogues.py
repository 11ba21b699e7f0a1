"""Whole dialogues with the replies that a run gave in them, for the report's browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.data.dialogue import Dialogue
from spt_jax.evaluation.spread import spread_evenly

MOST_DIALOGUES = 60
"""In a report; each weighs some kilobytes."""


def told_dialogues(
    dialogues: Sequence[Dialogue], predictions: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Up to `MOST_DIALOGUES` of the dialogues with a reply, in their order; those of the samples, however many, first.

    Args:
        dialogues: All that were evaluated.
        predictions: As ``predictions.jsonl``.
        samples: Turns with a reply under every prompt.

    Returns:
        As `spt_jax.evaluation.report.ReportInputs.dialogues`.
    """
    replies = {(row["dialogue"], row["turn"]): row for row in predictions}
    everywhere = {(row["dialogue"], row["turn"]): row for row in samples}
    first = {d for d, _ in everywhere}
    others = sorted({d for d, _ in replies} - first)
    room = MOST_DIALOGUES - len(first)
    others = [others[i] for i in spread_evenly(len(others), room)] if room > 0 else []
    return [_told(d, dialogues[d], replies, everywhere) for d in sorted(first | set(others))]


def _told(d: int, dialogue: Dialogue, replies: Mapping[Any, Any], everywhere: Mapping[Any, Any]) -> dict[str, Any]:
    turns = []
    for t, turn in enumerate(dialogue.turns):
        told: dict[str, Any] = {"query": turn.query, "reference": turn.response}
        if row := replies.get((d, t)):
            told["reply"] = row["prediction"]
            if len(row["scores"]) > 1:
                told["selected"] = row["selected"]
        if row := everywhere.get((d, t)):
            told |= {name: row[name] for name in ("replies", "no_prompt") if name in row}
        turns.append(told)
    return {"number": d, "name": f"Dialogue {d}", "persona": list(dialogue.persona), "turns": turns}
