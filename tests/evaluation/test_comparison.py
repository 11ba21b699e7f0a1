"""Laws of comparisons: the paper's own numbers, groups of seeds, identical runs, refusals, the tables' form."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluated_folders import references, replies, write_run
from rich.console import Console

from spt_jax.config import default_config, flatten
from spt_jax.errors import UserError
from spt_jax.evaluation import comparability
from spt_jax.evaluation.bert_score import BertScores
from spt_jax.evaluation.comparison import (
    FURTHER_COLUMNS,
    PAPER_COLUMNS,
    SET_FIGURES,
    Comparison,
    compare_runs,
    mean_change,
    relative_changes,
)
from spt_jax.evaluation.comparison_tables import (
    csv_text,
    explanations,
    figure_cells,
    html_text,
    json_value,
    latex_text,
    rich_tables,
)
from spt_jax.evaluation.evaluated_runs import read_run
from spt_jax.evaluation.text_metrics import text_metrics

PAPER = {
    "OPT-125M-PT": (10.79, 1.61, 14.36, 2.67, 13.25, 53.15, 53.90, 52.91, 3.94, 13.67),
    "OPT-125M-SPT": (11.06, 2.22, 16.45, 3.60, 15.42, 54.86, 56.23, 53.91, 4.87, 17.38),
    "OPT-1.3B-PT": (8.16, 1.82, 11.48, 2.22, 10.29, 55.31, 57.12, 53.93, 4.87, 17.19),
    "OPT-1.3B-SPT": (9.94, 2.66, 13.74, 3.24, 12.38, 56.34, 58.08, 54.99, 4.93, 17.76),
    "OPT-2.7B-PT": (8.67, 1.77, 11.84, 2.30, 10.61, 56.25, 58.48, 54.49, 5.18, 18.61),
    "OPT-2.7B-SPT": (12.23, 3.11, 16.97, 4.37, 15.61, 57.96, 59.92, 56.45, 5.84, 20.76),
    "Llama2-7B-PT": (17.12, 1.99, 15.74, 4.07, 13.72, 52.30, 48.57, 57.11, 2.80, 12.91),
    "Llama2-7B-SPT": (17.49, 2.80, 17.02, 4.48, 15.24, 54.66, 53.02, 57.14, 5.69, 22.86),
}
TURNS = references(12)
SAMPLES = 200


def paper_figures(name: str) -> dict[str, float]:
    return {column.key: value for column, value in zip(PAPER_COLUMNS, PAPER[name], strict=True)}


def compared(*folders: Path, **options) -> Comparison:
    return compare_runs([read_run(str(folder)) for folder in folders], samples=SAMPLES, **options)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A baseline of two seeds, a better method of two, and one of a single run without likelihoods."""
    nll = np.random.default_rng(0).uniform(1, 3, len(TURNS))
    folders = []
    for method, quality, seeds in (("tuned", 0.2, (0, 1)), ("selected_100%", 0.8, (0, 1)), ("bare", 0.2, (0,))):
        for seed in seeds:
            settings = {"method": {"kind": method}}
            likelihoods = None if method == "bare" else (nll - quality / 2 + seed / 100).tolist()
            folder = tmp_path / f"{method}-seed{seed}"
            texts = replies(TURNS, quality, seed + 10 * len(method))
            folders.append(write_run(folder, TURNS, texts, seed=seed, settings=settings, nll=likelihoods))
    return folders


@pytest.mark.parametrize(
    ("model", "mean", "dist_2"),
    [("OPT-125M", 16.6, 27), ("OPT-1.3B", None, 3), ("OPT-2.7B", None, 12), ("Llama2-7B", None, 77)],
)
def test_the_papers_table_gives_the_papers_improvements(model: str, mean: float | None, dist_2: int) -> None:
    figures, baseline = paper_figures(f"{model}-SPT"), paper_figures(f"{model}-PT")
    found = mean_change(figures, baseline)
    assert found is not None
    by_hand = [100 * (spt - pt) / pt for spt, pt in zip(PAPER[f"{model}-SPT"], PAPER[f"{model}-PT"], strict=True)]
    assert found == pytest.approx(sum(by_hand) / 10)
    assert mean is None or round(found, 1) == mean  # the paper states it for the smallest model
    assert round(relative_changes(figures, baseline)["dist_2"]) == dist_2


