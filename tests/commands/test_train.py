from __future__ import annotations

import json
import re
import shutil
import signal

import jax
import pytest
from tiny_run import TALK, train_arguments, walk, write_config, write_dialogues, write_llama

from spt_jax.commands.main import main
from spt_jax.config import default_config
from spt_jax.evaluation.likelihood import DevelopmentEvaluator
from spt_jax.exit_codes import STOPPED
from spt_jax.training import loop, run_training
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.loop import save
from spt_jax.training.remat import with_remat


@pytest.fixture
def copy_of(trained, tmp_path):
    """The trained run's folder, to be changed."""
    return shutil.copytree(trained / "run", tmp_path / "run")


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arguments_of(trained, workdir, *more: str) -> list[str]:
    return ["train", f"--config={trained / 'tiny.py'}:3", f"--workdir={workdir}", *more]


def test_a_run_leaves_the_files_of_a_working_directory(trained):
    found = {path.name for path in (trained / "run").iterdir()}
    assert found == {
        *("config.json", "initial.safetensors", "metrics.jsonl", "checkpoints", "tensorboard"),
        *("predictions.jsonl", "results.json", "report.html", ".evaluation"),
    }
    assert any(path.name.startswith("events.out") for path in (trained / "run" / "tensorboard").iterdir())
    record = json.loads((trained / "run" / "config.json").read_text())
    assert record["config"]["bank"]["num_prompts"] == 3
    assert record["lm"]["name"] == str(trained / "lm")
    assert len(record["lm"]["sha256"]) == 64
    assert {part: len(digest) for part, digest in record["dialogues"].items()} == {"training": 64, "development": 64}


def test_every_step_and_every_evaluation_is_logged(trained):
    found = rows(trained / "run")
    steps = {row["step"]: row for row in found if "loss/total" in row}
    assert sorted(steps) == [1, 2, 3, 4]
    terms = {f"loss/{term}" for term in ("total", "lm", "selection", "contrastive", "fusion")}
    rates = {"tokens_per_second", "turns_per_second", "padding_share", "selection_entropy", "skipped"}
    norms = {"gradient_norm/bank", "gradient_norm/retriever", "usage/0", "usage/1", "usage/2"}
    assert all(terms | rates | norms <= set(row) for row in steps.values())
    assert [row["step"] for row in found if "development/perplexity" in row] == [0, 2, 4]


def test_the_same_command_again_resumes_and_changes_nothing(trained, copy_of, capsys):
    before = rows(copy_of)
    walk(*arguments_of(trained, copy_of))
    assert "resuming from step 4 of 4" in capsys.readouterr().out
    assert rows(copy_of) == before


def test_a_second_ctrl_c_leaves_a_training_at_once_and_the_same_command_goes_on(trained, tmp_path, capsys, monkeypatch):
    workdir, asked = tmp_path / "run", []

    def save_with_ctrl_c(checkpoints, state, meta, perplexity):
        if int(state.step):
            asked.append(int(state.step))
            signal.raise_signal(signal.SIGINT)
        save(checkpoints, state, meta, perplexity)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save", save_with_ctrl_c)
        assert main(arguments_of(trained, workdir)) == 130
    assert asked == [2, 3], "the first one is polite, the second comes while the step is saved"
    assert capsys.readouterr().err.endswith("\nspt-jax train: interrupted\n")
    walk(*arguments_of(trained, workdir))
    assert re.search("resuming from step [02] of 4", capsys.readouterr().out)
    metadata = [json.loads((run / "checkpoints/4/meta/metadata").read_text()) for run in (workdir, trained / "run")]
    assert metadata[0]["digests"] == metadata[1]["digests"]


