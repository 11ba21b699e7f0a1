"""Runs side by side: figures with 95 % intervals, the mean change over a baseline, paired significance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spt_jax.evaluation.comparability import (
    bert_of_runs,
    check_comparable,
    find_baseline,
    kept_of_runs,
    remarks,
    same_tokens,
)
from spt_jax.evaluation.diversity import ngram_entropy, self_bleu
from spt_jax.evaluation.evaluated_runs import EvaluatedRun, RunGroup, group_by_seed
from spt_jax.evaluation.resampling import (
    DIST,
    FIGURES,
    CorpusStatistics,
    bootstrap,
    corpus_statistics,
    holm,
    jackknife_interval,
    leave_one_out,
    observed,
    p_values,
    percentile_interval,
    randomised_differences,
)
from spt_jax.evaluation.spread import spread_evenly
from spt_jax.evaluation.table import FURTHER_COLUMNS, PAPER_COLUMNS, PERPLEXITY, Row
from spt_jax.evaluation.text_metrics import metric_definitions, metric_versions, pair_figures
from spt_jax.json_text import is_number

SET_FIGURES = ("entropy_4", "self_bleu")
"""Of all replies together, and no sums over dialogues: they have neither interval nor test."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class SeedFigures:
    """The figures of one run of a row, with 95 % intervals."""

    name: str
    seed: int
    figures: dict[str, float]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class ComparedRow:
    """One row: a run, or several that differ in their seed alone.

    Attributes:
        label: What the reader sees.
        seeds: Its runs.
        figures: Name -> figure, the mean over seeds; names that are not known are absent, here and below.
        intervals: Name -> 95 % interval of `figures` over dialogues, the runs given.
        spread: Name -> standard deviation over seeds (n - 1); empty for one run.
        change: Name -> change over the baseline's figure in percent, where the two can be compared; empty for the
            baseline.
        mean_change: Mean of `change` over the columns of the paper that every row has; None for the baseline.
        mean_change_interval: Its 95 % interval.
        p: Name -> p-value of the difference from the baseline.
        p_holm: The same after Holm's correction over this row's columns.
    """

    label: str
    seeds: tuple[SeedFigures, ...]
    figures: dict[str, float]
    intervals: dict[str, Interval]
    spread: dict[str, float]
    change: dict[str, float] = field(default_factory=dict)
    mean_change: float | None = None
    mean_change_interval: Interval | None = None
    p: dict[str, float] = field(default_factory=dict)
    p_holm: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found.

    Attributes:
        rows: In the order of the runs.
        columns: The figures that at least one row has.
        baseline: The baseline's label; empty with one row.
        replies: How many replies of how many dialogues the figures are of.
        dialogues: As above.
        data: Where the dialogues came from.
        samples: Resamples and draws.
        seed: Of both.
        notes: What a reader must know, sentences.
        definitions: Name of a figure -> one sentence.
        versions: Library -> version.
        examples: Turns with the reply of every row, see `examples_of`.
        unranked: Names of figures that cannot be compared between all rows, so that none is the best.
    """

    rows: tuple[ComparedRow, ...]
    columns: tuple[Row, ...]
    baseline: str
    replies: int
    dialogues: int
    data: str
    samples: int
    seed: int
    notes: tuple[str, ...]
    definitions: dict[str, str]
    versions: dict[str, str]
    examples: tuple[dict[str, Any], ...] = ()
    unranked: tuple[str, ...] = ()


def relative_changes(figures: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Change over the baseline in percent, 100 (x / b - 1), of every figure that both have and whose b is above 0."""
    return {name: 100.0 * (x / baseline[name] - 1.0) for name, x in figures.items() if baseline.get(name, 0) > 0}


def mean_change(figures: Mapping[str, float], baseline: Mapping[str, float]) -> float | None:
    """The paper's mean improvement: the mean relative change over its ten columns, in percent.

    Args:
        figures: Name -> figure.
        baseline: The same of the baseline.

    Returns:
        The mean over the columns that both have and whose baseline is above 0; None where there is none.
    """
    changes = relative_changes(figures, baseline)
    used = [changes[column.key] for column in PAPER_COLUMNS if column.key in changes]
    return float(np.mean(used)) if used else None