def test_columns_that_one_side_lacks_or_where_the_baseline_is_0_are_left_out_of_the_mean() -> None:
    baseline = paper_figures("OPT-125M-PT") | {"bleu": 0.0}
    del baseline["bert_p"]
    changes = relative_changes(paper_figures("OPT-125M-SPT"), baseline)
    assert {column.key for column in PAPER_COLUMNS} - set(changes) == {"bleu", "bert_p"}
    assert mean_change(paper_figures("OPT-125M-SPT"), baseline) == pytest.approx(sum(changes.values()) / 8)
    assert mean_change({}, baseline) is None


def test_a_change_over_a_figure_below_0_would_have_the_wrong_sign_and_is_none() -> None:
    assert relative_changes({"persona_consistency": 0.1}, {"persona_consistency": -0.2}) == {}


def test_what_the_flags_of_an_evaluation_changed_is_told_and_parts_seeds(tmp_path: Path) -> None:
    texts = replies(TURNS, 0.5, 1)
    beams = {"generation.beams": 10, "generation.temperature": 0.0}
    for name, seed, settings in (("a0", 0, beams), ("a1", 1, beams), ("b1", 1, {**beams, "generation.beams": 1})):
        write_run(tmp_path / name, TURNS, texts, seed=seed, evaluated_with=settings)
    found = compared(*(tmp_path / name for name in ("a0", "a1", "b1")))
    assert [[seed.seed for seed in row.seeds] for row in found.rows] == [[0, 1], [1]]
    assert "The runs were evaluated with different generation.beams: 10 (a), 1 (b1)." in found.notes


def test_which_checkpoint_was_asked_for_is_told_and_parts_seeds_where_every_run_tells_it(tmp_path: Path) -> None:
    texts = replies(TURNS, 0.5, 1)
    asked = {"old0": "", "best1": "best", "best2": "best", "latest3": "latest", "old4": ""}
    for name, checkpoint in asked.items():
        write_run(tmp_path / name, TURNS, texts, seed=int(name[-1]), checkpoint=checkpoint)

    def found(*names: str) -> tuple[list[list[int]], list[str]]:
        comparison = compared(*(tmp_path / name for name in names))
        seeds = [[seed.seed for seed in row.seeds] for row in comparison.rows]
        return seeds, [note for note in comparison.notes if "checkpoint" in note]

    told = "The runs were evaluated with different evaluation.checkpoint:"
    assert found("best1", "latest3") == ([[1], [3]], [f"{told} 'best' (best1), 'latest' (latest3)."])
    assert found("best1", "best2") == ([[1, 2]], [])
    for unknown in (("old0", "old4"), ("old0", "latest3"), ("latest3", "old0"), ("old0", "best1", "best2")):
        assert found(*unknown) == ([[int(name[-1]) for name in unknown]], [])
    seeds, [note] = found("old0", "best1", "latest3", "old4")
    assert seeds == [[0, 1, 4], [3]]
    assert note.startswith(told) and note.endswith("'latest' (latest3).") and "None" not in note
    alone = compared(*(tmp_path / name for name in asked), group=False).notes
    assert f"{told} 'best' (best1), 'best' (best2), 'latest' (latest3)." in alone


@pytest.mark.parametrize(("field", "what"), [("persona", "personas"), ("history", "histories")])
def test_runs_that_were_told_other_things_behind_the_same_turns_are_compared_with_a_remark(
    tmp_path: Path, field: str, what: str
) -> None:
    texts = replies(TURNS, 0.3, 1)
    original = [[f"i say {text}"] for _, _, text in TURNS]
    revised, dropped = [*original[:3], ["i revise"], ["i too"], *original[5:]], [*original[:-1], []]
    for name, told in (("old", None), ("a", original), ("b", revised), ("c", original), ("d", dropped)):
        more = None if told is None else {field: told}
        write_run(tmp_path / name, TURNS, texts, settings={"method": {"kind": name}}, more=more)
    folders = {name: tmp_path / name for name in ("old", "a", "b", "c", "d")}
    remark = (
        f"The {what} behind 3 of {len(TURNS)} turns, turn {TURNS[3][1]} of dialogue {TURNS[3][0]} the first, "
        f"are not the same in {folders['b']}, {folders['d']} as in {folders['a']}."
    )
    assert [note for note in compared(*folders.values()).notes if what in note] == [remark]
    for alike in (("a", "c"), ("old", "b"), ("b", "old")):
        assert not [note for note in compared(*(folders[name] for name in alike)).notes if what in note]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("losses0", "losses1"), "losses"),
        (("bs0", "bs1"), "bs"),
        (("spt-seed10", "spt-seed11"), "spt"),
        (("spt-seed1", "spt-seed10"), "spt"),
        (("spt_s0", "spt_s1"), "spt"),
        (("sptseed0", "sptseed1"), "spt"),
        (("seed0", "seed1"), "seed0 and 1 more"),
    ],
)
def test_a_row_of_seeds_is_called_what_their_names_share(tmp_path: Path, names: tuple[str, str], label: str) -> None:
    folders = [write_run(tmp_path / name, TURNS, replies(TURNS, 0.5, 1), seed=i) for i, name in enumerate(names)]
    assert [row.label for row in compared(*folders).rows] == [label]