def test_more_steps_go_on_where_the_run_stopped(trained, copy_of, capsys):
    walk(*arguments_of(trained, copy_of, "--config.train.steps=5"))
    assert "resuming from step 4 of 5" in capsys.readouterr().out
    assert [row["step"] for row in rows(copy_of) if "loss/total" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("steps", [3, 2])
def test_a_run_shortened_to_what_it_has_done_is_rated_and_says_that_no_step_is_left(
    trained, tmp_path, capsys, monkeypatch, steps
):
    def save_and_stop(checkpoints, state, meta, perplexity):
        save(checkpoints, state, meta, perplexity)
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGTERM)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "save", save_and_stop)
        assert main(arguments_of(trained, workdir)) == STOPPED
    shorter = arguments_of(trained, workdir, f"--config.train.steps={steps}")
    capsys.readouterr()
    walk(*shorter)
    out = capsys.readouterr().out
    assert f"resuming from step 3 of {steps}; no step is left to train" in out
    assert "finished 3 steps" in out
    assert [row["step"] for row in rows(workdir) if "development/perplexity" in row] == [0, 2, 3]
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.meta("3") or {})["perplexity"] == rows(workdir)[-1]["development/perplexity"]
    before = rows(workdir)
    walk(*shorter)
    assert rows(workdir) == before


def test_another_run_is_refused_with_both_values_and_nothing_is_changed(trained, copy_of, capsys):
    before = {path: path.read_bytes() for path in copy_of.rglob("*") if path.is_file()}
    assert main(arguments_of(trained, copy_of, "--config.optimizer.learning_rate=0.5")) == 2
    assert "optimizer.learning_rate (1.0 there, 0.5 here)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copy_of.rglob("*") if path.is_file()} == before


def test_changed_dialogues_are_refused_until_they_are_restored(tmp_path, capsys):
    workdir, data = tmp_path / "run", tmp_path / "train.txt"
    arguments = train_arguments(tmp_path, workdir=workdir)
    walk(*arguments, "--config.train.steps=1")
    before, text = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}, data.read_text()
    data.write_text(text.replace("\ttick tock", "\ttick clock"))
    walk("evaluate", f"--workdir={workdir}", "--nobaselines", "--replies=1", "--limit=1")
    capsys.readouterr()
    assert main([*arguments, "--config.train.steps=2"]) == 2
    told = capsys.readouterr()
    assert "have changed since it was started: those for " in told.err
    assert f"(data.train = '{data}'); restore what was there, or choose another --workdir" in told.err
    assert "resuming" not in told.out
    assert all(path.read_bytes() == content for path, content in before.items())
    # Nothing is learned from other test dialogues, nor from where a dialogue stands.
    write_dialogues(tmp_path / "test.txt", TALK[1:3])
    data.write_text("\n" + text)
    walk(*arguments, "--config.train.steps=2")
    assert "resuming from step 1 of 2" in capsys.readouterr().out


def test_another_lm_of_the_same_shape_is_refused_by_its_weights(trained, copy_of, tmp_path, capsys):
    other = write_llama(tmp_path / "other", rope_theta=500.0, tie_word_embeddings=True)
    assert main(arguments_of(trained, copy_of, f"--config.model.source={other}")) == 2
    assert "was trained on" in capsys.readouterr().err


