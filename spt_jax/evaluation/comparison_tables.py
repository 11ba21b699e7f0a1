"""A comparison as tables: for the terminal, CSV, LaTeX (booktabs), one HTML page, and JSON with every figure."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

import spt_jax
from spt_jax.evaluation.comparison import ComparedRow, Comparison
from spt_jax.evaluation.report_page import details, page, section
from spt_jax.evaluation.report_samples import replies_table, reply_row
from spt_jax.evaluation.table import MISSING, Row, format_number

STARS = ((0.01, "**"), (0.05, "*"))
_CHANGE = "Mean change"
_STAYS = "position: sticky; left: 0; background: var(--card)"  # the runs' names, while a phone scrolls the figures


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure as a reader sees it.

    Attributes:
        value: The figure, or a dash.
        spread: Standard deviation over seeds, empty for one run.
        interval: 95 % interval, empty where unknown.
        stars: Significance of the difference from the baseline.
        worse: Whether a significant difference is on the worse side.
        best: Whether no row has a better value and at least one a worse, where all rows can be compared.
    """

    value: str
    spread: str = ""
    interval: str = ""
    stars: str = ""
    worse: bool = False
    best: bool = False

    def first_line(self) -> str:
        """Value, spread and significance in plain text: ``11.06 ±0.12 ↓**``."""
        spread = f" ±{self.spread}" if self.spread else ""
        return f"{self.value}{spread}{self._mark()}"

    def _mark(self) -> str:
        return f" ↓{self.stars}" if self.worse else self.stars


def figure_cells(comparison: Comparison) -> list[list[Cell]]:
    """The cells of the main table, a list a row in the order of `Comparison.columns`; the mean change is the last."""
    cells = [[_cell(comparison, row, column) for column in comparison.columns] for row in comparison.rows]
    if comparison.baseline:
        for line, row in zip(cells, comparison.rows, strict=True):
            line.append(_change_cell(row))
    return cells


def change_cells(comparison: Comparison) -> list[tuple[str, list[Cell]]]:
    """Change over the baseline in percent with the corrected p-value below, a list for every other row."""
    table = []
    for row in comparison.rows:
        if row.label == comparison.baseline:
            continue
        line = []
        for column in comparison.columns:
            change, p = row.change.get(column.key), row.p_holm.get(column.key)
            shown = MISSING if change is None else _signed(change)
            line.append(Cell(shown, interval="" if p is None else _p_text(p), stars=_stars(p)))
        table.append((row.label, line))
    return table


def rich_tables(comparison: Comparison, width: int) -> Iterator[Table]:
    """Tables for the terminal: figures, then changes; columns that do not fit side by side follow in a further table.

    Args:
        comparison: What was found.
        width: Characters a line.
    """
    labels = [row.label for row in comparison.rows]
    yield from _rich("Figures", labels, _headers(comparison), figure_cells(comparison), width)
    changes = change_cells(comparison) if comparison.baseline else []
    if changes:
        title = f"Change over {comparison.baseline} in percent, corrected p-value below"
        headers = [column.label for column in comparison.columns]
        yield from _rich(title, [label for label, _ in changes], headers, [cells for _, cells in changes], width)


def explanations(comparison: Comparison) -> list[str]:
    """What stands under the table, a sentence each."""
    lines = [
        f"{comparison.replies} replies in {comparison.dialogues} dialogues"
        + (f" of {comparison.data}." if comparison.data else "."),
        f"[a, b]: 95 % interval over dialogues, the trained models given: percentiles of {comparison.samples} "
        "bootstrap resamples of whole dialogues; for DIST and the mean change ±1.96 standard errors of the jackknife "
        "over dialogues. Entropy-4 and self-BLEU have neither interval nor test.",
    ]
    if any(row.spread for row in comparison.rows):
        lines.append("±: standard deviation over seeds; the figure is their mean.")
    if comparison.baseline:
        lines.append(
            f"* p < 0.05, ** p < 0.01 for the difference from {comparison.baseline}, ↓ where it is on the worse side: "
            f"two-sided randomisation test over dialogues ({comparison.samples} draws), Holm's correction over a row's "
            "columns; it tests these trained models on other dialogues, not other seeds."
        )
        lines.append(
            f"{_CHANGE}: mean over the paper's ten columns of 100 (x / b - 1), b the figure of {comparison.baseline}; "
            "no other figure is among them."
        )
    return [*lines, *comparison.notes]


def csv_text(comparison: Comparison) -> str:
    """One line a row; for each figure its value, interval, spread over seeds, change in percent and p-values."""
    parts = ("", "_low", "_high", "_sd", "_change_percent", "_p", "_p_holm")
    header = ["run", "seeds", *(column.key + part for column in comparison.columns for part in parts)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*header, "mean_change_percent", "mean_change_low", "mean_change_high"])
    for row in comparison.rows:
        line: list[Any] = [row.label, " ".join(str(seed.seed) for seed in row.seeds)]
        for key in (column.key for column in comparison.columns):
            low, high = row.intervals.get(key, ("", ""))
            rest = (figures.get(key, "") for figures in (row.spread, row.change, row.p, row.p_holm))
            line += [row.figures.get(key, ""), low, high, *rest]
        low, high = row.mean_change_interval or ("", "")
        writer.writerow([*line, "" if row.mean_change is None else row.mean_change, low, high])
    return file.getvalue()