def test_one_dialogue_has_figures_without_intervals(tmp_path: Path) -> None:
    turns = [turn for turn in TURNS if turn[0] == 0]
    folders = [write_run(tmp_path / name, turns, replies(turns, 0.5, i)) for i, name in enumerate("ab")]
    found = compared(*folders)
    assert all(row.figures["f1"] >= 0 and row.intervals == {} for row in found.rows)
    assert "One dialogue tells of no spread, so there are no intervals." in found.notes


def test_where_one_dialogue_alone_keeps_the_baseline_above_0_the_mean_change_has_no_interval(tmp_path: Path) -> None:
    turns = [(d, 0, f"we sing number {d}") for d in range(3)]
    right = [text for _, _, text in turns]
    write_run(tmp_path / "a", turns, [right[0], "blue", "red"], settings={"method": {"kind": "a"}})
    write_run(tmp_path / "b", turns, right)
    found = compared(tmp_path / "a", tmp_path / "b").rows[1]
    assert found.mean_change is not None and found.change["f1"] > 0
    assert found.mean_change_interval is None
    assert set(found.intervals) >= {"f1", "dist_1"}


def test_a_model_that_has_diverged_has_a_spread_over_seeds_and_intervals(tmp_path: Path) -> None:
    for seed, nats in enumerate((400.0, 401.0)):
        write_run(tmp_path / f"a{seed}", TURNS, replies(TURNS, 0.3, 1), seed=seed, nll=[nats] * len(TURNS))
    [row] = compared(tmp_path / "a0", tmp_path / "a1").rows
    assert row.spread["perplexity"] == pytest.approx((np.exp(401) - np.exp(400)) / np.sqrt(2))
    assert np.isfinite(row.intervals["perplexity"]).all() and "dist_1" in row.intervals


def test_rows_are_means_over_seeds_with_each_seeds_own_figures(runs: list[Path]) -> None:
    found = compared(*runs)
    assert [row.label for row in found.rows] == ["tuned", "selected_100%", "bare-seed0"]
    assert [[seed.seed for seed in row.seeds] for row in found.rows] == [[0, 1], [0, 1], [0]]
    for row in found.rows:
        for seed in row.seeds:
            run = read_run(seed.name)
            own = text_metrics(run.predictions, run.references).values
            for key in set(own) & set(seed.figures):
                assert seed.figures[key] == pytest.approx(own[key]), key
                if key not in SET_FIGURES:
                    assert seed.intervals[key][0] <= own[key] <= seed.intervals[key][1], key
        for key, value in row.figures.items():
            over_seeds = [seed.figures[key] for seed in row.seeds]
            assert value == pytest.approx(np.mean(over_seeds))
            assert not row.spread or row.spread[key] == pytest.approx(np.std(over_seeds, ddof=1))
    assert not found.rows[2].spread


def test_each_figure_of_a_run_alone_and_in_a_group_is_the_same(runs: list[Path]) -> None:
    grouped, alone = compared(*runs[:4]), compared(*runs[:4], group=False)
    assert [row.label for row in alone.rows] == [folder.name for folder in runs[:4]]
    assert [seed for row in grouped.rows for seed in row.seeds] == [seed for row in alone.rows for seed in row.seeds]


