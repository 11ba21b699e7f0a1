"""Evaluates the best checkpoint of a run on held-out dialogues.

Writes predictions.jsonl, results.json and report.html into the workdir and prints the table. Beside the trained bank
it measures the LM without a soft prompt and the bank before training, unless --nobaselines. One that is killed goes on
where it was when the same command is given again. Several processes share the work as in training; the first writes.

Examples:
  spt-jax evaluate --workdir=runs/quickstart
  spt-jax evaluate --workdir=runs/quickstart --data=valid.txt --limit=100
  spt-jax evaluate --workdir=runs/quickstart --nobaselines --checkpoint=latest --beams=10 --no_repeat_ngram=4
  spt-jax evaluate --workdir=runs/quickstart --metrics=default,meteor,hits --data=valid_self_original.txt
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from spt_jax.commands.data_flags import define_on_error, reading_of
from spt_jax.commands.decoding_flags import define_decoding_flags, given_decoding
from spt_jax.commands.joining import define_joining_flags, joined_processes
from spt_jax.commands.workdirs import evaluated_in
from spt_jax.errors import UserError
from spt_jax.metric_groups import GROUPS, chosen_groups
from spt_jax.step_names import names_a_step

if TYPE_CHECKING:
    from spt_jax.data.dialogue import Dialogue
    from spt_jax.evaluation.kept_results import Question

_SAMPLES_PRINTED = 3
_OPTIONS = ("batch", "bertscore", "bertscore_layers", "nli", "max_new_tokens", "seed")
"""Flags that override an option of the run's section ``evaluation``, as they are."""


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "Working directory of a trained run, a folder or a bucket's.", **fv)
    flags.DEFINE_string("checkpoint", "best", "Which checkpoint: best, latest or a step's number.", **fv)
    flags.DEFINE_string("data", "", "Dialogues, in any format that data.train takes; else the run's data.test.", **fv)
    define_on_error(flag_values)
    flags.DEFINE_enum(
        "split",
        "test",
        ["test", "development", "train"],
        "Which part of the run's data, or of --data where that has parts.",
        **fv,
    )
    flags.DEFINE_integer("limit", 0, "Use the first so many dialogues; 0 for all.", lower_bound=0, **fv)
    flags.DEFINE_integer("batch", None, "Rows at once; else the run's evaluation.batch.", lower_bound=1, **fv)
    flags.DEFINE_list(
        "metrics",
        None,
        "Groups of figures, by commas; else the run's evaluation.metrics. default stands for all that take nothing but "
        f"the replies and the LM ({', '.join(name for name, group in GROUPS.items() if group.everyday)}); by name "
        f"alone: {', '.join(f'{name} (needs {group.needs})' for name, group in GROUPS.items() if group.needs)}.",
        **fv,
    )
    flags.DEFINE_string("bertscore", None, "Encoder of BERTScore; else the run's evaluation.bertscore.", **fv)
    flags.DEFINE_integer(
        "bertscore_layers",
        None,
        "Layers of the encoder that are used; 0 for those that bert-score knows to be best, else all. Else the run's "
        "evaluation.bertscore_layers.",
        lower_bound=0,
        **fv,
    )
    flags.DEFINE_string("nli", None, "Classifier of entailment; else the run's evaluation.nli.", **fv)
    flags.DEFINE_bool("baselines", True, "Also measure no soft prompt and the bank before training.", **fv)
    flags.DEFINE_bool(
        "reuse",
        False,
        "Take what the last evaluation found: its results, where they answer the same question, or its likelihoods and "
        "replies, where only other figures or columns are asked for.",
        **fv,
    )
    flags.DEFINE_integer(
        "replies",
        None,
        "Turns that get a reply, spread evenly over the dialogues; 0 for every turn. Else the run's "
        "evaluation.replies. Likelihoods are always those of every turn.",
        lower_bound=0,
        **fv,
    )
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "Tokens in a reply, at most. Else the run's evaluation.max_new_tokens.",
        lower_bound=1,
        **fv,
    )
    flags.DEFINE_integer(
        "seed",
        None,
        "Seed of draws and of noise on scores. Else the run's evaluation.seed.",
        lower_bound=-1,
        upper_bound=2**31 - 1,
        **fv,
    )
    define_decoding_flags(flag_values)
    define_joining_flags(flag_values)


def run(flag_values: flags.FlagValues) -> int:
    """Evaluates; returns the exit code.

    Raises:
        UserError: There is no run or no checkpoint, or the dialogues cannot be used.
    """
    given: Any = flag_values.flag_values_dict()
    if not given["workdir"]:
        raise UserError("--workdir is missing; give the working directory of a trained run")
    decoding = given_decoding(flag_values)
    with joined_processes("spt-jax evaluate", flag_values):
        return evaluated_in(
            given["workdir"], given["checkpoint"], print, lambda workdir: _evaluate(given, decoding, workdir)
        )


