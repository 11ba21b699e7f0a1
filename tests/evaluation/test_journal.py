"""What a killed evaluation has found is found again, whole lines only, and for its own question alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_experiment import experiment

from spt_jax.errors import UserError
from spt_jax.evaluation.candidate_scores import CandidateScores
from spt_jax.evaluation.journal import Journal, KeptColumn
from spt_jax.evaluation.likelihood import Likelihoods
from spt_jax.evaluation.run_evaluation import evaluate_run
from spt_jax.generation.engine import GenerationEngine
from spt_jax.storage.read_copy import JOURNAL

AFTER = "after training"
FOUND = Likelihoods(
    np.array([0, 0, 1]),
    np.array([0, 1, 0]),
    np.array([3, 4, 5]),
    np.arange(6, dtype=np.float32).reshape(3, 2),
    -np.arange(6, dtype=np.float32).reshape(3, 2),
)


def test_another_journal_of_the_question_knows_everything(tmp_path):
    journal = Journal(tmp_path, "why")
    journal.column(AFTER).keep_likelihoods(FOUND)
    journal.column(AFTER).keep_replies([(0, 0), (1, 0)], ["yes\nand no", "ä \u2028 b"])
    journal.column(AFTER).keep_replies([(0, 1)], [""])
    again = Journal(tmp_path, "why")
    assert again.column(AFTER).replies() == {(0, 0): "yes\nand no", (1, 0): "ä \u2028 b", (0, 1): ""}
    assert again.column("before training").replies() == {}
    kept = again.column(AFTER).likelihoods()
    assert kept is not None
    assert again.column("before training").likelihoods() is None
    for field in dataclasses.fields(Likelihoods):
        np.testing.assert_array_equal(getattr(kept, field.name), getattr(FOUND, field.name))
        assert getattr(kept, field.name).dtype == getattr(FOUND, field.name).dtype


def test_scores_of_candidates_come_back_exactly(tmp_path):
    scores = [
        CandidateScores(np.array([0.1, 1 / 3]), np.array([4, 5])),
        CandidateScores(np.array([2e-7]), np.array([1])),
    ]
    Journal(tmp_path, "why").column(AFTER).keep_candidates([(0, 1), (2, 0)], scores)
    found = Journal(tmp_path, "why").column(AFTER).candidates()
    assert list(found) == [(0, 1), (2, 0)]
    for kept, given in zip(found.values(), scores, strict=True):
        np.testing.assert_array_equal(kept.nll, given.nll)
        np.testing.assert_array_equal(kept.tokens, given.tokens)
        assert (kept.nll.dtype, kept.tokens.dtype) == (np.float64, np.int64)
    assert Journal(tmp_path, "why").begun == 0, "these are no replies"


def test_each_question_has_its_own_and_a_finished_one_leaves_the_place_of_those_that_were_stopped(tmp_path):
    Journal(tmp_path, "why").column(AFTER).keep_replies([(0, 0)], ["yes"])
    journal = Journal(tmp_path, "how")
    assert journal.column(AFTER).replies() == {}
    assert journal.begun == 0
    journal.column(AFTER).keep_replies([(0, 0)], ["so"])
    assert Journal(tmp_path, "how").column(AFTER).replies() == {(0, 0): "so"}
    journal.close()
    again = Journal(tmp_path, "why")
    assert again.column(AFTER).replies() == {(0, 0): "yes"}
    again.close()
    assert not (tmp_path / JOURNAL).exists()


def test_the_last_one_that_ended_is_there_on_request_alone(tmp_path):
    for work, reply in (("why", "yes"), ("how", "so")):
        journal = Journal(tmp_path, work)
        journal.column(AFTER).keep_replies([(0, 0)], [reply])
        journal.close()
    assert Journal(tmp_path, "how").begun == 0
    assert not Journal(tmp_path, "why").reopen()  # an earlier one
    again = Journal(tmp_path, "how")
    assert again.reopen()
    assert again.column(AFTER).replies() == {(0, 0): "so"}
    again.close()
    Journal(tmp_path, "nothing").close()
    assert not Journal(tmp_path, "nothing").reopen()


def test_one_that_was_stopped_and_one_that_ended_are_put_together(tmp_path):
    ended = Journal(tmp_path, "why")
    ended.column(AFTER).keep_replies([(0, 0), (0, 1)], ["one", "two"])
    ended.column(AFTER).keep_likelihoods(FOUND)
    ended.close()
    stopped = Journal(tmp_path, "why")
    stopped.column(AFTER).keep_replies([(0, 1), (1, 0)], ["two", "three"])
    path = tmp_path / JOURNAL / "why" / "after_training.replies.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    again = Journal(tmp_path, "why")
    for _ in range(2):  # a kill before the end takes nothing from what is kept
        assert again.reopen()
        assert again.column(AFTER).replies() == {(0, 0): "one", (0, 1): "two"}
    assert again.begun == 2
    assert len(again.column(AFTER).likelihoods() or ()) == len(FOUND)


def test_two_evaluations_that_would_find_the_same_do_not_write_into_one_another(tmp_path):
    journal, other = Journal(tmp_path, "why"), Journal(tmp_path, "how")
    with journal.locked(), other.locked():
        taken = pytest.raises(UserError, match=r"another process is evaluating the same in .*; wait for it")
        with taken, Journal(tmp_path, "why").locked():
            pytest.fail("both went on")
        journal.column(AFTER).keep_replies([(0, 0)], ["yes"])
    assert [path.name for path in (tmp_path / JOURNAL).iterdir()] == ["why"]
    with Journal(tmp_path, "why").locked():
        journal.close()
    assert not (tmp_path / JOURNAL).exists()


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_that_was_cut_off_is_taken_out_wherever_the_cut(tmp_path, cut):
    journal = Journal(tmp_path, "why")
    journal.column(AFTER).keep_replies([(0, 0), (0, 1)], ["one", "zwölf"])
    [path] = (tmp_path / JOURNAL / "why").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, "why")
    assert again.column(AFTER).replies() == {(0, 0): "one"}
    again.column(AFTER).keep_replies([(0, 1)], ["zwölf"])
    assert Journal(tmp_path, "why").column(AFTER).replies() == {(0, 0): "one", (0, 1): "zwölf"}


@pytest.mark.parametrize(
    "likelihood",
    [
        '"tokens": 3, "nll": [1.0, 2.0], "scores": [0.5]',
        '"tokens": 3, "nll": [1.0, NaN], "scores": [0.5, 0.5]',
        '"tokens": 3, "nll": [1.0, "2.0"], "scores": [0.5, 0.5]',
        '"tokens": 3.5, "nll": [1.0, 2.0], "scores": [0.5, 0.5]',
        '"tokens": 3, "nll": [], "scores": []',
        '"tokens": 3, "nll": 1, "scores": 1',
        '"tokens": 3, "nll": [1.0, 2.0]',
    ],
)
def test_likelihoods_that_are_none_are_taken_out(tmp_path, likelihood):
    column = Journal(tmp_path, "why").column(AFTER)
    column.keep_likelihoods(FOUND)
    (path,) = (tmp_path / JOURNAL / "why").iterdir()
    path.write_bytes(path.read_bytes() + f'{{"dialogue": 2, "turn": 0, {likelihood}}}\n'.encode())
    kept = column.likelihoods()
    assert kept is not None
    assert kept.dialogue.tolist() == FOUND.dialogue.tolist()


def test_likelihoods_under_other_numbers_of_prompts_are_none(tmp_path):
    column = Journal(tmp_path, "why").column(AFTER)
    column.keep_likelihoods(FOUND)
    column.keep_likelihoods(dataclasses.replace(FOUND, nll=FOUND.nll[:, :1], scores=FOUND.scores[:, :1]).at([2]))
    assert column.likelihoods() is None


@pytest.mark.parametrize(
    "line",
    [
        '{"dialogue": 1, "turn": 0, "reply": ["a"]}',
        '{"dialogue": 1.5, "turn": 0, "reply": "a"}',
        '{"dialogue": -1, "turn": 0, "reply": "a"}',
        '{"dialogue": true, "turn": 0, "reply": "a"}',
        '{"dialogue": 1, "turn": 1e999, "reply": "a"}',
        '{"dialogue": 1, "turn": 0}',
        '{"dialogue": 1, "turn": 0, "reply": "\\ud83d"}',
        "[" * 100_000,
        "3",
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_reply_is_taken_out_with_what_follows(tmp_path, line):
    column = Journal(tmp_path, "why").column(AFTER)
    column.keep_replies([(0, 0)], ["yes"])
    (path,) = (tmp_path / JOURNAL / "why").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole + line.encode() + b"\n" + whole)
    assert column.replies() == {(0, 0): "yes"}
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "scores",
    [
        '"nll": [1.0, "2.0"], "tokens": [3, 4]',
        '"nll": [1.0, null], "tokens": [3, 4]',
        '"nll": [1.0, NaN], "tokens": [3, 4]',
        '"nll": [1.0, 2.0], "tokens": [3, 4.5]',
        '"nll": [1.0, 2.0], "tokens": [3, 0]',
        '"nll": [1.0], "tokens": [3, 4]',
        '"nll": 1, "tokens": 3',
    ],
)
def test_scores_of_candidates_that_are_none_are_taken_out(tmp_path, scores):
    column = Journal(tmp_path, "why").column(AFTER)
    column.keep_candidates([(0, 1)], [CandidateScores(np.array([0.5, 2.0]), np.array([3, 4]))])
    (path,) = (tmp_path / JOURNAL / "why").iterdir()
    path.write_bytes(path.read_bytes() + f'{{"dialogue": 2, "turn": 0, {scores}}}\n'.encode())
    assert list(column.candidates()) == [(0, 1)]


def test_a_workdir_that_is_no_folder_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be"):
        Journal(tmp_path / "file", "why").column(AFTER).keep_replies([(0, 0)], ["yes"])


def test_a_file_that_cannot_be_read_now_is_told_and_left_as_it_is(tmp_path, monkeypatch):
    column = Journal(tmp_path, "why").column(AFTER)
    column.keep_replies([(0, 0)], ["yes"])
    (path,) = (tmp_path / JOURNAL / "why").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "not now")))
        with pytest.raises(UserError, match=r"after_training.replies.jsonl cannot be read: not now"):
            column.replies()
        with pytest.raises(UserError, match=r"cannot be read: not now"):
            column.likelihoods()
    assert column.replies() == {(0, 0): "yes"}
    assert path.exists()


def test_nothing_found_leaves_no_folder(tmp_path):
    journal = Journal(tmp_path, "why")
    assert journal.column(AFTER).replies() == {}
    assert not (tmp_path / JOURNAL).exists()


@functools.cache
def undisturbed(temperature: float, batch: int = 2) -> tuple[Callable[[Journal | None], Any], Any]:
    """An evaluation of two dialogues, and what it finds when nobody stops it."""
    setting = experiment(batch=batch, samples=0)
    setting.config.generation.temperature = temperature
    trainable = tiny.trainable(setting.model)

    def evaluated(journal: Journal | None):
        return evaluate_run(setting, trainable, tiny.trainable(setting.model, 2), tiny.DIALOGUES[:2], journal=journal)

    return evaluated, evaluated(None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batches", [0, 1, 4, 6])
def test_an_evaluation_that_was_stopped_goes_on_and_generates_no_reply_twice(
    tmp_path, monkeypatch, batches, temperature
):
    evaluated, wanted = undisturbed(temperature)
    generate, generated = GenerationEngine.generate, []

    def counted(engine, *rest, on_rows, **options):
        def heard(rows, found):
            if len(generated) == stop_before:
                raise KeyboardInterrupt
            on_rows(rows, found)
            generated.append(len(rows))

        return generate(engine, *rest, on_rows=heard, **options)

    monkeypatch.setattr(GenerationEngine, "generate", counted)
    stop_before = batches
    with pytest.raises(KeyboardInterrupt):
        evaluated(Journal(tmp_path, "why"))
    journal = Journal(tmp_path, "why")
    assert journal.begun == sum(generated)
    stop_before = -1
    found = evaluated(journal)
    assert sum(generated) == 3 * len(wanted.predictions)  # three columns
    assert found.predictions == wanted.predictions
    assert found.results["columns"] == wanted.results["columns"]


@pytest.mark.parametrize("batches", [0, 1, 3, 4])
def test_an_evaluation_that_is_stopped_while_it_scores_scores_no_batch_twice(tmp_path, monkeypatch, batches):
    evaluated, wanted = undisturbed(0.0, batch=1)
    kept_by = KeptColumn.keep_likelihoods
    scored: list[tuple[int, int]] = []
    stop_after = batches

    def counted(self: KeptColumn, found: Likelihoods) -> None:
        nonlocal stop_after
        if not stop_after:
            raise KeyboardInterrupt
        stop_after -= 1
        kept_by(self, found)
        scored.extend(zip(found.dialogue.tolist(), found.turn.tolist(), strict=True))

    monkeypatch.setattr(KeptColumn, "keep_likelihoods", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(Journal(tmp_path, "why"))
    stop_after = -1
    found = evaluated(Journal(tmp_path, "why"))
    turns = [(d, t) for d, dialogue in enumerate(tiny.DIALOGUES[:2]) for t in range(len(dialogue.turns))]
    assert sorted(scored) == sorted(turns * 3)  # three columns
    assert found.predictions == wanted.predictions
    assert found.results["columns"] == wanted.results["columns"]
