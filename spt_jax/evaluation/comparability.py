"""What of several runs can be compared: the same turns, the same BERTScore, the same tokens; the rest is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from spt_jax.errors import UserError, nearest
from spt_jax.evaluation.bert_score import bert_scores
from spt_jax.evaluation.evaluated_runs import CHECKPOINT, EvaluatedRun, RunGroup, differing_settings
from spt_jax.evaluation.evaluation_files import OF_REPLIES, turn_name
from spt_jax.evaluation.resampling import KEPT

_FEW_DIALOGUES = 20
_UNTOLD_BY_OLDER_RUNS = ("generation.", CHECKPOINT)  # which decoded greedily, as the defaults do
_TURNS_SCORED = 1024  # at once by BERTScore, which keeps the hidden states of all their texts


def check_comparable(runs: Sequence[EvaluatedRun]) -> None:
    """Refuses runs whose figures cannot stand side by side.

    Raises:
        UserError: A run is given twice, or two were not evaluated on the same turns: the first difference is named, a
            turn that one run answers and another does not, or a reference.
    """
    seen: set[Path] = set()
    for run in runs:
        path = Path(run.name).resolve()
        if path in seen:
            raise UserError(f"the run {run.name} is given twice; give each run once")
        seen.add(path)
    for run in runs[1:]:
        difference = _first_difference(runs[0], run)
        if difference:
            raise UserError(f"{runs[0].name} and {run.name} were not evaluated on the same turns: {difference}")


def _first_difference(first: EvaluatedRun, second: EvaluatedRun) -> str:
    here = {(int(d), int(t)): text for d, t, text in zip(first.dialogue, first.turn, first.references, strict=True)}
    there = {(int(d), int(t)): text for d, t, text in zip(second.dialogue, second.turn, second.references, strict=True)}
    for place in sorted(here | there):
        if place not in here or place not in there:
            having, lacking = (first, second) if place in here else (second, first)
            return f"{turn_name(*place)} has a reply in {having.name}, none in {lacking.name}"
        if here[place] != there[place]:
            return (
                f"the reference of {turn_name(*place)} is {here[place]!r} in {first.name} and {there[place]!r} in "
                f"{second.name}"
            )
    return ""


def find_baseline(groups: Sequence[RunGroup], wanted: str) -> int:
    """The place of the group that holds the run, or has the label, `wanted`; the first one where it is empty.

    Raises:
        UserError: There is none.
    """
    if not wanted:
        return 0
    for i, group in enumerate(groups):
        if wanted == group.label or Path(wanted).resolve() in [Path(run.name).resolve() for run in group.runs]:
            return i
    allowed = [run.name for group in groups for run in group.runs]
    raise UserError(f"the baseline {wanted} is not among the runs: {', '.join(allowed)}.{nearest(wanted, allowed)}")


def bert_of_runs(
    runs: Sequence[EvaluatedRun],
    model: str,
    notes: list[str],
    on_step: Callable[[int], None] = lambda runs: None,
    layers: int = 0,
) -> tuple[list[np.ndarray | None], dict[str, str], dict[str, str]]:
    """BERTScore of every run as fractions ``[U, 3]``, None where there is none; definitions; versions of libraries.

    Args:
        runs: On the same turns.
        model: Scores them anew with this encoder; else their evaluations' own scores are taken, if made alike.
        notes: Takes a sentence where scores are left out.
        on_step: Called with numbers that add up to that of the runs, while they are scored anew.
        layers: Of the encoder that are used; 0 leaves the choice to bert-score.
    """
    if model:
        return _scored_anew(runs, model, layers, on_step)
    having = [run for run in runs if run.bert_score is not None]
    sentences = {run.results.get("definitions", {}).get("bert_f1", "") for run in having}
    if len(sentences) > 1:
        notes.append(
            f"BERTScore is left out, for the runs were scored in different ways: {' / '.join(sorted(sentences))} "
            "With --bertscore=MODEL all are scored alike."
        )
        return [None] * len(runs), {}, {}
    definitions = having[0].results.get("definitions", {}) if having else {}
    return [run.bert_score for run in runs], {k: v for k, v in definitions.items() if k.startswith("bert_")}, {}


def kept_of_runs(runs: Sequence[EvaluatedRun], notes: list[str]) -> list[dict[str, np.ndarray]]:
    """What each run's evaluation kept for its replies, without figures that two of them defined differently.

    Args:
        runs: On the same turns.
        notes: Takes a sentence for each figure that is left out.
    """
    differing = []
    for name in KEPT:
        partly = [run.name for run in runs if name in run.figures and name not in run.kept]
        if partly:
            notes.append(f"{name} of {', '.join(partly)} is left out, for it is not known of every reply.")
        sentences = {run.results.get("definitions", {}).get(name, "") for run in runs if name in run.kept}
        if len(sentences) > 1:
            differing.append(name)
            notes.append(f"{name} is left out, for it was computed in different ways: {' / '.join(sorted(sentences))}")
    return [{name: values for name, values in run.kept.items() if name not in differing} for run in runs]


def _scored_anew(
    runs: Sequence[EvaluatedRun], model: str, layers: int, on_step: Callable[[int], None]
) -> tuple[list[np.ndarray | None], dict[str, str], dict[str, str]]:
    # All runs' replies to the same turns go together, so that the encoder reads a reference once, not once a run.
    turns = len(runs[0].references)
    parts, definitions, versions = [], {}, {}
    for start in range(0, turns, _TURNS_SCORED):
        block = slice(start, start + _TURNS_SCORED)
        predictions = [text for run in runs for text in run.predictions[block]]
        found = bert_scores(
            predictions, [text for run in runs for text in run.references[block]], model, num_layers=layers
        )
        parts.append(np.asarray(found.per_pair()).reshape(len(runs), -1, 3))
        definitions, versions = found.definitions, found.versions
        before, after = (len(runs) * done // turns for done in (start, min(start + _TURNS_SCORED, turns)))
        on_step(after - before)
    return list(np.concatenate(parts, axis=1)), definitions, versions


def same_tokens(groups: Sequence[RunGroup], baseline: int, notes: list[str]) -> list[bool]:
    """Whether each group's perplexity is over the baseline's target tokens; `notes` takes a sentence on the others.

    None is where the baseline's own are not known, or not the same in all of its runs.
    """
    tokens = groups[baseline].runs[0].target_tokens
    same, others = [], []
    for group in groups:
        found = [run.target_tokens for run in group.runs]
        same.append(tokens is not None and all(t is not None and np.array_equal(t, tokens) for t in found))
        if tokens is not None and any(t is not None and not np.array_equal(t, tokens) for t in found):
            others.append(group.label)
    if others:
        notes.append(
            f"The perplexity of {', '.join(others)} is per token of another tokenizer, or of other texts, than the "
            "baseline's: the two cannot be compared, so it has neither change nor test, and no perplexity is marked as "
            "the best."
        )
    return [found and same[baseline] for found in same]


def remarks(groups: Sequence[RunGroup], dialogues: int) -> list[str]:
    """What a reader must know about how the runs, which answer the same turns, were evaluated: sentences."""
    runs = [run for group in groups for run in group.runs]
    notes = [*_told_otherwise(runs, "personas"), *_told_otherwise(runs, "histories")]
    run = runs[0]
    turns = run.results.get("turns", len(run.references))
    if turns > len(run.references):
        notes.append(f"Figures are of the {len(run.references)} turns that have a reply, of {turns}.")
    if dialogues == 1:
        notes.append("One dialogue tells of no spread, so there are no intervals.")
    elif dialogues < _FEW_DIALOGUES:
        notes.append(f"With {dialogues} dialogues, intervals and p-values are rough.")
    untold = [group.label for group in groups if any(r.nll is None or r.target_tokens is None for r in group.runs)]
    if untold:
        notes.append(
            f"The perplexity of {', '.join(untold)} is that of results.json, without interval and compared with no "
            "other, for predictions.jsonl does not say how many tokens each response has."
        )
    ways = differing_settings(groups, "evaluation.") | differing_settings(groups, "generation.")
    recorded = (*OF_REPLIES, CHECKPOINT, *{name for run in runs for name in run.results.get("settings", {})})
    for name, values in ways.items():
        if not name.startswith(recorded):
            continue  # a flag may have overridden it, which nothing tells
        told = list(zip(values, groups, strict=True))
        if name.startswith(_UNTOLD_BY_OLDER_RUNS):
            told = [(value, group) for value, group in told if value is not None]
        if any(value != told[0][0] for value, _ in told):
            shown = ", ".join(f"{value!r} ({group.label})" for value, group in told)
            notes.append(f"The runs were evaluated with different {name}: {shown}.")
    return notes


def _told_otherwise(runs: Sequence[EvaluatedRun], what: str) -> list[str]:
    """A sentence where the ``"personas"`` or ``"histories"`` behind the same turns differ among runs that tell them."""
    first, *others = [run for run in runs if getattr(run, what) is not None] or [runs[0]]
    differing: dict[str, list[int]] = {}
    for run in others:
        pairs = zip(getattr(first, what), getattr(run, what), strict=True)
        if found := [u for u, (here, there) in enumerate(pairs) if here != there]:
            differing[run.name] = found
    if not differing:
        return []
    turns = sorted(set().union(*differing.values()))
    place = turn_name(int(first.dialogue[turns[0]]), int(first.turn[turns[0]]))
    return [
        f"The {what} behind {len(turns)} of {len(first.references)} turns, {place} the first, are not the same in "
        f"{', '.join(differing)} as in {first.name}."
    ]