def _evaluate(given: dict[str, Any], decoding: dict[str, Any], workdir: Path) -> int:
    from spt_jax.commands.restored import demonstrations_of, heldout_dialogues
    from spt_jax.config import validate
    from spt_jax.evaluation.kept_results import kept_results, question
    from spt_jax.parallel.distributed import any_process, is_lead
    from spt_jax.training.checkpoint import Checkpoints
    from spt_jax.training.experiment import check_room, open_lm_of
    from spt_jax.training.workdir import CHECKPOINT_FOLDER, read_config

    config, _, _ = read_config(workdir)
    options = {name: given[name] for name in _OPTIONS if given[name] is not None}
    if given["metrics"] is not None:
        options["metrics"] = tuple(given["metrics"])
    config.evaluation.update(options)
    config.generation.update(decoding)
    _check_scorers(config.evaluation)
    validate(config)
    with Checkpoints(workdir / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
        checkpoints.check(given["checkpoint"])
        checkpoint = checkpoints.meta(given["checkpoint"])
    lm = open_lm_of(config)
    check_room(config, lm)
    source, dialogues = heldout_dialogues(
        reading_of(config, given), workdir, given["data"], given["limit"], given["split"]
    )
    ask = functools.partial(
        question,
        config,
        lm=lm,
        dialogues=dialogues,
        baselines=given["baselines"],
        replies=given["replies"],
        demonstrations=demonstrations_of(config, workdir),
    )
    asked = ask(checkpoint).whole if checkpoint else ""
    _check_same(asked)
    chat = f"spt-jax chat --workdir={shlex.quote(given['workdir'])}"
    results = kept_results(workdir, asked) if given["reuse"] and is_lead() else None
    if not any_process(results is not None):
        changes = {"evaluation": options, "generation": decoding}
        results = _measured(given, changes, workdir, dialogues, source=source, chat=chat, ask=ask)
    if results is not None:
        _show(results)
        print(f"\nreport: {workdir / 'report.html'}\ntalk to it: {chat}")
    return 0


def _check_same(asked: str) -> None:
    """Refuses processes that would evaluate different things, and wait for one another for ever."""
    from spt_jax.parallel.distributed import told_by_lead

    if told_by_lead(asked.encode()).decode() != asked:
        raise UserError(
            "this process was asked for another evaluation than the first: each must be given the same flags, and find "
            "the same checkpoints and the same dialogues under the names in them"
        )


def _measured(
    given: dict[str, Any],
    changes: dict[str, dict[str, Any]],
    workdir: Path,
    dialogues: Sequence[Dialogue],
    *,
    source: str,
    chat: str,
    ask: Callable[[dict[str, Any]], Question],
) -> dict[str, Any] | None:
    """What ``results.json`` holds now; None for a process that is not the first of several, which wrote nothing."""
    from spt_jax.atomic_file import check_writable
    from spt_jax.commands.restored import open_run
    from spt_jax.evaluation.journal import Journal
    from spt_jax.evaluation.run_evaluation import evaluate_run, write_results
    from spt_jax.parallel.distributed import is_lead

    if is_lead():
        check_writable(workdir / "results.json")
    restored = open_run(str(workdir), given["checkpoint"])
    for section, values in changes.items():
        restored.config[section].update(values)
    # While the LM was loaded a training beside this may have saved a later or a better checkpoint.
    question = ask(restored.record)
    _check_same(question.whole)
    journal = Journal(workdir, question.groundwork)
    with contextlib.ExitStack() as stack:
        if is_lead():
            stack.enter_context(journal.locked())
            where = "where an evaluation was stopped"
            if given["reuse"] and journal.reopen():
                where = "from the last evaluation"
            which = "" if names_a_step(given["checkpoint"]) else f"{given['checkpoint']} "
            print(f"{which}checkpoint, step {restored.step}, on {len(dialogues)} dialogues of {source}", flush=True)
            if journal.begun:
                print(f"going on {where}: {journal.begun} replies are there", flush=True)
        evaluation = evaluate_run(
            restored.experiment,
            restored.trainable,
            restored.initial if given["baselines"] else None,
            dialogues,
            template=restored.template,
            replies=given["replies"],
            journal=journal,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if not is_lead():
            return None
        about = {"source": source, "checkpoint": given["checkpoint"], "chat": chat, "question": question.whole}
        results = write_results(workdir, evaluation, restored.config, step=restored.step, **about)
        journal.close()
        return results


def _check_scorers(options: Any) -> None:
    """Says before the work what would stop it at its end."""
    from spt_jax.evaluation.bert_score import PAPERS_MODEL, check_bert_score
    from spt_jax.evaluation.nli import check_nli
    from spt_jax.evaluation.wordnet import WordNetMissingError, find_wordnet

    groups = chosen_groups(options.metrics)
    if "meteor" in groups:
        with contextlib.suppress(WordNetMissingError):  # the evaluation says it beside its figures
            find_wordnet()
    if options.bertscore or "bertscore" in groups:
        check_bert_score(options.bertscore or PAPERS_MODEL, options.bertscore_layers)
    elif options.bertscore_layers:
        raise UserError("BERTScore's layers are named, but neither its group of metrics nor its encoder (--bertscore)")
    if options.nli:
        check_nli(options.nli)
    elif "nli" in groups:
        raise UserError("the group of metrics 'nli' needs a classifier of entailment; --nli names it")


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console

    from spt_jax.commands.shown_text import shown_line
    from spt_jax.evaluation.table import rich_table

    print(f"\n{results['turns']} turns scored, {results['replies']} of them answered")
    Console().print(rich_table(results["columns"]))
    for note in results.get("notes", []):
        print(note)
    soft = results.get("settings", {}).get("evaluation.selection") == "soft"
    mixed = ", the most of the mixture, alone" if soft else ""
    for sample in results["samples"][:_SAMPLES_PRINTED]:
        selected = sample["selected"]
        who = f"soft prompt {selected}{mixed}" if len(sample["replies"]) > 1 else "it"
        said = "the persona says" if sample.get("own_last") else "they say"
        print(f"\npersona: {shown_line(' '.join(sample['persona']))}\n  {said}: {shown_line(sample['history'][-1])}")
        print(f"  {who} answers: {shown_line(sample['replies'][selected]) or '(nothing)'}")
