"""The table of results: one column a model, one row a figure; for the terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from spt_jax.errors import UserError

MISSING = "–"
Column = Mapping[str, Any]
"""Figures of one model by name; ``usage`` holds K shares in [0, 1]."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      key: Name of the figure in a column.
      label: What the reader sees.
      digits: Decimals shown.
      better: Which end is good; None where neither is (no value is marked as the best).
    """

    key: str
    label: str
    digits: int = 2
    better: Literal["low", "high"] | None = "high"


ROWS = (
    Row("perplexity", "Perplexity per token", better="low"),
    Row("f1", "Token F1 (%)"),
    Row("bleu", "BLEU"),
    Row("rouge_l", "ROUGE-L (%)"),
    Row("meteor", "METEOR (%)"),
    Row("bert_f1", "BERTScore F1 (%)"),
    Row("dist_1", "DIST-1 (%)"),
    Row("dist_2", "DIST-2 (%)"),
    Row("entropy_4", "Entropy of 4-grams (nats)"),
    Row("self_bleu", "Self-BLEU", better="low"),
    Row("reply_words", "Words in a reply", better=None),
    Row("persona_f1", "Persona F1 (%)"),
    Row("persona_consistency", "Persona consistency C"),
    Row("hits_1", "hits@1 (%)"),
    Row("hits_1_total", "hits@1 by total nll (%)"),
    Row("usage", "Share of each prompt", better=None),
)
"""The rows of the table that the quickstart prints; those that no column has are left out."""

FURTHER_ROWS = (
    Row("perplexity_per_word", "Perplexity per word", better="low"),
    Row("oracle_perplexity", "Perplexity per token under each turn's best prompt", better="low"),
    Row("f1_parlai", "Token F1 as ParlAI counts (%)"),
    Row("rouge_1", "ROUGE-1 (%)"),
    Row("rouge_2", "ROUGE-2 (%)"),
    *(Row(f"bleu_precision_{n}", f"BLEU: precision of {n}-grams (%)") for n in (1, 2, 3, 4)),
    Row("bleu_brevity_penalty", "BLEU: brevity penalty", digits=3),
    Row("bert_p", "BERTScore precision (%)"),
    Row("bert_r", "BERTScore recall (%)"),
    Row("dist_3", "DIST-3 (%)"),
    Row("persona_precision", "Persona precision (%)"),
    Row("persona_recall", "Persona recall (%)"),
    Row("hits_turns", "Turns that were ranked", digits=0, better=None),
    Row("hits_ties", "Ranked turns with a tie at the top", digits=0, better=None),
    Row("pairs", "Replies that were measured", digits=0, better=None),
    Row("empty_replies", "Empty replies", digits=0, better="low"),
)
"""The other figures of an evaluation, which the report shows on request."""

PAPER_COLUMNS = (
    Row("f1", "F1"),
    Row("bleu", "BLEU"),
    Row("rouge_1", "ROUGE-1"),
    Row("rouge_2", "ROUGE-2"),
    Row("rouge_l", "ROUGE-L"),
    Row("bert_f1", "BERT F1"),
    Row("bert_p", "BERT P"),
    Row("bert_r", "BERT R"),
    Row("dist_1", "DIST-1"),
    Row("dist_2", "DIST-2"),
)
"""The ten columns of the paper's table; `spt_jax.evaluation.comparison.mean_change` is the mean over them."""

PERPLEXITY = Row("perplexity", "Perplexity", better="low")
FURTHER_COLUMNS = (
    Row("dist_3", "DIST-3"),
    Row("entropy_4", "Entropy-4"),
    Row("self_bleu", "Self-BLEU", better="low"),
    Row("meteor", "METEOR"),
    Row("persona_f1", "Persona F1"),
    Row("persona_consistency", "Persona C"),
    Row("hits_1", "hits@1"),
    Row("hits_1_total", "hits@1, total"),
)
"""Figures beside the paper's, each where the runs have it."""


