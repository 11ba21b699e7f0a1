"""The evaluation of a run: the columns of the table, the predictions, the samples and the report."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spt_jax.atomic_file import write_atomically
from spt_jax.config import Config, flatten
from spt_jax.data.dialogue import Dialogue
from spt_jax.data.template import PlainTemplate, Template
from spt_jax.errors import UserError
from spt_jax.evaluation.columns import Column, ColumnEvaluator, ColumnOptions
from spt_jax.evaluation.diagnostics import diagnose
from spt_jax.evaluation.evaluation_files import OF_REPLIES
from spt_jax.evaluation.journal import Journal
from spt_jax.evaluation.reply_writer import ReplyWriter
from spt_jax.evaluation.report import ReportInputs, write_report
from spt_jax.evaluation.spread import spread_evenly
from spt_jax.evaluation.told_dialogues import told_dialogues
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.replies import cut_reply_official
from spt_jax.parallel.distributed import is_lead
from spt_jax.progress import ProgressBar
from spt_jax.prompting.adapters import Trainable
from spt_jax.prompting.selective_lm import inference_conditions, without_prompt
from spt_jax.training.description import front_length
from spt_jax.training.experiment import Experiment, pack_dialogues, pad_id_of, rows_remark
from spt_jax.training.tracking import METRICS_FILE, logged_rows
from spt_jax.training.workdir import write_json

NO_PROMPT, BEFORE, AFTER = "no soft prompt", "before training", "after training"
PACKAGES = ("spt_jax", "jax", "flax", "transformers")
_OFFICIAL = (*OF_REPLIES, "evaluation.batch")
"""The same in the official mode, whose scores depend on the rows of their batch."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` found.

    Attributes:
        results: As ``results.json``.
        predictions: One object a reply, in file order, as ``predictions.jsonl``.
        samples: A few turns with the replies under every prompt, as the report shows them.
        selection: One object a dialogue: which prompts its turns select.
        dialogues: For the report's browser, see `told_dialogues`.
    """

    results: dict[str, Any]
    predictions: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    selection: list[dict[str, Any]]
    dialogues: list[dict[str, Any]]


def evaluate_run(
    experiment: Experiment,
    trainable: Trainable,
    initial: Trainable | None,
    dialogues: Sequence[Dialogue],
    *,
    template: Template | None = None,
    replies: int | None = None,
    journal: Journal | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measures a trained tree on dialogues.

    Several processes that share the mesh make the same call and find the same; the first alone keeps a journal.

    Args:
        experiment: The LM, mesh and configuration.
        trainable: The trained tree.
        initial: The tree before training; when given, it and the LM without a prompt are measured too. For a method
            that begins as the LM itself it is empty, and measured as that alone.
        dialogues: At least one.
        template: How their rows are written; None for the paper's template.
        replies: How many turns get a reply, 0 for all; None takes ``evaluation.replies``.
        journal: What an evaluation of the same question that was stopped has left, and where this one writes.
        say: Told, on the first process alone, of rows that lost text or turns.

    Raises:
        UserError: There is no dialogue.
    """
    if not dialogues:
        raise UserError("there is no dialogue to evaluate on")
    config, model = experiment.config, experiment.model
    options = config.evaluation
    template = template or PlainTemplate()
    packed = pack_dialogues(config, dialogues, experiment.lm.tokenizer, template)
    if is_lead() and (remark := rows_remark(config, "to evaluate on", packed)):
        say(remark)
    rows = packed.rows
    how = ColumnOptions(
        batch_size=options.batch,
        max_buckets=config.data.max_buckets,
        max_new_tokens=options.max_new_tokens,
        cut=cut_reply_official if model.official else template.cut,
        decoding=Decoding.of(config.generation),
        template=template,
        pad_id=pad_id_of(config, experiment.lm.tokenizer),
        end_id=template.end_id(experiment.lm.tokenizer),
        replies=options.replies if replies is None else replies,
        metrics=options.metrics,
        selection=options.selection,
        selection_noise=options.selection_noise,
        score_temperature=config.objective.score_temperature,
        bert_score_model=options.bertscore,
        bert_score_layers=options.bertscore_layers,
        nli_model=options.nli,
        seed=config.seed if options.seed == -1 else options.seed,
        front=front_length(config),
    )
    evaluator = ColumnEvaluator(experiment.lm, experiment.mesh, dialogues, rows, how)
    banks = {AFTER: (model, trainable)}
    if initial is not None and trainable:
        before = {BEFORE: (model, initial)} if initial else {}
        banks = {NO_PROMPT: (without_prompt(model), {}), **before, **banks}
    columns: dict[str, Column] = {}
    for name, (described, tree) in banks.items():
        kept = None if journal is None else journal.column(name)
        columns[name] = evaluator.run(described, tree, partial(_bar, name), kept)
    after = columns[AFTER]
    chosen = spread_evenly(len(after.answered), options.samples) if options.samples else np.array([], np.int64)
    samples = []
    if len(chosen):
        writer = evaluator.writer(model, inference_conditions(model, experiment.lm.params, trainable))
        samples = _samples(evaluator, writer, model.num_prompts, columns, dialogues, chosen)
    personas = [dialogue.persona for dialogue in dialogues]
    diagnostics = diagnose(experiment, trainable, rows, after.likelihoods, personas)
    predictions = _predictions(evaluator, columns, dialogues)
    return Evaluation(
        _results(experiment, columns, evaluator) | {"diagnostics": diagnostics},
        predictions,
        samples,
        _selection(after, len(dialogues)) if model.retriever_config else [],
        [] if template.learns_persona else told_dialogues(dialogues, predictions, samples),
    )