def test_perplexity_is_of_the_selected_prompt_over_target_tokens_else_that_of_the_results(runs: list[Path]) -> None:
    found = compared(*runs)
    run = read_run(str(runs[0]))
    assert run.nll is not None
    assert run.target_tokens is not None
    expected = np.exp((run.nll * run.target_tokens).sum() / run.target_tokens.sum())
    assert found.rows[0].seeds[0].figures["perplexity"] == pytest.approx(expected)
    assert found.rows[2].figures["perplexity"] == 20.0
    assert "perplexity" not in found.rows[2].intervals | found.rows[2].p
    assert any(note.startswith("The perplexity of bare-seed0 is that of results.json") for note in found.notes)


def kept_by(run: int) -> dict[str, list]:
    rng = np.random.default_rng(run)
    hit = rng.random(len(TURNS)) < 0.3
    return {
        "persona": [["i love my dog", "we sing blue bread"]] * len(TURNS),
        "meteor": rng.random(len(TURNS)).tolist(),
        "persona_consistency": rng.integers(-2, 3, len(TURNS)).tolist(),
        "hits_1": hit.tolist(),
        "hits_1_total": (~hit).tolist(),
    }


def test_figures_beside_the_papers_are_compared_where_the_runs_have_them(tmp_path: Path) -> None:
    names = {"meteor": "by nltk", "persona_consistency": "C", "hits_1": "a", "hits_1_total": "b"}
    for place, name in enumerate("ab"):
        texts = replies(TURNS, 0.3 + 0.4 * place, place)
        write_run(tmp_path / name, TURNS, texts, definitions=names, more=kept_by(place))
    found = compared(tmp_path / "a", tmp_path / "b")
    further = {column.key for column in FURTHER_COLUMNS}
    assert further <= {column.key for column in found.columns}
    for place, row in enumerate(found.rows):
        run, kept = read_run(str(tmp_path / "ab"[place])), kept_by(place)
        own = text_metrics(run.predictions, run.references, kept["persona"]).values
        assert {key: row.figures[key] for key in further & set(own)} == pytest.approx(
            {k: own[k] for k in further & set(own)}
        )
        assert row.figures["meteor"] == pytest.approx(100 * np.mean(kept["meteor"]))
        assert row.figures["persona_consistency"] == pytest.approx(np.mean(kept["persona_consistency"]))
        assert row.figures["hits_1"] == pytest.approx(100 * np.mean(kept["hits_1"]))
        assert row.figures["hits_1_total"] == pytest.approx(100 - row.figures["hits_1"])
        assert set(row.intervals) >= further - set(SET_FIGURES) and not set(row.intervals) & set(SET_FIGURES)
    assert set(found.rows[1].p) >= further - set(SET_FIGURES) and not set(found.rows[1].p) & set(SET_FIGURES)
    assert further <= set(found.definitions)
    without = write_run(tmp_path / "c", TURNS, replies(TURNS, 0.3, 5))
    beside = compared(tmp_path / "a", without)
    assert {"meteor", "persona_f1", "hits_1"} <= set(beside.rows[0].figures)
    assert not {"meteor", "persona_f1", "hits_1"} & (set(beside.rows[1].figures) | set(beside.rows[1].p))


def test_nothing_is_measured_against_a_persona_that_is_what_is_written(tmp_path: Path) -> None:
    for name, task in (("a", "response"), ("b", "persona")):
        settings = {"data": {"task": task}}
        write_run(tmp_path / name, TURNS, replies(TURNS, 0.3, 1), more=kept_by(0), settings=settings)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert ["persona_f1" in row.figures for row in found.rows] == [True, False]


def test_what_a_flag_may_have_overridden_is_told_only_where_it_is_recorded(tmp_path: Path) -> None:
    recorded = ({}, {"evaluation.batch": 8})
    for name, number in (("a", 0), ("b", 48)):
        settings = {"evaluation": {"replies": number, "metrics": ["f1"] * (1 + number), "batch": number + 1}}
        write_run(
            tmp_path / name, TURNS, replies(TURNS, 0.3, 1), settings=settings, evaluated_with=recorded[number > 0]
        )
    told = [note for note in compared(tmp_path / "a", tmp_path / "b").notes if "evaluated with different" in note]
    assert told == ["The runs were evaluated with different evaluation.batch: 1 (a), 8 (b)."]


def test_figures_that_were_computed_in_different_ways_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    for place, name in enumerate("ab"):
        definitions = {"meteor": f"METEOR with WordNet 3.{place}", "hits_1": "the same"}
        write_run(tmp_path / name, TURNS, replies(TURNS, 0.3, 1), definitions=definitions, more=kept_by(place))
    found = compared(tmp_path / "a", tmp_path / "b")
    assert all("meteor" not in row.figures and "hits_1" in row.figures for row in found.rows)
    assert any(
        note.startswith("meteor is left out, for it was computed in different ways: METEOR with WordNet 3.0 / METEOR")
        for note in found.notes
    )