def latex_text(comparison: Comparison) -> str:
    """A ``table*`` with booktabs' rules, as wide as the page: a line of figures a row, its intervals below in small."""
    headers = _headers(comparison)
    lines = [
        "% \\usepackage{booktabs,graphicx}",
        "\\begin{table*}",
        "\\centering",
        "\\small",
        "\\setlength{\\tabcolsep}{4pt}",
        "\\resizebox{\\textwidth}{!}{%",
        f"\\begin{{tabular}}{{l{'r' * len(headers)}}}",
        "\\toprule",
        " & ".join(["", *map(latex_escape, headers)]) + " \\\\",
        "\\midrule",
    ]
    for row, cells in zip(comparison.rows, figure_cells(comparison), strict=True):
        lines.append(" & ".join([latex_escape(row.label), *map(_latex_cell, cells)]) + " \\\\")
        small = (f"{{\\scriptsize {latex_escape(cell.interval)}}}" if cell.interval else "" for cell in cells)
        lines.append(" & ".join(["", *small]) + " \\\\")
    caption = " ".join(latex_escape(line) for line in explanations(comparison))
    lines += ["\\bottomrule", "\\end{tabular}}", f"\\caption{{{caption}}}", "\\end{table*}", ""]
    return "\n".join(lines)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "−": "$-$",
    "–": "--",
    "↓": "$\\downarrow$",
    "∞": "$\\infty$",
    "α": "$\\alpha$",
    "β": "$\\beta$",
    "γ": "$\\gamma$",
    "×": "$\\times$",
    "<": "$<$",
    ">": "$>$",
    # Behind a line's \\ a bracket would be read as that line's extra space.
    "[": "{[}",
    "]": "{]}",
}


def latex_escape(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


def html_text(comparison: Comparison) -> str:
    """A whole page that loads nothing; wide tables scroll sideways, and figures and intervals never wrap."""
    rows = zip([row.label for row in comparison.rows], figure_cells(comparison), strict=True)
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in explanations(comparison))
    body = [
        "<h1>Comparison of runs</h1>",
        f'<p class="muted">spt_jax {html.escape(spt_jax.__version__)}</p>',
        _tiles(comparison),
        section("Figures", _html_table("Figures", _headers(comparison), list(rows)), f"<br>{notes}"),
    ]
    if comparison.baseline:
        headers = [column.label for column in comparison.columns]
        note = f"In percent of the figure of {comparison.baseline}; p after Holm's correction below."
        body.append(section("Change", _html_table("Change", headers, change_cells(comparison)), note=note))
    if any(len(row.seeds) > 1 for row in comparison.rows):
        body.append(section("Every seed", _seeds_table(comparison), note="With each seed's own 95 % intervals."))
    if comparison.examples:
        examples = [_example(example) for example in comparison.examples]
        body.append(section("Replies side by side", *examples, note="Of each row's first seed, the same turns."))
    terms = "".join(
        f"<dt>{html.escape(column.label)}</dt><dd>{html.escape(comparison.definitions.get(column.key, ''))}</dd>"
        for column in comparison.columns
    )
    libraries = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    body.append(
        section("How it was measured", details("Definitions", f"<dl>{terms}</dl>"), f"<p>{html.escape(libraries)}</p>")
    )
    return page("Comparison of runs", body)


def _example(example: Mapping[str, Any]) -> str:
    asked = example["history"][-1] if example["history"] else ""
    replies = [*example["replies"].items(), ("as it was said", example["reference"])]
    persona = f'<p class="muted">{html.escape(" ".join(example["persona"]))}</p>' if example["persona"] else ""
    said = "".join(f"<p>{html.escape(text)}</p>" for text in example["history"])
    table = replies_table(reply_row(label, reply) for label, reply in replies)
    return details(f"Dialogue {example['dialogue']}, turn {example['turn']}: {asked}", persona + said + table)


def json_value(comparison: Comparison) -> dict[str, Any]:
    """Every figure with its definition, for ``comparison.json``."""
    value = dataclasses.asdict(comparison)
    value["columns"] = [column.key for column in comparison.columns]
    return {"spt_jax": spt_jax.__version__, **value, "explanations": explanations(comparison)}


def _headers(comparison: Comparison) -> list[str]:
    change = [f"{_CHANGE} (%)"] if comparison.baseline else []
    return [column.label for column in comparison.columns] + change


