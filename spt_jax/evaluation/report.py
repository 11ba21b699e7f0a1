"""report.html: one self-contained page that shows what a run learned, for a reader who has only the file."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spt_jax.atomic_file import write_atomically
from spt_jax.evaluation.report_curves import curve_sections
from spt_jax.evaluation.report_diagnostics import diagnostics_section
from spt_jax.evaluation.report_dialogues import dialogues_section
from spt_jax.evaluation.report_page import details, page, section
from spt_jax.evaluation.report_samples import sample_section
from spt_jax.evaluation.report_selection import selection_section
from spt_jax.evaluation.table import FURTHER_ROWS, MISSING, ROWS, Row, format_number, table_cells


@dataclass(frozen=True)
class ReportInputs:
    """Everything the report shows; an empty part is left out of the page.

    Attributes:
      title: The page's heading.
      results: As results.json: ``columns`` {model: {figure: value}}, ``definitions`` {figure: sentence}, ``notes``
        [sentences], ``versions`` {library: version}, ``settings`` {option: value}, and optionally ``diagnostics`` (as
        `diagnostics_section`), ``model``, ``hardware`` and others, each a mapping or a text.
      metrics: Rows of metrics.jsonl: ``step`` and any of the logged names; values may be None or NaN.
      selection: One mapping a dialogue: ``dialogue`` (name), ``usage`` [K] (share of its turns that select each
        prompt), ``scores`` [K] and ``nll`` [K] (means over its turns).
      samples: ``dialogue`` and ``turn`` (numbers), ``persona`` [lines], ``history`` [utterances, the user's last, or
        where ``own_last`` is true the model's], ``reference``, ``selected`` (prompt), ``replies`` [K texts],
        ``no_prompt`` (text).
      dialogues: ``number``, ``name``, ``persona`` [lines] and ``turns``: each with ``query``, ``reference``, and where
        it was answered ``reply`` and, of several prompts, ``selected``; some with ``replies`` [K texts] and
        ``no_prompt``.
      config: The run's configuration, nested.
      command: The exact command that opens the chat.
    """

    title: str
    results: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    selection: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    dialogues: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


def render_report(inputs: ReportInputs) -> str:
    """The report as one HTML document; all text of the inputs is escaped.

    Raises:
      UserError: A figure is not a number, or lists over prompts or dialogues do not fit together.
    """
    columns: Mapping[str, Mapping[str, Any]] = inputs.results.get("columns", {})
    body = [f"<header>\n<h1>{html.escape(inputs.title)}</h1>\n<p>{_subtitle(inputs.results)}</p>\n</header>"]
    if columns:
        body += [_headline(columns), _results(columns, inputs.results.get("notes", []))]
    body += curve_sections(inputs.metrics)
    mixes = inputs.results.get("settings", {}).get("evaluation.selection") == "soft"
    body += selection_section(inputs.selection, columns, mixes=mixes)
    body += diagnostics_section(inputs.results.get("diagnostics", {}))
    body += sample_section(inputs.samples, mixes=mixes)
    body += dialogues_section(inputs.dialogues, mixes=mixes)
    if inputs.command:
        command = f"<pre><code>{html.escape(inputs.command)}</code></pre>"
        body.append(section("Talk to it", command, note="The command that opens a conversation with this checkpoint:"))
    body.append(_fine_print(inputs))
    return page(inputs.title, [part for part in body if part])


def write_report(path: str | os.PathLike[str], inputs: ReportInputs) -> None:
    """Writes `render_report` to `path`, all or nothing: a reader never meets half a page, an old one stays until then.

    Args:
      path: The file to write, in a folder that exists.
      inputs: What to show.

    Raises:
      UserError: The file cannot be written, or as `render_report`.
    """
    write_atomically(Path(path), render_report(inputs))


def _subtitle(results: Mapping[str, Any]) -> str:
    facts = []
    for key in ("model", "hardware"):
        value = results.get(key)
        if isinstance(value, Mapping):
            # The first few facts identify the run; the rest is in the details below.
            facts += [f"{_words(name)} {_brief(entry)}" for name, entry in list(value.items())[:3] if entry]
        elif value:
            facts.append(_plain(value))
    text = (
        "Selective Prompt Tuning: a frozen language model, a bank of soft prompts, a retriever that picks one a turn."
    )
    return f'<span class="muted">{html.escape(" · ".join(facts) or text)}</span>'


def _headline(columns: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(columns)
    after = "after training" if "after training" in columns else names[-1]
    final = _finite(columns[after].get("perplexity"))
    tiles = []
    for name in dict.fromkeys(("before training", "no soft prompt", *names)):
        if name == after or name not in columns or len(tiles) == 2:
            continue
        start = _finite(columns[name].get("perplexity"))
        if start is None or final is None:
            continue
        change = 100.0 * (final - start) / start if start else 0.0
        verb = "lower" if change <= 0 else "higher"
        tiles.append(
            f'<div class="tile{"" if tiles else " lead"}">'
            f"<b>{format_number(start)} → {format_number(final)}</b>"
            f"<span>perplexity per token, {html.escape(name)} → {html.escape(after)}: "
            f"{format_number(abs(change), 1)} % {verb}</span></div>"
        )
    if not tiles and final is not None:
        tiles.append(
            f'<div class="tile lead"><b>{format_number(final)}</b>'
            f"<span>perplexity per token, {html.escape(after)}</span></div>"
        )
    for key, label in (("f1", "token F1, percent"), ("bleu", "BLEU")):
        value = _finite(columns[after].get(key))
        if value is not None:
            tiles.append(
                f'<div class="tile"><b>{format_number(value)}</b><span>{label}, {html.escape(after)}</span></div>'
            )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _results(columns: Mapping[str, Mapping[str, Any]], notes: Sequence[str]) -> str:
    caption = "On the held-out dialogues; ↓ lower is better, ↑ higher is better, the best of each row in colour."
    parts = [_figures(columns, ROWS, "Results", caption), *(f"<p>{html.escape(note)}</p>" for note in notes)]
    if any(row.key in column for column in columns.values() for row in FURTHER_ROWS):
        parts.append(details("Further figures", _figures(columns, FURTHER_ROWS, "Further figures", caption)))
    return section("Results", *parts)


def _figures(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], name: str, caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    lines = []
    for row, cells in table_cells(columns, rows):
        direction = {"low": " ↓", "high": " ↑"}.get(row.better or "", "")
        values = "".join(
            f'<td class="best">{html.escape(cell.text)}</td>' if cell.best else f"<td>{html.escape(cell.text)}</td>"
            for cell in cells
        )
        lines.append(f'<tr><th scope="row">{html.escape(row.label)}{direction}</th>{values}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table class="figures">'
        f'<caption>{caption}</caption><thead><tr><th scope="col">Figure</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _fine_print(inputs: ReportInputs) -> str:
    parts = []
    results = inputs.results
    if definitions := results.get("definitions"):
        entries = "".join(
            f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(text))}</dd>" for name, text in definitions.items()
        )
        parts.append(details("What each figure means", f"<dl>{entries}</dl>"))
    asked = {name: results[name] for name in ("data", "turns", "replies", "checkpoint", "step") if name in results}
    for heading, facts in (
        ("What was evaluated, and how", asked | dict(results.get("settings", {}))),
        ("Library versions", results.get("versions")),
        ("Model", results.get("model")),
        ("Hardware", results.get("hardware")),
    ):
        if facts:
            parts.append(details(heading, _facts(facts, heading)))
    if inputs.config:
        parts.append(details("Configuration", _facts(inputs.config, "Configuration of the run")))
    return section("Fine print", *parts) if parts else ""


def _facts(facts: Any, caption: str) -> str:
    if not isinstance(facts, Mapping):
        return f"<p>{html.escape(_plain(facts))}</p>"
    rows = "".join(
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th>'
        f"<td><code>{html.escape(_plain(value))}</code></td></tr>"
        for name, value in flatten(facts)
    )
    return f"<table><caption>{html.escape(caption)}</caption><tbody>{rows}</tbody></table>"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of a nested mapping as (dotted name, value), in its order; an empty mapping is a leaf."""
    leaves = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves += flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return leaves


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return MISSING if math.isnan(value) else f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def _brief(value: Any) -> str:
    """A hash by its beginning: enough to tell two apart."""
    text = _plain(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{40,64}", text) else text


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