def test_a_figure_that_some_replies_lack_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    kept = kept_by(0)
    kept["hits_1"][3] = None
    folder = write_run(tmp_path / "a", TURNS, replies(TURNS, 0.3, 1), more=kept)
    results = json.loads((folder / "results.json").read_text())
    results["columns"]["after training"] |= {"hits_1": 30.0, "meteor": 50.0}
    (folder / "results.json").write_text(json.dumps(results))
    found = compared(folder)
    assert "hits_1" not in found.rows[0].figures and "meteor" in found.rows[0].figures
    assert [note for note in found.notes if "left out" in note] == [
        f"hits_1 of {folder} is left out, for it is not known of every reply."
    ]


def test_identical_runs_have_no_change_and_p_1(tmp_path: Path) -> None:
    texts, bert = replies(TURNS, 0.3, 1), [(0.5, 0.25, 0.375)] * len(TURNS)
    names = {"bert_f1": "by an encoder"}
    for name in "ab":
        write_run(tmp_path / name, TURNS, texts, nll=[2.0] * len(TURNS), bert_score=bert, definitions=names)
    found = compared(tmp_path / "a", tmp_path / "b")
    other = found.rows[1]
    assert (found.baseline, other.mean_change, other.mean_change_interval) == ("a", 0.0, (0.0, 0.0))
    assert set(other.change.values()) == {0.0}
    assert set(other.p.values()) == set(other.p_holm.values()) == {1.0}
    assert len(other.p) == 12
    assert other.figures["bert_f1"] == 37.5
    assert found.definitions["bert_f1"] == "by an encoder"


def test_a_much_better_run_is_significant_and_its_mean_change_is_that_of_its_figures(runs: list[Path]) -> None:
    found = compared(*runs)
    base, better, _ = found.rows
    assert better.p_holm["f1"] == pytest.approx(9 / (SAMPLES + 1))
    assert all(better.p[key] <= better.p_holm[key] for key in better.p)
    assert better.mean_change == pytest.approx(mean_change(better.figures, base.figures))
    assert better.mean_change_interval is not None
    assert better.mean_change_interval[0] < (better.mean_change or 0) < better.mean_change_interval[1]
    assert better.mean_change_interval[0] > 0
    assert any("BERT F1, BERT P, BERT R" in note for note in found.notes)


def test_the_baseline_is_the_row_of_the_run_or_label_that_is_named(runs: list[Path]) -> None:
    for name in (str(runs[3]), f"{runs[3]}/", "selected_100%"):
        assert compared(*runs, baseline=name).baseline == "selected_100%"
    with pytest.raises(UserError, match=r"baseline .*seed7 is not among the runs: .* Did you mean"):
        compared(*runs, baseline=f"{runs[0]}7".replace("seed07", "seed7"))


def test_equal_settings_with_equal_seeds_are_rows_of_their_own_and_tracking_is_no_setting(tmp_path: Path) -> None:
    texts = replies(TURNS, 0.3, 1)
    for name, seed, project in (("a", 0, "x"), ("b", 0, "x"), ("c", 1, "y")):
        write_run(tmp_path / name, TURNS, texts, seed=seed, settings={"tracking": {"project": project}})
    found = compared(*(tmp_path / name for name in "abc"))
    assert [[Path(seed.name).name for seed in row.seeds] for row in found.rows] == [["a", "c"], ["b"]]


