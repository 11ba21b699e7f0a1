"""Runs side by side: one table of figures with intervals, mean change over a baseline and paired significance.

RUN... are working directories that spt-jax evaluate has measured on the same dialogues. Runs whose configurations
differ in the seed alone share a row, mean and standard deviation. The first run's row is the baseline unless --baseline
names another. --out also writes table.csv, table.tex, table.html and comparison.json.

Examples:
  spt-jax compare runs/prompt_tuning runs/spt
  spt-jax compare --baseline=runs/pt0 --out=comparison runs/pt0 runs/pt1 runs/spt0 runs/spt1
  spt-jax compare --bertscore=microsoft/deberta-xlarge-mnli runs/prompt_tuning runs/spt
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from spt_jax.commands.shown_text import shown_line
from spt_jax.commands.workdirs import local_workdir
from spt_jax.errors import UserError
from spt_jax.user_paths import present

ARGUMENTS: dict[str, Any] = {"positional": "runs"}
"""How `spt_jax.commands.flag_reading.read_flags` reads this door's arguments."""


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_multi_string("runs", [], "Working directories of evaluated runs, which may also stand alone.", **fv)
    flags.DEFINE_string("baseline", "", "The run that the others are compared with; else the first.", **fv)
    flags.DEFINE_string("out", "", "Folder for the table as CSV, LaTeX and HTML and for all figures as JSON.", **fv)
    flags.DEFINE_integer("samples", 10_000, "Bootstrap resamples and randomisation draws.", lower_bound=100, **fv)
    flags.DEFINE_integer("seed", 0, "Of the resamples and draws.", lower_bound=0, **fv)
    flags.DEFINE_bool("group", True, "Give runs that differ in the seed alone one row.", **fv)
    flags.DEFINE_string(
        "bertscore",
        "",
        "Compute BERTScore with this encoder (a folder, a hub id or package:NAME) instead of taking the evaluations'.",
        **fv,
    )
    flags.DEFINE_integer(
        "bertscore_layers",
        0,
        "Layers of the encoder that are used; 0 for those that bert-score knows to be best, else all.",
        lower_bound=0,
        **fv,
    )


def run(flag_values: flags.FlagValues) -> int:
    """Compares; returns the exit code.

    Raises:
        UserError: No run is given, one has not been evaluated, or they cannot be compared.
    """
    given: Any = flag_values.flag_values_dict()
    if not given["runs"]:
        raise UserError("no run is given; name the working directories of evaluated runs, as in: compare runs/a runs/b")
    out = Path(given["out"]) if given["out"] else None
    if out is not None and present(out, "--out") and not out.is_dir():
        raise UserError(f"--out={out} is a file; allowed: a folder, new or old")
    from rich.console import Console

    from spt_jax.evaluation.bert_score import check_bert_score
    from spt_jax.evaluation.comparability import check_comparable, find_baseline
    from spt_jax.evaluation.comparison import compare_runs
    from spt_jax.evaluation.comparison_tables import explanations, rich_tables
    from spt_jax.evaluation.evaluated_runs import group_by_seed, read_run
    from spt_jax.progress import ProgressBar

    if given["bertscore"]:
        check_bert_score(given["bertscore"], given["bertscore_layers"])
    elif given["bertscore_layers"]:
        raise UserError("--bertscore_layers needs --bertscore, the encoder whose layers they are")
    names = [name.rstrip("/") or name for name in given["runs"]]
    runs = [read_run(name, local_workdir(name)) for name in names]
    check_comparable(runs)
    find_baseline(group_by_seed(runs, group=given["group"]), given["baseline"])
    with ProgressBar("comparing runs", (3 if given["bertscore"] else 2) * len(runs)) as bar:
        comparison = compare_runs(
            runs,
            baseline=given["baseline"],
            samples=given["samples"],
            seed=given["seed"],
            group=given["group"],
            bert_score_model=given["bertscore"],
            bert_score_layers=given["bertscore_layers"],
            on_step=bar.advance,
        )
    console = Console()
    for table in rich_tables(comparison, console.width):
        console.print(table)
    for line in explanations(comparison):
        console.print(shown_line(line), markup=False, highlight=False)
    if out is not None:
        _write(out, comparison)
        print(f"\nwritten: {', '.join(str(out / name) for name in ('table.csv', 'table.tex', 'table.html'))}")
        print(f"every figure: {out / 'comparison.json'}")
    return 0


def _write(out: Path, comparison: Any) -> None:
    from spt_jax.atomic_file import write_atomically
    from spt_jax.evaluation.comparison_tables import csv_text, html_text, json_value, latex_text

    figures = json.dumps(json_value(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = {
        "table.csv": csv_text(comparison),
        "table.tex": latex_text(comparison),
        "table.html": html_text(comparison),
        "comparison.json": figures,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made: {error.strerror}") from error
    for name, text in files.items():
        write_atomically(out / name, text)
