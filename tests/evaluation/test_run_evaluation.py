from __future__ import annotations

import dataclasses
import html
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from official_tokenizer import small_tokenizer
from tiny_experiment import experiment

from spt_jax.data.persona_task import PersonaTemplate
from spt_jax.errors import UserError
from spt_jax.evaluation import columns, run_evaluation
from spt_jax.evaluation.candidate_scores import CandidateScores
from spt_jax.evaluation.journal import Journal, KeptColumn
from spt_jax.evaluation.kept_results import kept_results
from spt_jax.evaluation.report import ReportInputs, render_report
from spt_jax.evaluation.report_samples import sample_section
from spt_jax.evaluation.run_evaluation import AFTER, BEFORE, NO_PROMPT, Evaluation, evaluate_run, write_results
from spt_jax.models.frozen_tree import random_params
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.prompting.retriever import RetrieverConfig


@pytest.fixture(scope="module")
def setting():
    return experiment()


@pytest.fixture(scope="module")
def evaluation(setting) -> Evaluation:
    return evaluate_run(setting, tiny.trainable(), tiny.trainable(seed=5), tiny.DIALOGUES, replies=4)


def test_columns_stand_in_the_order_of_the_story(evaluation):
    found = evaluation.results["columns"]
    assert list(found) == [NO_PROMPT, BEFORE, AFTER]
    assert len({column["perplexity"] for column in found.values()}) == 3
    assert (evaluation.results["turns"], evaluation.results["replies"]) == (10, 4)


def test_the_same_tree_before_and_after_gives_the_same_figures(setting):
    found = evaluate_run(setting, tiny.trainable(), tiny.trainable(), tiny.DIALOGUES, replies=2)
    assert found.results["columns"][BEFORE] == found.results["columns"][AFTER]


def test_baselines_are_left_out_when_there_is_no_initial_tree(setting):
    found = evaluate_run(setting, tiny.trainable(), None, tiny.DIALOGUES[:1], replies=1)
    assert list(found.results["columns"]) == [AFTER]
    assert all("no_prompt" not in sample for sample in found.samples)


def test_no_number_of_replies_takes_the_configurations_and_zero_takes_all():
    three = experiment(replies=3)
    assert len(evaluate_run(three, tiny.trainable(), None, tiny.DIALOGUES).predictions) == 3
    assert len(evaluate_run(three, tiny.trainable(), None, tiny.DIALOGUES, replies=0).predictions) == 10


def test_samples_hold_a_reply_under_every_prompt_and_the_selected_one_is_the_prediction(evaluation):
    assert len(evaluation.samples) == 2
    told = {(p["reference"], tuple(p["history"])): p for p in evaluation.predictions}
    for sample in evaluation.samples:
        assert len(sample["replies"]) == 3
        prediction = told[sample["reference"], tuple(sample["history"])]
        assert sample["selected"] == prediction["selected"]
        assert sample["replies"][sample["selected"]] == prediction["prediction"]
        assert isinstance(sample["no_prompt"], str)


def test_samples_are_drawn_as_the_replies_beside_them():
    drawing = experiment(samples=4, max_new_tokens=8)
    drawing.config.generation.temperature = 1.0
    found = evaluate_run(drawing, tiny.trainable(), None, tiny.DIALOGUES, replies=6)
    replies = {(p["dialogue"], p["turn"]): p["prediction"] for p in found.predictions}
    assert len(found.samples) == 4
    for sample in found.samples:
        assert sample["replies"][sample["selected"]] == replies[sample["dialogue"], sample["turn"]]


def test_results_tell_how_replies_were_made(setting, evaluation):
    settings = evaluation.results["settings"]
    assert settings["generation.beams"] == 1
    assert settings["evaluation.max_new_tokens"] == 3
    assert {name for name in settings if name.startswith("evaluation.")} == {
        *("evaluation.max_new_tokens", "evaluation.seed", "evaluation.selection", "evaluation.selection_noise"),
    }
    assert {name for name in settings if name.startswith("generation.")} == {
        f"generation.{name}" for name in setting.config.generation
    }


