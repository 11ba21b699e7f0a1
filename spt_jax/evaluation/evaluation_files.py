"""The files that an evaluation leaves in a working directory, read back and checked field by field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spt_jax.config import default_config, flat_json, flatten
from spt_jax.errors import UserError
from spt_jax.json_text import is_number, is_text, json_object, parse_json

OF_REPLIES = ("generation.", "evaluation.max_new_tokens", "evaluation.seed", "evaluation.selection")
"""Options that change replies, by the beginnings of their names: flags of an evaluation may override the run's."""

_BESIDE_THE_METHOD = ("seed", "tracking.")


def turn_name(dialogue: int, turn: int) -> str:
    """A turn as a sentence names it."""
    return f"turn {turn} of dialogue {dialogue}"


def settings_of(path: Path) -> tuple[dict[str, Any], int]:
    """What of a run's ``config.json`` tells methods apart, by flat name, and the seed; UserError where it is none."""
    record = json_object(path)
    config, lm = record.get("config"), record.get("lm")
    if not isinstance(config, dict):
        raise UserError(f"{path} cannot be read: it has no 'config'")
    try:
        flat = flatten(config)
    except RecursionError:
        raise UserError(f"{path} cannot be read: its 'config' is nested too deeply") from None
    seed = flat.get("seed", 0)
    if type(seed) is not int:
        raise UserError(f"{path} cannot be read: its seed is no whole number")
    # An option that is younger than the run does by default what was done without it.
    flat = flat_json(default_config()) | flat
    settings = {key: value for key, value in flat.items() if not key.startswith(_BESIDE_THE_METHOD)}
    return settings | {
        "lm": lm.get("sha256") if isinstance(lm, dict) else lm,
        "tokenizer": record.get("tokenizer"),
    }, seed


def results_of(path: Path) -> dict[str, Any]:
    """What ``results.json`` holds; UserError where a part that is compared is not of its kind."""
    results = json_object(path)
    columns, definitions = results.get("columns") or {}, results.get("definitions") or {}
    settings = results.get("settings") or {}
    if not isinstance(columns, dict) or not all(isinstance(column, dict) for column in columns.values()):
        raise UserError(f"{path} cannot be read: its 'columns' are not objects of figures")
    if not isinstance(definitions, dict) or not all(is_text(text) for text in (*definitions, *definitions.values())):
        raise UserError(f"{path} cannot be read: its 'definitions' are not sentences by name")
    if not isinstance(settings, dict) or not all(map(is_text, settings)):
        raise UserError(f"{path} cannot be read: its 'settings' are not values by name")
    if "checkpoint" in results and not is_text(results["checkpoint"]):
        raise UserError(f"{path} cannot be read: its 'checkpoint' is no text")
    for name in ("turns", "replies"):
        if name in results and type(results[name]) is not int:
            raise UserError(f"{path} cannot be read: {name!r} is no whole number")
    return results | {"columns": columns, "definitions": definitions, "settings": settings}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(is_text(text) for text in value)


def _is_nll(value: Any) -> bool:
    """One figure a prompt, or one alone; of a model that has diverged they need not be finite."""
    return all(type(number) in (int, float) for number in (value if isinstance(value, list) else [value]))


_MOST_NATS = 700.0
"""A token; beyond it no float holds the perplexity, so it is not known."""
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dialogue": (_is_count, "a whole number"),
    "turn": (_is_count, "a whole number"),
    "reference": (is_text, "a text"),
    "prediction": (is_text, "a text"),
    "persona": (_are_texts, "a list of texts"),
    "history": (_are_texts, "a list of texts"),
    "selected": (_is_count, "the number of a prompt"),
    "nll": (_is_nll, "nats a token"),
    "target_tokens": (lambda value: _is_count(value) and value > 0, "a whole number, 1 or more"),
}
"""What a line of predictions.jsonl holds -> whether a value is one, and what it is; those of `_NEEDED` never lack."""
_NEEDED = ("dialogue", "turn", "reference", "prediction")


def predictions_of(path: Path) -> list[dict[str, Any]]:
    """The lines of ``predictions.jsonl`` by dialogue and turn; UserError names a line that is no reply, or a second."""
    rows, places = [], {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
        for key, (is_one, what) in _FIELDS.items():
            value = row.get(key) if isinstance(row, dict) else None
            if (key in _NEEDED or value is not None) and not is_one(value):
                raise UserError(
                    f"{path}:{number} has no {key!r} that is {what}; each line is one reply as evaluate writes it"
                )
        place = (row["dialogue"], row["turn"])
        if place in places:
            raise UserError(f"{path}:{number} answers {turn_name(*place)} once more, after line {places[place]}")
        places[place] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no reply; run evaluate without --replies, or with more of them")
    return sorted(rows, key=lambda row: (row["dialogue"], row["turn"]))


def selected_nll(row: dict[str, Any]) -> float | None:
    """Nats a token under the prompt that answered: the record keeps one figure a prompt, or one alone, or none."""
    nll, selected = row.get("nll"), row.get("selected") or 0
    if isinstance(nll, list):
        nll = nll[selected] if selected < len(nll) else None
    return float(nll) if is_number(nll) and abs(nll) <= _MOST_NATS else None