def compare_runs(
    runs: Sequence[EvaluatedRun],
    *,
    baseline: str = "",
    samples: int = 10_000,
    seed: int = 0,
    group: bool = True,
    bert_score_model: str = "",
    bert_score_layers: int = 0,
    on_step: Callable[[int], None] = lambda runs: None,
) -> Comparison:
    """Measures runs on the same turns and compares them with a baseline.

    Args:
        runs: At least one.
        baseline: A run's name or a row's label; the first run's row when empty.
        samples: Resamples of the bootstrap and draws of the randomisation test.
        seed: Of both.
        group: Whether runs that differ in their seed alone share a row.
        bert_score_model: Computes BERTScore anew with this encoder; else the evaluations' own are taken.
        bert_score_layers: Layers of it that are used; 0 leaves the choice to bert-score.
        on_step: Called with a number of runs when BERTScore is computed anew, when they are measured, and when their
            row is finished.

    Raises:
        UserError: The runs were not evaluated on the same turns, a run is given twice, or there is no such baseline.
    """
    check_comparable(runs)
    groups = group_by_seed(runs, group=group)
    base = find_baseline(groups, baseline)
    notes: list[str] = []
    bert, definitions, versions = bert_of_runs(runs, bert_score_model, notes, on_step, bert_score_layers)
    vocabulary: dict[str, int] = {}
    statistics: dict[str, CorpusStatistics] = {}
    sets: dict[str, dict[str, float]] = {}
    for run, scores, kept in zip(runs, bert, kept_of_runs(runs, notes), strict=True):
        learns_persona = run.settings.get("data.task") == "persona"  # then nothing is measured against it
        pairs = pair_figures(run.predictions, run.references, None if learns_persona else run.personas)
        likelihoods = {"nll": run.nll, "target_tokens": run.target_tokens}
        statistics[run.name] = corpus_statistics(
            pairs, run.dialogue, vocabulary, bert_score=scores, kept=kept, **likelihoods
        )
        sets[run.name] = {"entropy_4": ngram_entropy(pairs.words), "self_bleu": self_bleu(pairs.words)}
        on_step(1)
    measured = _Measured([statistics[run.name] for run in runs], [run.name for run in runs], sets, samples, seed)
    rows = [_row(found, measured) for found in groups]
    unranked: tuple[str, ...] = ()
    if len(rows) > 1:
        comparable = same_tokens(groups, base, notes)
        if not all(same for same, row in zip(comparable, rows, strict=True) if "perplexity" in row.figures):
            unranked = ("perplexity",)
        shared = [c.key for c in PAPER_COLUMNS if all(c.key in row.figures for row in rows)]
        for i, row in enumerate(rows):
            if i != base:
                apart = () if comparable[i] else ("perplexity",)
                rows[i] = _against(row, rows[base], groups[i], groups[base], measured, shared, apart)
            on_step(len(row.seeds))
    known = (*PAPER_COLUMNS, PERPLEXITY, *FURTHER_COLUMNS)
    columns = tuple(c for c in known if any(c.key in row.figures for row in rows))
    dialogues = measured.statistics[0].dialogues
    notes += [*remarks(groups, dialogues), *_limits(rows, base, samples)]
    told: dict[str, str] = {}
    for run in reversed(runs):
        told |= run.results.get("definitions", {})
    definitions = told | metric_definitions() | definitions
    return Comparison(
        rows=tuple(rows),
        columns=columns,
        baseline=rows[base].label if len(rows) > 1 else "",
        replies=len(runs[0].references),
        dialogues=dialogues,
        data=str(runs[0].results.get("data", "")),
        samples=samples,
        seed=seed,
        notes=tuple(notes),
        definitions={c.key: definitions[c.key] for c in columns if c.key in definitions},
        versions=metric_versions() | versions,
        examples=examples_of(groups),
        unranked=unranked,
    )


EXAMPLES = 24
"""Turns that stand side by side; more are in each run's own report."""


def examples_of(groups: Sequence[RunGroup]) -> tuple[dict[str, Any], ...]:
    """Turns spread evenly over the dialogues, with the reply of every row's first seed.

    Returns:
        ``dialogue``, ``turn``, ``persona``, ``history`` (the last utterances), ``reference`` and ``replies`` (label ->
        reply) of each.
    """
    first = groups[0].runs[0]
    return tuple(
        {
            "dialogue": int(first.dialogue[u]),
            "turn": int(first.turn[u]),
            "persona": first.personas[u] if first.personas else [],
            "history": first.histories[u][-3:] if first.histories else [],
            "reference": first.references[u],
            "replies": {group.label: group.runs[0].predictions[u] for group in groups},
        }
        for u in spread_evenly(len(first.references), EXAMPLES).tolist()
    )


class _Measured:
    """Figures ``[R, F]``, bootstrap ``[R, B, F]`` and jackknife ``[R, D, F]`` of R runs, and their `SET_FIGURES`."""

    def __init__(
        self,
        statistics: list[CorpusStatistics],
        names: list[str],
        sets: dict[str, dict[str, float]],
        samples: int,
        seed: int,
    ) -> None:
        self.statistics, self.sets, self.samples, self.seed = statistics, sets, samples, seed
        self._place = {name: place for place, name in enumerate(names)}
        self._figures = np.stack([observed(run) for run in statistics])
        self._bootstrap = bootstrap(statistics, samples, seed)
        self._without = leave_one_out(statistics)

    def places(self, runs: Sequence[EvaluatedRun]) -> list[int]:
        return [self._place[run.name] for run in runs]

    def figures(self, runs: Sequence[EvaluatedRun]) -> np.ndarray:
        """[F], mean over runs."""
        return self._figures[self.places(runs)].mean(axis=0)

    def without(self, runs: Sequence[EvaluatedRun]) -> np.ndarray:
        """[D, F], mean over runs."""
        return self._without[self.places(runs)].mean(axis=0)

    def interval(self, runs: Sequence[EvaluatedRun]) -> np.ndarray:
        """[2, F]: percentiles of the bootstrap; DIST by the jackknife. NaN of one dialogue, which tells no spread."""
        if self.statistics[0].dialogues < 2:
            return np.full((2, len(FIGURES)), np.nan)
        interval = percentile_interval(self._bootstrap[self.places(runs)].mean(axis=0))
        places = [FIGURES.index(name) for name in DIST]
        interval[:, places] = jackknife_interval(self.figures(runs)[places], self.without(runs)[:, places])
        return interval