def test_in_the_official_mode_results_tell_the_batch_on_which_scores_depend():
    setting, tokenizer = experiment(batch=3), small_tokenizer()
    setting.config.update({"retriever": {"context": "official"}, "data": {"layout": "turn"}})
    decoder = dataclasses.replace(tiny.CONFIG, vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    lm = dataclasses.replace(
        setting.lm, config=decoder, params=random_params(decoder, jax.random.key(0)), tokenizer=tokenizer
    )
    model = dataclasses.replace(setting.model, decoder=decoder, retriever_config=RetrieverConfig(context="official"))
    official = dataclasses.replace(setting, lm=lm, model=model)
    found = evaluate_run(official, tiny.trainable(model), None, tiny.DIALOGUES[:1], replies=1)
    assert found.results["settings"]["evaluation.batch"] == 3


def test_dialogues_have_one_number_in_every_part_of_the_report(evaluation):
    assert [dialogue["dialogue"] for dialogue in evaluation.selection] == list(range(len(tiny.DIALOGUES)))
    page = render_report(
        ReportInputs(
            "t",
            evaluation.results,
            selection=evaluation.selection,
            samples=evaluation.samples,
            dialogues=evaluation.dialogues,
        )
    )
    for sample in evaluation.samples:
        assert f"<h3>Dialogue {sample['dialogue']}, turn {sample['turn']}</h3>" in page
        assert f'<div id="dialogue-{sample["dialogue"]}">' in page


def test_without_a_retriever_nothing_tells_of_a_selection(tmp_path):
    single = experiment(prompts=1)
    model = dataclasses.replace(single.model, retriever_config=None)
    tree = model.init(jax.random.key(0))
    found = evaluate_run(dataclasses.replace(single, model=model), tree, None, tiny.DIALOGUES, replies=2)
    assert found.selection == []
    write_results(
        tmp_path, found, single.config, source="x", checkpoint="best", step=3, chat="spt-jax chat", question=""
    )
    page = (tmp_path / "report.html").read_text()
    for untrue in ("Which prompt serves what", "under every prompt", "the retriever's", "prompt 0", "selected</span>"):
        assert untrue not in page


def test_of_a_mixture_no_prompt_alone_is_said_to_answer(tmp_path):
    mixing = experiment(selection="soft")
    found = evaluate_run(mixing, tiny.trainable(), None, tiny.DIALOGUES, replies=2)
    write_results(
        tmp_path, found, mixing.config, source="x", checkpoint="best", step=3, chat="spt-jax chat", question=""
    )
    page = (tmp_path / "report.html").read_text()
    assert "a mixture of all answers" in page
    assert "reply, a mixture, prompt" in page
    assert "the highest score answers" not in page


def test_where_the_persona_is_told_its_own_words_came_last():
    found = evaluate_run(experiment(), tiny.trainable(), None, tiny.DIALOGUES, template=PersonaTemplate(), replies=2)
    [page] = sample_section(found.samples)
    for sample in found.samples:
        last = html.escape(sample["history"][-1])
        assert f'<div class="turn own"><small>model&#x27;s side (R)</small>{last}</div>' in page.replace(
            "model's", "model&#x27;s"
        )


def test_no_samples_on_request():
    assert evaluate_run(experiment(samples=0), tiny.trainable(), None, tiny.DIALOGUES[:1]).samples == []


def test_selection_shows_every_dialogue_once(evaluation):
    assert len(evaluation.selection) == len(tiny.DIALOGUES)
    turns = [len(dialogue.turns) for dialogue in tiny.DIALOGUES]
    shares = [sum(s["usage"][k] * n for s, n in zip(evaluation.selection, turns, strict=True)) / 10 for k in range(3)]
    assert shares == pytest.approx(evaluation.results["columns"][AFTER]["usage"])
    assert all(sum(s["usage"]) == pytest.approx(1) for s in evaluation.selection)


def test_one_prompt_of_a_bank_is_enough(tmp_path):
    single = experiment(prompts=1)
    tree = tiny.trainable(dataclasses.replace(tiny.MODEL, adapter=SoftPrompts(1, 4, stddev=0.5)))
    found = evaluate_run(single, tree, tree, tiny.DIALOGUES, replies=1)
    assert found.results["columns"][AFTER]["usage"] == [1.0]
    assert all(len(sample["replies"]) == 1 for sample in found.samples)
    write_results(
        tmp_path, found, single.config, source="x", checkpoint="best", step=3, chat="spt-jax chat", question=""
    )
    assert "spt-jax chat" in (tmp_path / "report.html").read_text()


def test_zeroing_the_bank_changes_the_figures_after_training(setting, evaluation):
    tree = tiny.trainable()
    zeroed = {**tree, "bank": {"prompts": jnp.zeros_like(tree["bank"]["prompts"])}}
    found = evaluate_run(setting, zeroed, None, tiny.DIALOGUES, replies=1)
    assert found.results["columns"][AFTER]["perplexity"] != evaluation.results["columns"][AFTER]["perplexity"]


def test_no_dialogue_is_refused(setting):
    with pytest.raises(UserError, match="no dialogue to evaluate on"):
        evaluate_run(setting, tiny.trainable(), None, [])


def test_files_hold_what_was_found(setting, evaluation, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.5}\n{"step": 2, "loss/tot')
    about = {"checkpoint": "latest", "step": 7, "chat": "spt-jax chat --workdir=x", "question": "4f2a"}
    written = write_results(tmp_path, evaluation, setting.config, source="here.txt", **about)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == json.loads(json.dumps(written))
    assert json.loads(json.dumps(evaluation.results)).items() <= results.items()
    assert (results["data"], results["step"], results["question"]) == ("here.txt", 7, "4f2a")
    assert results["checkpoint"] == "latest"
    assert results["samples"] == evaluation.samples
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == evaluation.predictions
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "spt-jax chat --workdir=x" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("metrics.jsonl", "predictions.jsonl", "report.html", "results.json"),
    ]


@pytest.mark.parametrize("failing", ["write_atomically", "write_report", "write_json"])
def test_results_never_vouch_for_replies_that_another_evaluation_failed_to_finish(
    setting, evaluation, tmp_path, monkeypatch, failing
):
    def write() -> None:
        about = {"checkpoint": "best", "step": 7, "chat": "c", "question": "q"}
        write_results(tmp_path, evaluation, setting.config, source="x", **about)

    def fails(path, *_):
        assert not (tmp_path / "results.json").exists()
        raise UserError(f"{path} cannot be written")

    write()
    assert kept_results(tmp_path, "q") is not None
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written"):
        patch.setattr(run_evaluation, failing, fails)
        write()
    assert not (tmp_path / "results.json").exists() and kept_results(tmp_path, "q") is None


def test_every_figure_shown_is_defined(evaluation):
    figures = set(evaluation.results["columns"][AFTER])
    assert figures <= set(evaluation.results["definitions"]) | {"replies", "empty_replies"}


def with_candidates(texts=("no", "so it is")):
    """The tiny dialogues, each turn with its response among three candidates."""
    return [
        dataclasses.replace(
            dialogue,
            turns=tuple(dataclasses.replace(turn, candidates=(*texts, turn.response)) for turn in dialogue.turns),
        )
        for dialogue in tiny.DIALOGUES
    ]


def test_figures_are_those_of_the_groups_asked_for():
    found = evaluate_run(experiment(metrics=("f1", "length")), tiny.trainable(), None, tiny.DIALOGUES[:1])
    assert set(found.results["columns"][AFTER]) == {"f1", "f1_parlai", "reply_words", "empty_replies", "pairs", "usage"}
    assert set(found.results["definitions"]) == set(found.results["columns"][AFTER])


def test_the_persona_is_measured_by_default_and_not_where_it_is_what_is_written(evaluation):
    assert {"persona_f1", "self_bleu", "entropy_4", "dist_3"} <= set(evaluation.results["columns"][AFTER])
    found = evaluate_run(experiment(), tiny.trainable(), None, tiny.DIALOGUES[:2], template=PersonaTemplate())
    assert "persona_f1" not in found.results["columns"][AFTER]


def test_candidates_of_the_answered_turns_are_ranked_on_request():
    setting = experiment(metrics=("hits",))
    found = evaluate_run(setting, tiny.trainable(), tiny.trainable(seed=5), with_candidates(), replies=4)
    figures, predictions = found.results["columns"], found.predictions
    assert list(figures) == [NO_PROMPT, BEFORE, AFTER]
    assert all(column["hits_turns"] == 4 for column in figures.values())
    assert figures[AFTER]["hits_1"] == 100 * sum(p["hits_1"] for p in predictions) / 4
    assert figures[AFTER]["hits_1_total"] == 100 * sum(p["hits_1_total"] for p in predictions) / 4
    assert found.results["notes"] == []
    assert "mean nll a token" in found.results["definitions"]["hits_1"]
    alone = evaluate_run(setting, tiny.trainable(), None, with_candidates(()), replies=4)
    assert alone.results["columns"][AFTER]["hits_1"] == 100


def test_a_candidate_that_is_too_long_is_told_before_anything_is_scored(monkeypatch):
    setting = experiment(metrics=("hits",))
    monkeypatch.setattr("spt_jax.evaluation.columns.score_rows", lambda *_, **__: pytest.fail("turns were scored"))
    dialogues = with_candidates(("x" * 300,))
    with pytest.raises(UserError, match=r"a candidate of turn \d+ of dialogue \d+ needs \d+ positions, but"):
        evaluate_run(setting, tiny.trainable(), None, dialogues, replies=4)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_ranking_that_was_stopped_goes_on_and_scores_no_candidate_twice(tmp_path, monkeypatch, batches):
    setting = experiment(metrics=("hits",), batch=2)

    def evaluated(journal):
        return evaluate_run(setting, tiny.trainable(), None, with_candidates(), replies=5, journal=journal)

    wanted = evaluated(None)
    keep, kept = KeptColumn.keep_candidates, []

    def counted(column, turns, scores):
        if len(kept) == stop_before:
            raise KeyboardInterrupt
        keep(column, turns, scores)
        kept.append(turns)

    monkeypatch.setattr(KeptColumn, "keep_candidates", counted)
    stop_before = batches
    with pytest.raises(KeyboardInterrupt):
        evaluated(Journal(tmp_path, "why"))
    assert len(kept) == batches
    stop_before = -1
    found = evaluated(Journal(tmp_path, "why"))
    ranked = [turn for turns in kept for turn in turns]
    assert len(ranked) == len(set(ranked)) == 5
    assert found.results["columns"] == wanted.results["columns"]
    assert found.predictions == wanted.predictions


def test_the_candidates_are_scored_under_the_prompt_that_answers(monkeypatch):
    asked = []

    def scores(model, conditions, rows, turns, selected, **_):
        asked.append({(turn.dialogue, turn.turn): k for turn, k in zip(turns, selected, strict=True)})
        return [CandidateScores(np.zeros(len(turn.ids)), np.ones(len(turn.ids))) for turn in turns]

    monkeypatch.setattr(columns, "score_candidates", scores)
    setting = experiment(metrics=("hits",), replies=6, selection_noise=5.0)
    found = evaluate_run(setting, tiny.trainable(), None, with_candidates())
    assert asked == [{(p["dialogue"], p["turn"]): p["selected"] for p in found.predictions}]
    assert len(set(asked[0].values())) > 1
    assert found.results["columns"][AFTER]["hits_ties"] == 6


@pytest.mark.parametrize(
    ("dialogues", "template", "sentence"),
    [
        (tiny.DIALOGUES, None, "no answered turn has candidates"),
        (with_candidates(), PersonaTemplate(), "data.task = persona writes none"),
    ],
)
def test_what_cannot_be_ranked_is_said_in_a_sentence(dialogues, template, sentence, tmp_path):
    setting = experiment(metrics=("default", "hits"))
    found = evaluate_run(setting, tiny.trainable(), None, dialogues, template=template, replies=2)
    [note] = found.results["notes"]
    assert note.startswith("hits@1 is left out: ") and sentence in note
    assert "hits_1" not in found.results["columns"][AFTER] and "f1" in found.results["columns"][AFTER]
    write_results(tmp_path, found, setting.config, source="x", checkpoint="best", step=3, chat="c", question="q")
    assert kept_results(tmp_path, "q") is None