def _cell(comparison: Comparison, row: ComparedRow, column: Row) -> Cell:
    value = row.figures.get(column.key)
    if value is None:
        return Cell(MISSING)
    spread, interval = row.spread.get(column.key), row.intervals.get(column.key)
    stars = _stars(row.p_holm.get(column.key))
    others = [r.figures[column.key] for r in comparison.rows if column.key in r.figures]
    shown = [format_number(other, column.digits) for other in others]
    best = format_number(min(others) if column.better == "low" else max(others), column.digits)
    ranked = column.key not in comparison.unranked
    base = next((r.figures.get(column.key) for r in comparison.rows if r.label == comparison.baseline), None)
    worse = base is not None and (value > base if column.better == "low" else value < base)
    return Cell(
        value=format_number(value, column.digits),
        spread="" if spread is None else format_number(spread, column.digits),
        interval="" if interval is None else _interval(*interval, column.digits),
        stars=stars,
        worse=bool(stars) and worse,
        # Compared as shown, as in the table of results.
        best=ranked and format_number(value, column.digits) == best and set(shown) != {best},
    )


def _change_cell(row: ComparedRow) -> Cell:
    if row.mean_change is None:
        return Cell(MISSING)
    bounds = row.mean_change_interval
    return Cell(_signed(row.mean_change), interval="" if bounds is None else f"[{', '.join(map(_signed, bounds))}]")


def _signed(value: float) -> str:
    shown = format_number(value, 1)
    return shown if shown.startswith("−") or float(f"{value:.1f}") == 0 else f"+{shown}"


def _interval(low: float, high: float, digits: int) -> str:
    return f"[{format_number(low, digits)}, {format_number(high, digits)}]"


def _stars(p: float | None) -> str:
    return "" if p is None else next((stars for bound, stars in STARS if p < bound), "")


def _p_text(p: float) -> str:
    return f"p {p:.3f}" if p >= 0.0005 else f"p {p:.0e}"


def _rich(title: str, labels: list[str], headers: list[str], cells: list[list[Cell]], width: int) -> Iterator[Table]:
    texts = [[[c.first_line(), c.interval] for c in line] for line in cells]
    widths = [max(len(headers[i]), *(len(text) for line in texts for text in line[i])) + 3 for i in range(len(headers))]
    left = max(len(label) for label in labels) + 4
    start = 0
    while start < len(headers):
        end, used = start + 1, left + widths[start]
        while end < len(headers) and used + widths[end] <= width:
            used += widths[end]
            end += 1
        table = Table(title=escape(title) if start == 0 else None, title_justify="left", header_style="bold")
        table.add_column("", no_wrap=True)
        for header in headers[start:end]:
            table.add_column(escape(header), justify="right", no_wrap=True)
        for label, line in zip(labels, cells, strict=True):
            shown = []
            for cell in line[start:end]:
                first = escape(cell.first_line())
                first = f"[bold]{first}[/bold]" if cell.best else first
                shown.append(f"{first}\n[dim]{escape(cell.interval)}[/dim]" if cell.interval else first)
            table.add_row(escape(label), *shown)
        yield table
        start = end


def _latex_cell(cell: Cell) -> str:
    value = latex_escape(cell.value)
    value = f"\\textbf{{{value}}}" if cell.best else value
    spread = f" {{\\scriptsize $\\pm$ {latex_escape(cell.spread)}}}" if cell.spread else ""
    arrow = "\\downarrow" if cell.worse else ""
    mark = f"$^{{{arrow}{cell.stars}}}$" if cell.stars else ""
    return f"{value}{spread}{mark}"


def _tiles(comparison: Comparison) -> str:
    """The mean change of every row at a glance."""
    tiles = []
    for row in comparison.rows:
        if row.mean_change is not None:
            cell = _change_cell(row)
            what = f"{row.label} over {comparison.baseline}, mean change {cell.interval}"
            tiles.append(f'<div class="tile"><b>{html.escape(cell.value)} %</b><span>{html.escape(what)}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _html_table(name: str, headers: list[str], rows: list[tuple[str, list[Cell]]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in headers)
    body = []
    for label, cells in rows:
        shown = []
        for cell in cells:
            interval = f'<br><span class="muted">{html.escape(cell.interval)}</span>' if cell.interval else ""
            best = ' class="best"' if cell.best else ""
            shown.append(f'<td{best} style="white-space: nowrap">{html.escape(cell.first_line())}{interval}</td>')
        body.append(f'<tr><th scope="row" style="{_STAYS}">{html.escape(label)}</th>{"".join(shown)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(name)}"><table class="figures">'
        f'<thead><tr><th scope="col" style="{_STAYS}">Run</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _seeds_table(comparison: Comparison) -> str:
    rows = []
    for row in comparison.rows:
        for seed in row.seeds:
            cells = []
            for column in comparison.columns:
                value, bounds = seed.figures.get(column.key), seed.intervals.get(column.key)
                interval = "" if bounds is None else _interval(*bounds, column.digits)
                cells.append(Cell(MISSING if value is None else format_number(value, column.digits), interval=interval))
            rows.append((f"{row.label}, seed {seed.seed}", cells))
    return _html_table("Every seed", [column.label for column in comparison.columns], rows)