def test_a_start_that_failed_leaves_no_folder_and_the_mended_command_runs(tmp_path, capsys):
    arguments = train_arguments(tmp_path, workdir=tmp_path / "run")
    good = (tmp_path / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(good.replace("\ti bake\n", "\t \n"))
    assert main(arguments) == 2
    assert "train.txt:5: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "train.txt").write_text(good)
    walk(*arguments, "--config.train.steps=1")
    assert "finished 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize("existed", [False, True])
def test_a_start_that_fails_before_its_first_checkpoint_leaves_the_folder_as_it_was(
    existed, trained, tmp_path, monkeypatch
):
    def out_of_memory(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    run = tmp_path / "run"
    if existed:
        run.mkdir()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(DevelopmentEvaluator, "run", out_of_memory)
        main(arguments_of(trained, run))
    assert run.exists() == existed
    assert not existed or not list(run.iterdir())


def test_a_failure_after_the_first_checkpoint_keeps_it(trained, copy_of, monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(DevelopmentEvaluator, "run", out_of_memory)
    with pytest.raises(RuntimeError):
        main(arguments_of(trained, copy_of, "--config.train.steps=5"))
    assert (copy_of / "checkpoints" / "4").is_dir()


def test_malformed_lines_are_skipped_counted_and_shown_when_asked(tmp_path, capsys):
    arguments = train_arguments(tmp_path, workdir=tmp_path / "run")
    text = (tmp_path / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(text.replace("\ti bake\n", "\t \n"))
    walk(*arguments, "--config.train.steps=1", "--config.data.on_error=skip")
    out = capsys.readouterr().out
    assert f"skipped {tmp_path / 'train.txt'}:5: " in out
    assert "malformed line" in out


def test_rows_that_lost_some_of_their_text_are_counted_by_training_and_evaluation(tmp_path, capsys):
    arguments = train_arguments(tmp_path, workdir=tmp_path / "run")
    walk(*arguments, "--config.train.steps=1", "--config.data.max_length=90")
    counted = r"\d+ dialogues became one row a turn, \d+ turns lost their oldest history \(data.max_length = 90\)"
    assert re.search(rf"^rows to learn from: {counted}$", capsys.readouterr().out, re.MULTILINE)
    walk("evaluate", f"--workdir={tmp_path / 'run'}", "--nobaselines", "--replies=1")
    assert re.search(rf"^rows to evaluate on: {counted}$", capsys.readouterr().err, re.MULTILINE)


def test_one_prompt_is_plain_prompt_tuning_through_the_doors(tmp_path, capsys):
    model = write_llama(tmp_path / "lm")
    data = write_dialogues(tmp_path / "train.txt")
    config = write_config(tmp_path / "c.py", model, data, data)
    off = [f"--config.objective.{name}_weight=0" for name in ("selection", "contrastive", "fusion")]
    walk("train", f"--config={config}:1", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1", *off)
    walk("evaluate", f"--workdir={tmp_path / 'run'}", "--limit=2", "--replies=1")
    assert "100 %" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    after = results["columns"]["after training"]
    assert after["usage"] == [1.0]
    assert after["oracle_perplexity"] == pytest.approx(after["perplexity"])
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_what_is_recomputed_is_what_the_first_process_says(tmp_path, monkeypatch):
    asked = []

    def noted(model, policy):
        asked.append(policy)
        return with_remat(model, policy)

    monkeypatch.setattr(run_training, "json_told_by_lead", lambda policy: {"none": "dots"}[policy])
    monkeypatch.setattr(run_training, "with_remat", noted)
    walk(*train_arguments(tmp_path, workdir=tmp_path / "run"), "--config.train.steps=1")
    assert asked == ["dots"]


def test_a_trace_tells_the_parts_of_the_step_by_the_names_of_this_version(tmp_path):
    try:
        walk(
            *train_arguments(tmp_path, workdir=tmp_path / "run"),
            "--config.train.steps=3",
            "--config.train.profile_steps=1",
        )
        # Else a program of another version, kept in the cache, would bring its own names.
        assert jax.config.jax_compilation_cache_include_metadata_in_key  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"layers", b"vocabulary", b"embedding", b"Retriever", b"turn_losses", b"optimizer", b"metrics"):
        assert scope in content, scope


@pytest.mark.parametrize(("lead", "steps"), [(True, 3), (False, 0)])
def test_the_first_process_alone_writes_a_trace(tmp_path, monkeypatch, lead, steps):
    config = default_config()
    config.train.profile_steps = 3
    monkeypatch.setattr(run_training, "is_lead", lambda: lead)
    assert run_training._loop_options(config, tmp_path, 9).profile_steps == steps