def test_perplexities_over_other_tokens_and_other_limits_are_told(tmp_path: Path) -> None:
    texts = replies(TURNS, 0.3, 1)
    for name, limit in (("a", 32), ("b", 64)):
        settings = {"evaluation": {"max_new_tokens": limit}, "generation": {"beams": limit // 32}}
        write_run(tmp_path / name, TURNS, texts, settings=settings, nll=[2.0] * len(TURNS), total_turns=99)
    lines = [json.loads(line) for line in (tmp_path / "b" / "predictions.jsonl").read_text().splitlines()]
    lines[3]["target_tokens"] += 1
    (tmp_path / "b" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared(tmp_path / "a", tmp_path / "b")
    assert "perplexity" not in found.rows[1].p
    notes = " ".join(found.notes)
    assert "The perplexity of b is per token of another tokenizer" in notes
    assert "different evaluation.max_new_tokens: 32 (a), 64 (b)" in notes
    assert "different generation.beams: 1 (a), 2 (b)" in notes
    assert f"{len(TURNS)} turns that have a reply, of 99" in notes
    assert "With 12 dialogues" in notes
    assert "no p-value can be below" in notes


def perplexities(folder: Path, **tokens: int | None) -> list[Path]:
    """Runs of perplexities 1, 2, … times e², with so many more tokens in every response; None keeps none."""
    folders = []
    for i, (name, more) in enumerate(tokens.items(), start=1):
        nll = None if more is None else [2.0 + np.log(i)] * len(TURNS)
        counts = {} if more is None else {"target_tokens": [len(text.split()) + 1 + more for _, _, text in TURNS]}
        texts, settings = replies(TURNS, 0.3, i), {"method": {"kind": name}}
        folders.append(write_run(folder / name, TURNS, texts, settings=settings, nll=nll, more=counts))
    return folders


def bold(found: Comparison, label: str) -> list[bool]:
    place = [column.label for column in found.columns].index(label)
    return [line[place].best for line in figure_cells(found)]


def test_perplexities_that_cannot_be_compared_have_no_change_and_no_best_among_them(tmp_path: Path) -> None:
    found = compared(*perplexities(tmp_path, a=0, b=0, c=1))
    base, same, other = found.rows
    assert all("perplexity" in row.figures and "perplexity" in row.intervals for row in found.rows)
    assert same.change["perplexity"] == pytest.approx(100) and "perplexity" in same.p
    assert "perplexity" not in other.change | other.p | other.p_holm and "f1" in other.change
    assert same.mean_change == pytest.approx(mean_change(same.figures, base.figures))
    assert other.mean_change == pytest.approx(mean_change(other.figures, base.figures))
    assert bold(found, "Perplexity") == [False, False, False] and any(bold(found, "F1"))
    [note] = [note for note in found.notes if "perplexity" in note]
    assert note.startswith("The perplexity of c is per token of another tokenizer, or of other texts, than the")
    assert note.endswith("it has neither change nor test, and no perplexity is marked as the best.")
    alike = compared(tmp_path / "a", tmp_path / "b")
    assert bold(alike, "Perplexity") == [True, False] and "perplexity" in alike.rows[1].change


def test_a_perplexity_whose_tokens_nobody_kept_is_compared_with_no_other(tmp_path: Path) -> None:
    folders = perplexities(tmp_path, a=None, b=0, c=0)
    for baseline, compares in ((folders[0], []), (folders[1], ["c"])):
        found = compared(*folders, baseline=str(baseline))
        assert [row.label for row in found.rows if "perplexity" in row.change] == compares
        assert bold(found, "Perplexity") == [False, False, False]
        [note] = [note for note in found.notes if "perplexity" in note]
        assert "The perplexity of a is that of results.json, without interval and compared with no other" in note


@pytest.mark.parametrize("model", ["", "an encoder"])
def test_every_run_is_counted_at_each_stage(runs: list[Path], monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(comparability, "bert_scores", lengths_as_scores)
    steps: list[int] = []
    found = compared(*runs, bert_score_model=model, bert_score_layers=5, on_step=steps.append)
    assert sum(steps) == len(runs) * (3 if model else 2)
    assert ("bert_f1" in found.rows[1].change) == bool(model)
    assert ("bert" in found.versions) == bool(model)
    assert found.definitions.get("bert_f1") == ("an encoder, layer 5" if model else None)


def lengths_as_scores(predictions: list[str], references: list[str], model: str, *, num_layers: int = 0) -> BertScores:
    """In the place of BERTScore: precision from the reply, recall from the reference."""
    precision, recall = (np.asarray([1 / (1 + len(text)) for text in texts]) for texts in (predictions, references))
    definitions = dict.fromkeys(("bert_f1", "bert_p", "bert_r"), f"{model}, layer {num_layers}")
    return BertScores(precision, recall, precision * recall, definitions, {"bert": "1"})


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_scored_together_every_pair_has_the_score_it_has_alone(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(comparability, "bert_scores", lengths_as_scores)
    monkeypatch.setattr(comparability, "_TURNS_SCORED", block)
    read = [read_run(str(run)) for run in runs]
    together, _, _ = comparability.bert_of_runs(read, "an encoder", [])
    for run, scores in zip(read, together, strict=True):
        alone = lengths_as_scores(run.predictions, run.references, "an encoder").per_pair()
        np.testing.assert_array_equal(scores, alone)


def test_bert_scores_made_in_different_ways_are_left_out(tmp_path: Path) -> None:
    texts, bert = replies(TURNS, 0.3, 1), [(0.5, 0.5, 0.5)] * len(TURNS)
    for name in "ab":
        write_run(tmp_path / name, TURNS, texts, bert_score=bert, definitions={"bert_f1": f"way {name}."})
    found = compared(tmp_path / "a", tmp_path / "b")
    assert "bert_f1" not in found.rows[0].figures
    assert any("different ways: way a. / way b." in note for note in found.notes)


def other_turn(lines: list[dict]) -> None:
    lines[4]["turn"] += 50


def other_reference(lines: list[dict]) -> None:
    lines[2]["reference"] = "something else"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_turn, r"not evaluated on the same turns: turn \d of dialogue \d has a reply in .*a, none in .*b$"),
        (other_reference, r"the reference of turn \d of dialogue \d is '.*' in .*a and 'something else' in .*b"),
        (lambda lines: lines.pop(), r"results.json speaks of \d+; run again: spt-jax evaluate --workdir="),
        (
            lambda lines: lines.append(lines[0]),
            r"predictions.jsonl:\d+ answers turn 0 of dialogue 0 once more.* line 1",
        ),
        (lambda lines: lines[1].pop("prediction"), r"predictions.jsonl:2 has no 'prediction' that is a text"),
        (lambda lines: lines.clear(), r"predictions.jsonl holds no reply"),
        (lambda lines: lines.insert(0, [1]), r"predictions.jsonl:1 has no 'dialogue' that is a whole number"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_sentence(tmp_path: Path, change, sentence: str) -> None:
    for name in "ab":
        write_run(tmp_path / name, TURNS, replies(TURNS, 0.3, 1))
    path = tmp_path / "b" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=sentence) as caught:
        compared(tmp_path / "a", tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_broken_lines_are_named_and_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, TURNS, replies(TURNS, 0.3, 1))
    path = tmp_path / "b" / "predictions.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    assert compared(tmp_path / "a", tmp_path / "b").rows[1].mean_change == 0
    path.write_text("\n".join([lines[0], lines[1][:-5]]))
    with pytest.raises(UserError, match=r"predictions.jsonl:2 is not JSON"):
        read_run(str(tmp_path / "b"))


def test_the_same_folder_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", TURNS, replies(TURNS, 0.3, 1))
    with pytest.raises(UserError, match="is given twice"):
        compare_runs([read_run(str(tmp_path / "a")), read_run(str(tmp_path / "." / "a"))])


def test_csv_holds_every_figure(runs: list[Path]) -> None:
    found = compared(*runs)
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [row["run"] for row in rows] == [row.label for row in found.rows]
    better = found.rows[1]
    assert float(rows[1]["f1"]) == better.figures["f1"]
    assert (float(rows[1]["dist_2_low"]), float(rows[1]["dist_2_high"])) == better.intervals["dist_2"]
    assert float(rows[1]["f1_p_holm"]) == better.p_holm["f1"]
    assert float(rows[1]["mean_change_percent"]) == better.mean_change
    assert rows[0]["mean_change_percent"] == rows[2]["perplexity_low"] == ""
    assert rows[1]["seeds"] == "0 1"


def test_latex_is_balanced_and_escaped(runs: list[Path]) -> None:
    text = latex_text(compared(*runs))
    assert "selected\\_100\\%" in text
    body = text.split("\n", 1)[1].replace("{!}{%\n", "{!}{\n")  # the end of that line is no space
    assert not re.search(r"(?<!\\)[%#]|(?<!\\)_", body)
    plain = re.sub(r"\\[{}]", "", body)
    depth = np.cumsum([{"{": 1, "}": -1}.get(character, 0) for character in plain])
    assert depth.min() >= 0
    assert depth[-1] == 0
    assert body.count("$") % 2 == 0
    assert re.findall(r"\\begin\{(.*?)\}", text) == list(reversed(re.findall(r"\\end\{(.*?)\}", text)))
    lines = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert len(lines) == 1 + 2 * 3
    columns = len(re.findall(r"\\begin\{tabular\}\{(l(r+))\}", text)[0][0])
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {columns}
    assert text.isascii()


def test_latex_has_the_greek_of_meteors_definition(tmp_path: Path) -> None:
    for place, name in enumerate("ab"):
        definitions = {"meteor": f"METEOR (α = 0.{place}, β = 3, γ = 0.5; ×)"}
        write_run(tmp_path / name, TURNS, replies(TURNS, 0.3, 1), definitions=definitions, more=kept_by(place))
    text = latex_text(compared(tmp_path / "a", tmp_path / "b"))
    assert "$\\alpha$ = 0.0" in text
    assert text.isascii()


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.references += [name for name, _ in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_whole_refers_to_nothing_and_escapes(tmp_path: Path) -> None:
    for name in ("<b>a", "b"):
        write_run(tmp_path / name, TURNS, replies(TURNS, 0.3, len(name)), settings={"method": {"kind": name}})
    tags = Tags()
    tags.feed(text := html_text(compared(tmp_path / "<b>a", tmp_path / "b")))
    assert tags.open == []
    assert tags.references == []
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|url\(", text)
    assert "<b>a" in tags.text
    assert '<meta name="viewport"' in text


def test_terminal_tables_show_every_column_within_the_width(runs: list[Path]) -> None:
    found = compared(*runs)
    for width in (80, 120, 250):
        console = Console(file=io.StringIO(), width=width)
        for table in rich_tables(found, width):
            console.print(table)
        text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert all(column.label in text for column in found.columns)
        assert "…" not in text
        assert f"{found.rows[1].figures['f1']:.2f}" in text
    assert any("Holm" in line for line in explanations(found))


def test_one_run_has_figures_and_no_comparison(runs: list[Path]) -> None:
    found = compared(runs[0])
    assert (found.baseline, found.rows[0].p, found.rows[0].mean_change) == ("", {}, None)
    assert "Mean change" not in " ".join([latex_text(found), html_text(found), *explanations(found)])
    assert len(list(rich_tables(found, 300))) == 1


def test_json_has_a_definition_for_every_column(runs: list[Path]) -> None:
    value = json.loads(json.dumps(json_value(compared(*runs)), allow_nan=False))
    assert set(value["definitions"]) == set(value["columns"])
    assert value["rows"][1]["seeds"][1]["intervals"]["f1"]
    assert value["samples"] == SAMPLES


def test_replies_stand_side_by_side_turn_by_turn(tmp_path: Path) -> None:
    texts = {name: [f"{name} {i}" for i in range(len(TURNS))] for name in ("a", "b")}
    history = [["hi", f"question {i}"] for i in range(len(TURNS))]
    for name, said in texts.items():
        write_run(tmp_path / name, TURNS, said, settings={"method": {"kind": name}}, more={"history": history})
    found = compared(tmp_path / "a", tmp_path / "b")
    assert len(found.examples) == min(24, len(TURNS))
    places = {(d, t): i for i, (d, t, _) in enumerate(TURNS)}
    for example in found.examples:
        i = places[example["dialogue"], example["turn"]]
        assert list(example["replies"].values()) == [texts["a"][i], texts["b"][i]]
        assert (example["reference"], example["history"]) == (TURNS[i][2], history[i])
    text = html_text(found)
    assert text.count("<details") >= len(found.examples)
    assert all(f"question {places[e['dialogue'], e['turn']]}" in text for e in found.examples)


def test_a_run_older_than_an_option_is_one_that_has_its_default(tmp_path: Path) -> None:
    texts, evaluation = replies(TURNS, 0.5, 1), flatten({"evaluation": default_config().evaluation.to_dict()})
    settings = {"evaluation": default_config().evaluation.to_dict()}
    old = write_run(tmp_path / "run-seed0", TURNS, texts, seed=0)
    new = write_run(tmp_path / "run-seed1", TURNS, texts, seed=1, settings=settings, evaluated_with=evaluation)
    found = compared(old, new)
    assert [row.label for row in found.rows] == ["run"]
    assert not [note for note in found.notes if "different" in note]
    settings["evaluation"]["seed"] = 3
    other = write_run(tmp_path / "other", TURNS, texts, seed=1, settings=settings)
    [note] = [note for note in compared(old, other).notes if "different" in note]
    assert "different evaluation.seed: -1 (run-seed0), 3 (other)" in note