@dataclass(frozen=True)
class Cell:
    """One formatted value; `best` where no other column has a better one and at least one is worse."""

    text: str
    best: bool = False


def table_cells(columns: Mapping[str, Column], rows: Sequence[Row] = ROWS) -> list[tuple[Row, list[Cell]]]:
    """The formatted cells of each row, in the order of `columns`; rows that no column has a value for are left out.

    Args:
      columns: Name of a model -> its figures; None, NaN or an absent name is a missing value.
      rows: Which figures, in which order.

    Raises:
      UserError: There is no column, or a value is not a number.
    """
    if not columns:
        raise UserError("The table of results needs at least one column of figures; none was given.")
    table = []
    for row in rows:
        if row.key == "usage":
            texts = [_format_shares(prompt_usage(column)) for column in columns.values()]
            cells = [Cell(text) for text in texts]
        else:
            values = [_number(row.key, column.get(row.key)) for column in columns.values()]
            cells = _mark_best(values, row)
        if any(cell.text != MISSING for cell in cells):
            table.append((row, cells))
    return table


def rich_table(columns: Mapping[str, Column], rows: Sequence[Row] = ROWS, title: str | None = None) -> Table:
    """The table for `rich.console.Console.print`; the best value of a row is bold.

    Args:
      columns: Name of a model -> its figures.
      rows: Which figures, in which order.
      title: Shown above the table.

    Raises:
      UserError: As `table_cells`.
    """
    cells = table_cells(columns, rows)
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for name in columns:
        table.add_column(escape(name), justify="right")
    for row, values in cells:
        table.add_row(row.label, *(f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in values))
    return table


def markdown_table(columns: Mapping[str, Column], rows: Sequence[Row] = ROWS) -> str:
    """The table in Markdown, for a README; the best value of a row is bold.

    Args:
      columns: Name of a model -> its figures.
      rows: Which figures, in which order.

    Raises:
      UserError: As `table_cells`.
    """
    lines = [["", *(name.replace("|", "\\|") for name in columns)], ["---", *("---:" for _ in columns)]]
    for row, values in table_cells(columns, rows):
        lines.append([row.label, *(f"**{cell.text}**" if cell.best else cell.text for cell in values)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def prompt_usage(column: Column) -> list[float] | None:
    """Share of turns that selected each prompt, [K] in [0, 1]; None where unknown."""
    shares = column.get("usage") or []
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        raise UserError(f"The figure 'usage' is a list with one share for each prompt, not {shares!r}.")
    numbers = [_number("usage", share) for share in shares]
    known = [number for number in numbers if number is not None]
    return known if known and len(known) == len(numbers) else None


def format_number(value: float, digits: int = 2) -> str:
    """A number with `digits` decimals, fewer from a thousand on, with thousands separated: 31.28, 1,204.5, 48,312."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    digits = max(0, digits - 2) if abs(value) >= 1e4 else max(0, digits - 1) if abs(value) >= 1e3 else digits
    return f"{value:,.{digits}f}".replace("-", "−")


def _mark_best(values: Sequence[float | None], row: Row) -> list[Cell]:
    texts = [MISSING if value is None else format_number(value, row.digits) for value in values]
    known = [value for value in values if value is not None]
    best: str | None = None
    if row.better and known:
        best = format_number(min(known) if row.better == "low" else max(known), row.digits)
        # Compared as shown: a difference that the table hides is no difference to its reader.
        if {text for text in texts if text != MISSING} == {best}:
            best = None
    return [Cell(text, text == best) for text in texts]


def _format_shares(shares: Sequence[float] | None) -> str:
    return MISSING if not shares else " / ".join(f"{100.0 * share:.0f}" for share in shares) + " %"


def _number(key: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"The figure {key!r} is a number, not {value!r}.") from None
    return None if math.isnan(number) else number
