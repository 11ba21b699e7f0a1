"""Laws of the results' table."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from spt_jax.errors import UserError
from spt_jax.evaluation.table import format_number, markdown_table, prompt_usage, rich_table, table_cells

COLUMNS = {
    "no soft prompt": {"perplexity": 48.21, "f1": 8.9, "dist_1": 20.0, "usage": None},
    "before training": {"perplexity": 61.0, "f1": None, "dist_1": 20.001, "usage": [0.1, 0.6, 0.1, 0.2]},
    "after training": {"perplexity": 27.444, "f1": 15.9, "dist_1": 15.0, "usage": [0.31, 0.22, 0.27, 0.2]},
}


def printed(columns) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(rich_table(columns, title="Held-out dialogues"))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_markdown_holds_every_value_and_marks_the_best_of_each_row() -> None:
    assert markdown_table(COLUMNS).splitlines() == [
        "|  | no soft prompt | before training | after training |",
        "| --- | ---: | ---: | ---: |",
        "| Perplexity per token | 48.21 | 61.00 | **27.44** |",
        "| Token F1 (%) | 8.90 | – | **15.90** |",
        "| DIST-1 (%) | **20.00** | **20.00** | 15.00 |",
        "| Share of each prompt | – | 10 / 60 / 10 / 20 % | 31 / 22 / 27 / 20 % |",
    ]


def test_terminal_and_markdown_show_the_same_cells() -> None:
    text = printed(COLUMNS)
    for row, cells in table_cells(COLUMNS):
        line = next(line for line in text.splitlines() if row.label in line)
        assert [part.strip() for part in line.strip("│").split("│")] == [row.label, *(cell.text for cell in cells)]
    assert "Held-out dialogues" in text


def test_names_are_text_in_the_terminal_and_do_not_break_markdown() -> None:
    columns = {"[red]a|b": {"f1": 1.0}}
    assert "[red]a|b" in printed(columns)
    assert markdown_table(columns).splitlines()[0] == "|  | [red]a\\|b |"


def test_equal_or_single_values_have_no_best() -> None:
    for columns in ({"a": {"f1": 1.0}}, {"a": {"f1": 1.0}, "b": {"f1": 1.001}}, {"a": {"f1": 1.0}, "b": {}}):
        assert not any(cell.best for _, cells in table_cells(columns) for cell in cells)


def test_nan_and_absent_values_are_a_dash_and_empty_rows_are_left_out() -> None:
    rows = {row.key: [cell.text for cell in cells] for row, cells in table_cells({"a": {"f1": math.nan, "bleu": 1}})}
    assert rows == {"bleu": ["1.00"]}


def test_usage_is_whole_or_not_known() -> None:
    assert prompt_usage({"usage": [0.25, 0.75]}) == [0.25, 0.75]
    assert prompt_usage({"usage": [0.25, math.nan]}) is None
    assert prompt_usage({}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (31.278, "31.28"),
        (1204.54, "1,204.5"),
        (48312.4, "48,312"),
        (2.5e7, "2.50e+07"),
        (-1.5, "−1.50"),
        (math.inf, "∞"),
    ],
)
def test_numbers_keep_a_sensible_precision(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "at least one column"),
        ({"a": {"f1": "high"}}, "'f1' is a number, not 'high'"),
        ({"a": {"usage": "31 %"}}, "one share for each prompt"),
    ],
)
def test_what_is_no_table_is_refused(columns, message: str) -> None:
    with pytest.raises(UserError, match=message):
        table_cells(columns)