def _row(group: RunGroup, measured: _Measured) -> ComparedRow:
    seeds = []
    for run in group.runs:
        figures = _named(measured.figures([run])) | measured.sets[run.name]
        if "perplexity" not in figures and is_number(known := run.figures.get("perplexity")):
            figures["perplexity"] = float(known)
        seeds.append(SeedFigures(run.name, run.seed, figures, _intervals(measured.interval([run]))))
    names = [name for name in (*FIGURES, *SET_FIGURES) if all(name in seed.figures for seed in seeds)]
    table = np.asarray([[seed.figures[name] for name in names] for seed in seeds])
    spread = dict(zip(names, _deviation(table).tolist(), strict=True)) if len(seeds) > 1 else {}
    return ComparedRow(
        label=group.label,
        seeds=tuple(seeds),
        figures=dict(zip(names, table.mean(axis=0).tolist(), strict=True)),
        intervals=_intervals(measured.interval(group.runs)),
        spread=spread,
    )


def _deviation(table: np.ndarray) -> np.ndarray:
    """Standard deviation (n - 1) of each column of ``[n, C]``, of figures whose squares no float holds too."""
    scale = np.maximum(np.abs(table).max(axis=0), 1.0)
    return scale * (table / scale).std(axis=0, ddof=1)


def _against(
    row: ComparedRow,
    base: ComparedRow,
    group: RunGroup,
    base_group: RunGroup,
    measured: _Measured,
    shared: Sequence[str],
    apart: Sequence[str],
) -> ComparedRow:
    """The row with its changes over the baseline and their significance, but for figures that stand `apart`."""
    changes = relative_changes({k: v for k, v in row.figures.items() if k not in apart}, base.figures)
    # Rows are to be compared with one another, so their means are over the same columns.
    mean = mean_change({k: row.figures[k] for k in shared}, base.figures)
    places = [FIGURES.index(name) for name in shared if name in changes]
    interval = None
    below = measured.without(base_group.runs)[:, places]
    # Where one dialogue alone keeps the baseline above 0 there is no change without it, and so no spread.
    if places and (below > 0).all():
        means = 100.0 * ((measured.without(group.runs)[:, places] / below).mean(axis=1) - 1.0)
        interval = _intervals(jackknife_interval(np.asarray([mean]), means[:, None]), ["mean"]).get("mean")
    draws = randomised_differences(
        [measured.statistics[i] for i in measured.places(group.runs)],
        [measured.statistics[i] for i in measured.places(base_group.runs)],
        measured.samples,
        measured.seed,
    )
    p = p_values(measured.figures(group.runs) - measured.figures(base_group.runs), draws)
    p[[FIGURES.index(name) for name in apart]] = np.nan
    return ComparedRow(
        label=row.label,
        seeds=row.seeds,
        figures=row.figures,
        intervals=row.intervals,
        spread=row.spread,
        change=changes,
        mean_change=mean,
        mean_change_interval=interval,
        p=_named(p),
        p_holm=_named(holm(p)),
    )


def _named(values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(FIGURES, values, strict=True) if not np.isnan(value)}


def _intervals(bounds: np.ndarray, names: Sequence[str] = FIGURES) -> dict[str, Interval]:
    found = zip(names, bounds.T.tolist(), strict=True)
    return {name: (low, high) for name, (low, high) in found if np.isfinite([low, high]).all()}


def _limits(rows: Sequence[ComparedRow], base: int, samples: int) -> list[str]:
    """What the mean change leaves out and how small a p-value can be, sentences."""
    if len(rows) == 1:
        return []
    notes = []
    missing = [c.label for c in PAPER_COLUMNS if not all(c.key in row.figures for row in rows)]
    zero = [c.label for c in PAPER_COLUMNS if rows[base].figures.get(c.key) == 0]
    if missing:
        notes.append(f"Left out of the mean change, because not every run has them: {', '.join(missing)}.")
    if zero:
        notes.append(f"Left out of the mean change, because the baseline's figure is 0: {', '.join(zero)}.")
    least = max(len(row.p) for row in rows) / (samples + 1)
    if least > 0.01:
        notes.append(f"With {samples} draws no p-value can be below {least:.3f} after the correction.")
    return notes
