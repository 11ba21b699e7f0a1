"""Evaluates the best checkpoint of a run on held-out dialogues.

Writes predictions.jsonl, results.json and report.html into the workdir and prints the table. Beside the trained bank
it measures the LM without a soft prompt and the bank before training, unless --nobaselines.

Examples:
  spt-jax evaluate --workdir=runs/quickstart
  spt-jax evaluate --workdir=runs/quickstart --data=valid.txt --limit=100
  spt-jax evaluate --workdir=runs/quickstart --nobaselines --checkpoint=latest
"""

from __future__ import annotations

from typing import Any

from absl import flags

from spt_jax.errors import UserError


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "Working directory of a trained run.", **fv)
    flags.DEFINE_string("checkpoint", "best", "Which checkpoint: best, latest or a step's number.", **fv)
    flags.DEFINE_string("data", "", "Dialogues; the run's own test dialogues when empty.", **fv)
    flags.DEFINE_integer("limit", 0, "Use the first so many dialogues; 0 for all.", lower_bound=0, **fv)
    flags.DEFINE_bool("baselines", True, "Also measure no soft prompt and the bank before training.", **fv)
    flags.DEFINE_integer("replies", None, "Turns that get a reply; overrides evaluation.replies.", lower_bound=0, **fv)


def run(flag_values: flags.FlagValues) -> int:
    """Evaluates; returns the exit code."""
    given: Any = flag_values.flag_values_dict()
    if not given["workdir"]:
        raise UserError("--workdir is missing; give the working directory of a trained run")
    from rich.console import Console

    from spt_jax.commands.restored import open_run
    from spt_jax.evaluation.run_evaluation import evaluate_run, write_results
    from spt_jax.evaluation.table import rich_table
    from spt_jax.training.experiment import read_source, read_splits

    restored = open_run(given["workdir"], given["checkpoint"])
    source = given["data"]
    if source:
        dialogues = list(read_source(restored.config, source, "test").dialogues)
    else:
        source = restored.config.data.test or f"{restored.config.data.train} (held out)"
        dialogues = read_splits(restored.config).test
    dialogues = dialogues[: given["limit"] or None]
    evaluation = evaluate_run(
        restored.experiment,
        restored.trainable,
        restored.initial if given["baselines"] else None,
        dialogues,
        replies=given["replies"],
    )
    chat = f"spt-jax chat --workdir={given['workdir']}"
    write_results(restored.workdir, evaluation, restored.config, source=source, step=restored.step, chat=chat)
    print()
    Console().print(rich_table(evaluation.results["columns"]))
    for sample in evaluation.samples[:3]:
        print(f"\npersona: {' '.join(sample['persona'])}\n  they say: {sample['history'][-1]}")
        print(f"  prompt {sample['selected']} answers: {sample['replies'][sample['selected']]}")
    print(f"\nreport: {restored.workdir / 'report.html'}\ntalk to it: {chat}")
    return 0