def _bar(column: str, what: str, total: int) -> ProgressBar:
    return ProgressBar(f"{what}, {column}", total, shown=is_lead())


def _results(experiment: Experiment, columns: dict[str, Column], evaluator: ColumnEvaluator) -> dict[str, Any]:
    after = columns[AFTER]
    device = jax.devices()[0]
    changing = _OFFICIAL if experiment.model.official else OF_REPLIES
    return {
        "columns": {name: column.figures for name, column in columns.items()},
        "turns": evaluator.turns,
        "replies": len(evaluator.answered),
        "definitions": after.definitions,
        "notes": evaluator.notes(after),
        "settings": {name: value for name, value in flatten(experiment.config).items() if name.startswith(changing)},
        "versions": after.metrics.versions | {name: metadata.version(name) for name in PACKAGES},
        "model": experiment.lm.identity.to_dict(),
        "hardware": {
            "devices": f"{jax.device_count()} × {device.device_kind}",
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
    }


def _predictions(
    evaluator: ColumnEvaluator, columns: dict[str, Column], dialogues: Sequence[Dialogue]
) -> list[dict[str, Any]]:
    after = columns[AFTER]
    ranked = evaluator.ranked
    predictions = []
    for place, u in enumerate(after.answered):
        d, t = int(after.likelihoods.dialogue[u]), int(after.likelihoods.turn[u])
        predictions.append(
            {
                "dialogue": d,
                "turn": t,
                "persona": list(dialogues[d].persona),
                "history": evaluator.history(d, t),
                "reference": evaluator.reference(d, t),
                "prediction": after.replies[place],
                "selected": int(after.likelihoods.selected[u]),
                "scores": after.likelihoods.scores[u].tolist(),
                "nll": after.likelihoods.nll[u].tolist(),
                "target_tokens": int(after.likelihoods.tokens[u]),
            }
            | {name: found[place] for name, found in after.metrics.per_pair.items()}
            | _hit(after, ranked.get((d, t)))
        )
    return predictions


def _hit(column: Column, place: int | None) -> dict[str, bool]:
    if column.hits is None or place is None:
        return {}
    return {"hits_1": bool(column.hits.by_mean[place]), "hits_1_total": bool(column.hits.by_total[place])}


def _samples(
    evaluator: ColumnEvaluator,
    writer: ReplyWriter,
    num_prompts: int,
    columns: dict[str, Column],
    dialogues: Sequence[Dialogue],
    chosen: np.ndarray,
) -> list[dict[str, Any]]:
    after = columns[AFTER]
    turns = after.answered[chosen]
    keys = [(int(after.likelihoods.dialogue[u]), int(after.likelihoods.turn[u])) for u in turns]
    with ProgressBar("replying under every prompt", len(keys) * num_prompts, shown=is_lead()) as bar:
        repeated = [key for key in keys for _ in range(num_prompts)]
        # Every prompt draws as the one did that answered.
        places = np.repeat(chosen, num_prompts).tolist()
        texts = writer.replies(repeated, list(range(num_prompts)) * len(keys), bar, places=places)
    samples = []
    for i, (place, u, (d, t)) in enumerate(zip(chosen, turns, keys, strict=True)):
        sample = {
            "dialogue": d,
            "turn": t,
            "persona": list(dialogues[d].persona),
            "history": evaluator.history(d, t),
            "reference": evaluator.reference(d, t),
            "selected": int(after.likelihoods.selected[u]),
            "replies": texts[i * num_prompts : (i + 1) * num_prompts],
            "own_last": evaluator.learns_persona,
        }
        if NO_PROMPT in columns:
            sample["no_prompt"] = columns[NO_PROMPT].replies[place]
        samples.append(sample)
    return samples


def _selection(column: Column, dialogues: int) -> list[dict[str, Any]]:
    likelihoods = column.likelihoods
    num_prompts = likelihoods.nll.shape[1]
    selection = []
    for d in range(dialogues):
        mine = likelihoods.dialogue == d
        if not mine.any():
            continue  # the authors' program reads its lines as personas and has no turn of it
        selection.append(
            {
                "dialogue": d,
                "scores": likelihoods.scores[mine].mean(axis=0).tolist(),
                "nll": likelihoods.nll[mine].mean(axis=0).tolist(),
                "usage": (np.bincount(likelihoods.selected[mine], minlength=num_prompts) / mine.sum()).tolist(),
            }
        )
    return selection


def write_results(
    workdir: Path,
    evaluation: Evaluation,
    config: Config,
    *,
    source: str,
    checkpoint: str,
    step: int,
    chat: str,
    question: str,
) -> dict[str, Any]:
    """Writes ``results.json``, ``predictions.jsonl`` and ``report.html`` into the working directory.

    Args:
        workdir: Where they go.
        evaluation: What was found.
        config: The run's configuration.
        source: Where the dialogues came from.
        checkpoint: Which one was asked for: ``best``, ``latest`` or a step's number.
        step: The checkpoint's step.
        chat: The command that opens the chat.
        question: What was asked, as `spt_jax.evaluation.kept_results.question` gives it.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: A file cannot be written, or metrics.jsonl not be read.
    """
    results = evaluation.results | {
        "data": source,
        "checkpoint": checkpoint,
        "step": step,
        "samples": evaluation.samples,
        "question": question,
    }
    report = ReportInputs(
        title="Selective Prompt Tuning",
        results=results,
        metrics=logged_rows(workdir / METRICS_FILE),
        selection=evaluation.selection,
        samples=evaluation.samples,
        dialogues=evaluation.dialogues,
        config=config.to_dict(),
        command=chat,
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions]
    # It vouches for the other two: gone before the first of them is another one, and written last.
    (workdir / "results.json").unlink(missing_ok=True)
    write_atomically(workdir / "predictions.jsonl", "".join(lines))
    write_report(workdir / "report.html", report)
    write_json(workdir / "results.json", results)
    return results
