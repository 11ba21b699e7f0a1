from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import TALK, train_arguments, walk, write_dialogues
from tiny_wordnet import readers_closed, write_wordnet

from spt_jax.commands.main import main
from spt_jax.commands.restored import demonstrations_of, open_run
from spt_jax.data.template import PlainTemplate
from spt_jax.errors import UserError
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.loading import load_lm
from spt_jax.training.workdir import read_config


@pytest.fixture
def copy_of(trained, tmp_path) -> Path:
    return shutil.copytree(trained / "run", tmp_path / "run")


def results_of(workdir: Path) -> dict:
    return json.loads((workdir / "results.json").read_text())


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_hold_every_column_with_definitions_and_versions(trained):
    results = results_of(trained / "run")
    assert list(results["columns"]) == ["no soft prompt", "before training", "after training"]
    for column in results["columns"].values():
        assert {"perplexity", "perplexity_per_word", "oracle_perplexity", "f1", "bleu", "rouge_l", "dist_1"} <= set(
            column
        )
        # What a column counts without being a metric of its own is defined by its name.
        assert all(column[name] is None or np.isfinite(column[name]).all() for name in column)
    assert {"perplexity", "f1", "bleu", "rouge_l", "dist_1", "dist_2", "usage"} <= set(results["definitions"])
    assert {"spt_jax", "jax", "sacrebleu"} <= {name.replace("-", "_") for name in results["versions"]}
    assert (results["turns"], results["replies"], results["data"]) == (8, 5, str(trained / "test.txt"))
    assert results["columns"]["after training"]["usage"] == pytest.approx(
        np.bincount([p["selected"] for p in scored(trained)], minlength=3) / 8
    )


def scored(trained: Path) -> list[dict]:
    out = trained / "scored.jsonl"
    if not out.exists():
        walk("score", f"--workdir={trained / 'run'}", f"--data={trained / 'test.txt'}", f"--out={out}")
    return lines_of(out)


def test_predictions_are_turns_of_the_file_in_its_order(trained):
    predictions = lines_of(trained / "run" / "predictions.jsonl")
    places = [(p["dialogue"], p["turn"]) for p in predictions]
    assert len(places) == 5
    assert places == sorted(set(places))
    by_turn = {(s["dialogue"], s["turn"]): s for s in scored(trained)}
    for p in predictions:
        persona, turns = TALK[p["dialogue"]]
        assert p["persona"] == [persona]
        assert p["reference"] == turns[p["turn"]][1]
        said = [text for turn in turns[: p["turn"] + 1] for text in turn][:-1]
        assert p["history"] == said
        assert p["selected"] == int(np.argmax(p["scores"])) == by_turn[p["dialogue"], p["turn"]]["selected"]
        assert p["nll"] == pytest.approx(by_turn[p["dialogue"], p["turn"]]["nll"], rel=1e-6)
        assert "\n" not in p["prediction"]


def test_perplexity_follows_from_the_output_of_score(trained):
    turns = scored(trained)
    total = sum(turn["target_tokens"] * turn["nll"][int(np.argmax(turn["scores"]))] for turn in turns)
    words = sum(len(response.split()) for _, dialogue in TALK[:4] for _, response in dialogue)
    after = results_of(trained / "run")["columns"]["after training"]
    assert after["perplexity"] == pytest.approx(np.exp(total / sum(turn["target_tokens"] for turn in turns)), rel=1e-6)
    assert after["perplexity_per_word"] == pytest.approx(np.exp(total / words), rel=1e-5)
    best = sum(turn["target_tokens"] * min(turn["nll"]) for turn in turns)
    assert after["oracle_perplexity"] == pytest.approx(
        np.exp(best / sum(turn["target_tokens"] for turn in turns)), rel=1e-6
    )


def test_no_soft_prompt_is_the_lm_alone_on_rows_written_by_hand(trained):
    lm = load_lm(str(trained / "lm"))
    nats, tokens = 0.0, 0
    for persona, turns in TALK[:4]:
        for t, (_, response) in enumerate(turns):
            said = " ".join(f"Q: {q} R: {r}" for q, r in turns[:t])
            context = f"given persona: {persona}; context: {said}{' ' if said else ''}Q: {turns[t][0]} R:"
            before, after = lm.tokenizer.encode([context, f"{context} {response}"])
            assert after[: len(before)] == before
            row = [lm.tokenizer.bos_id, *after, lm.tokenizer.eos_id]
            padded = np.pad(row, (0, 256 - len(row)))[None]
            places = jnp.arange(256)[None]
            hidden, _ = decode(lm.config, lm.params, embed(lm.config, lm.params, padded), places, places < len(row))
            logits = np.asarray(vocabulary_logits(lm.config, lm.params, hidden[0]), np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            targets = range(1 + len(before), len(row))
            nats -= sum(log_probabilities[i - 1, row[i]] for i in targets)
            tokens += len(targets)
    bare = results_of(trained / "run")["columns"]["no soft prompt"]
    assert bare["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-5)
    assert bare["usage"] is None


def test_the_best_checkpoint_is_restored_not_the_latest(trained, copy_of, capsys):
    logged = {
        row["step"]: row["development/perplexity"]
        for row in lines_of(trained / "run" / "metrics.jsonl")
        if "development/perplexity" in row
    }
    best = min(logged, key=lambda step: logged[step])
    assert best not in (0, max(logged)), "the tiny run no longer has its best step in the middle"
    assert (results_of(trained / "run")["checkpoint"], results_of(trained / "run")["step"]) == ("best", best)
    walk("evaluate", f"--workdir={copy_of}", f"--checkpoint={best}", "--nobaselines", "--replies=1")
    expected = results_of(trained / "run")["columns"]["after training"]["perplexity"]
    assert results_of(copy_of)["columns"]["after training"]["perplexity"] == expected
    assert list(results_of(copy_of)["columns"]) == ["after training"]
    walk("evaluate", f"--workdir={copy_of}", "--checkpoint=latest", "--nobaselines", "--replies=1")
    assert (results_of(copy_of)["checkpoint"], results_of(copy_of)["step"]) == ("latest", max(logged))
    assert results_of(copy_of)["columns"]["after training"]["perplexity"] != expected
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={copy_of}", "--checkpoint=3"]) == 2
    assert "there is no checkpoint of step 3" in capsys.readouterr().err


def test_limit_takes_the_first_dialogues_and_data_another_file(trained, copy_of, tmp_path):
    other = write_dialogues(tmp_path / "other.txt", TALK[4:8])
    walk("evaluate", f"--workdir={copy_of}", f"--data={other}", "--limit=2", "--nobaselines", "--replies=0")
    results = results_of(copy_of)
    turns = [len(turns) for _, turns in TALK[4:6]]
    # 0 means a reply to every turn, whatever the run's own number is.
    assert (results["turns"], results["replies"], results["data"]) == (sum(turns), sum(turns), str(other))
    assert {p["persona"][0] for p in lines_of(copy_of / "predictions.jsonl")} == {persona for persona, _ in TALK[4:6]}


def test_malformed_lines_are_left_out_where_that_is_asked_for(copy_of, tmp_path, capsys):
    other = write_dialogues(tmp_path / "other.txt", TALK[4:6])
    with other.open("a") as file:
        file.write("1 your persona: i sail .\n2 no tab\n")
    walk("evaluate", f"--workdir={copy_of}", f"--data={other}", "--on_error=skip", "--nobaselines", "--replies=1")
    assert results_of(copy_of)["turns"] == sum(len(turns) for _, turns in TALK[4:6])
    assert "skipped " in capsys.readouterr().err


def test_a_run_without_test_dialogues_is_measured_on_those_cut_from_its_training_file(copy_of):
    record = json.loads((copy_of / "config.json").read_text())
    record["config"]["data"] |= {"test": "", "test_dialogues": 2}
    del record["dialogues"]  # of those it learned from, which this run of no test dialogues would not have cut
    (copy_of / "config.json").write_text(json.dumps(record))
    walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=1")
    assert results_of(copy_of)["data"].endswith("train.txt (held out)")


def test_a_run_is_not_measured_on_parts_of_a_file_that_changed_since_it_learned_from_it(
    trained, copy_of, tmp_path, capsys
):
    more = write_dialogues(tmp_path / "more.txt", (*TALK, ("i am new here.", (("hi", "yo"),))))
    record = json.loads((copy_of / "config.json").read_text())
    record["config"]["data"]["train"] = str(more)
    (copy_of / "config.json").write_text(json.dumps(record))
    capsys.readouterr()
    for split in ("development", "train"):
        assert main(["evaluate", f"--workdir={copy_of}", f"--split={split}"]) == 2
        told = capsys.readouterr().err
        assert f"the dialogues of the run in {copy_of} have changed since it was started" in told
        assert "more.txt" in told and "or name dialogues to measure on by --data" in told
    walk("evaluate", f"--workdir={copy_of}", f"--data={trained / 'test.txt'}", "--nobaselines", "--replies=1")


def test_a_few_shot_run_shows_no_other_dialogues_than_it_was_started_with(copy_of, tmp_path):
    config, *_ = read_config(copy_of)
    config.method.kind, config.method.shots = "few_shot", 2
    assert len(demonstrations_of(config, copy_of)) > 1
    config.data.train = str(write_dialogues(tmp_path / "fewer.txt", TALK[:-1]))
    with pytest.raises(UserError, match=r"have changed since it was started.*or start another run"):
        demonstrations_of(config, copy_of)


def test_a_run_opens_where_its_slices_do_not_divide_the_devices(copy_of):
    record = json.loads((copy_of / "config.json").read_text())
    record["config"]["mesh"]["slices"] = 3
    (copy_of / "config.json").write_text(json.dumps(record))
    assert open_run(str(copy_of)).experiment.mesh.shape["data"] == jax.device_count()


def test_split_chooses_a_part_of_the_runs_data(copy_of):
    personas = {}
    for split in ("test", "development", "train"):
        walk("evaluate", f"--workdir={copy_of}", f"--split={split}", "--nobaselines", "--replies=0")
        personas[split] = {tuple(p["persona"]) for p in lines_of(copy_of / "predictions.jsonl")}
    assert personas["development"] and personas["train"]
    assert not personas["development"] & personas["train"]
    # Of the training file the development dialogues are cut.
    assert personas["development"] | personas["train"] == {(persona,) for persona, _ in TALK}


def test_the_training_file_is_not_needed_once_there_are_test_dialogues(trained, copy_of):
    record = json.loads((copy_of / "config.json").read_text())
    record["config"]["data"]["train"] = "gone.txt"
    (copy_of / "config.json").write_text(json.dumps(record))
    walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=1")
    assert results_of(copy_of)["turns"] == 8


def test_control_characters_of_a_reply_never_reach_the_terminal(copy_of, capsys, monkeypatch):
    monkeypatch.setattr(PlainTemplate, "cut", lambda self, text: "\x1b[2Jbo\u202eo")
    walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=1", "--limit=1")
    said = capsys.readouterr().out
    assert "answers: [2Jboo" in said
    assert "\x1b[2J" not in said
    assert f"talk to it: spt-jax chat --workdir={copy_of}" in said


def test_the_terminal_says_whose_reply_it_shows(copy_of, capsys):
    record = json.loads((copy_of / "config.json").read_text())
    asked = ("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=1", "--limit=1")
    for selection, who in (("hard", ""), ("soft", ", the most of the mixture, alone")):
        record["config"]["evaluation"]["selection"] = selection
        (copy_of / "config.json").write_text(json.dumps(record))
        walk(*asked)
        [sample] = results_of(copy_of)["samples"]
        shown = capsys.readouterr().out
        assert f"  soft prompt {sample['selected']}{who} answers: " in shown
        walk(*asked, "--reuse")
        assert f"  soft prompt {sample['selected']}{who} answers: " in capsys.readouterr().out


def test_results_are_shown_again_on_request_while_the_question_is_the_same(copy_of, capsys, monkeypatch):
    from spt_jax.evaluation import run_evaluation

    capsys.readouterr()
    asked = []
    compute = run_evaluation.evaluate_run
    monkeypatch.setattr(run_evaluation, "evaluate_run", lambda *a, **b: asked.append(1) or compute(*a, **b))
    walk("evaluate", f"--workdir={copy_of}", "--reuse")
    shown = capsys.readouterr()
    assert not asked
    assert "Perplexity per token" in shown.out
    assert shown.out.count("answers: ") == 2
    answers = (copy_of / "results.json").read_bytes()
    for changed in ("--limit=1", "--nobaselines", "--replies=1", "--checkpoint=latest", "--no_repeat_ngram=2"):
        # One part of the question at a time: behind another evaluation two would differ.
        (copy_of / "results.json").write_bytes(answers)
        walk("evaluate", f"--workdir={copy_of}", "--reuse", changed)
        assert len(asked) == 1, changed
        asked.clear()


def test_other_figures_are_computed_of_the_replies_that_are_there(copy_of, capsys, monkeypatch):
    from spt_jax.evaluation.journal import KeptColumn

    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(copy_of.parent / "dict")))
    command = ("evaluate", f"--workdir={copy_of}", "--replies=5")
    measured = []
    for name in ("keep_likelihoods", "keep_replies"):
        keep = getattr(KeptColumn, name)
        monkeypatch.setattr(KeptColumn, name, lambda *a, keep=keep: measured.append(1) or keep(*a))
    walk(*command, "--nobaselines")
    first = results_of(copy_of)["columns"]["after training"]
    assert measured
    measured.clear()
    capsys.readouterr()
    with readers_closed():
        walk(*command, "--nobaselines", "--metrics=default,meteor", "--reuse")
    assert "going on from the last evaluation: 5 replies are there" in capsys.readouterr().out
    assert not measured
    found = results_of(copy_of)["columns"]["after training"]
    assert found["meteor"] >= 0 and found.items() >= first.items()
    walk(*command, "--reuse")
    assert results_of(copy_of)["columns"].keys() == {"no soft prompt", "before training", "after training"}
    several = len(measured)
    measured.clear()
    walk(*command)  # nothing is taken unasked
    assert len(measured) > several > 0


def test_an_evaluation_that_was_stopped_goes_on_with_other_figures(copy_of, capsys, monkeypatch):
    from spt_jax.evaluation import columns

    command = ("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=5")
    with monkeypatch.context() as patched:
        patched.setattr(columns, "text_metrics", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command]) == 130
    capsys.readouterr()
    walk(*command, "--metrics=length")
    assert "going on where an evaluation was stopped: 5 replies are there" in capsys.readouterr().out


def test_results_of_few_shot_prompting_follow_from_the_dialogues_it_shows(tmp_path, monkeypatch):
    from spt_jax.evaluation import run_evaluation

    run, train = tmp_path / "run", tmp_path / "train.txt"
    options = {"method.kind": "few_shot", "method.shots": 1, "tracking.tensorboard": "false", "evaluation.samples": 0}
    arguments = train_arguments(tmp_path, workdir=run)
    walk(*arguments, *(f"--config.{name}={value}" for name, value in options.items()))
    walk("evaluate", f"--workdir={run}", "--replies=1", "--limit=1")
    first = results_of(run)["columns"]
    compute, asked = run_evaluation.evaluate_run, []
    monkeypatch.setattr(run_evaluation, "evaluate_run", lambda *a, **b: asked.append(1) or compute(*a, **b))
    walk("evaluate", f"--workdir={run}", "--replies=1", "--limit=1", "--reuse")
    assert not asked
    write_dialogues(train, [(persona, [(query, f"{said}?!") for query, said in turns]) for persona, turns in TALK])
    assert main(["evaluate", f"--workdir={run}", "--replies=1", "--limit=1", "--reuse"]) == 2
    record = json.loads((run / "config.json").read_text())
    del record["dialogues"]  # as in a run of an older version, which takes any
    (run / "config.json").write_text(json.dumps(record))
    walk("evaluate", f"--workdir={run}", "--replies=1", "--limit=1", "--reuse")
    assert asked and results_of(run)["columns"] != first


def test_results_stand_under_the_checkpoint_that_was_measured(copy_of, monkeypatch):
    """A training beside the evaluation saves while the LM is loaded."""
    from spt_jax.commands import restored
    from spt_jax.evaluation import run_evaluation

    earlier = min(int(path.name) for path in (copy_of / "checkpoints").iterdir() if path.name.isdecimal())
    opened = restored.open_run
    monkeypatch.setattr(restored, "open_run", lambda workdir, step: opened(workdir, str(earlier)))
    walk("evaluate", f"--workdir={copy_of}", "--checkpoint=latest", "--nobaselines", "--replies=1")
    assert results_of(copy_of)["step"] == earlier
    monkeypatch.setattr(run_evaluation, "evaluate_run", None)
    walk("evaluate", f"--workdir={copy_of}", f"--checkpoint={earlier}", "--nobaselines", "--replies=1", "--reuse")


def test_flags_of_decoding_override_the_runs_options(trained, copy_of, capsys):
    free = [p["prediction"] for p in lines_of(trained / "run" / "predictions.jsonl")]
    stop = next(text for text in free if len(text) > 1)[1]
    walk("evaluate", f"--workdir={copy_of}", "--nobaselines", f"--stop={stop}")
    stopped = [p["prediction"] for p in lines_of(copy_of / "predictions.jsonl")]
    assert stopped == [text.split(stop)[0].strip() for text in free] != free
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={copy_of}", "--top_k=3"]) == 2
    assert "generation.top_k would cut a draw, but generation.temperature is 0" in capsys.readouterr().err


def test_replies_are_as_long_and_drawn_as_the_flags_ask(copy_of, capsys):
    def predictions(*flags: str) -> list[str]:
        walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--metrics=length", *flags)
        return [p["prediction"] for p in lines_of(copy_of / "predictions.jsonl")]

    free, short = predictions(), predictions("--max_new_tokens=2")
    assert results_of(copy_of)["settings"]["evaluation.max_new_tokens"] == 2
    assert all(text.startswith(cut) for text, cut in zip(free, short, strict=True)) and free != short
    drawn, again, other = (predictions("--temperature=2", f"--seed={seed}") for seed in (1, 1, 2))
    assert drawn == again != other
    assert results_of(copy_of)["settings"]["evaluation.seed"] == 2
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={copy_of}", "--max_new_tokens=100000"]) == 2
    assert "lower data.max_length or evaluation.max_new_tokens" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["evaluate", "score", "chat"])
def test_without_a_run_or_a_checkpoint_the_doors_say_so(trained, copy_of, tmp_path, capsys, door):
    more = [f"--data={trained / 'test.txt'}", f"--out={tmp_path / 'o'}"] if door == "score" else []
    assert main([door, f"--workdir={copy_of}", "--checkpoint=first", *more]) == 2
    assert "the checkpoint is 'first'; allowed: best, latest or a step's number" in capsys.readouterr().err
    shutil.rmtree(copy_of / "checkpoints")
    assert main([door, f"--workdir={copy_of}", *more]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert main([door, f"--workdir={tmp_path / 'nowhere'}", *more]) == 2
    assert "is not the working directory of a run: it has no config.json" in capsys.readouterr().err
    (copy_of / "config.json").write_text("{")
    assert main([door, f"--workdir={copy_of}", *more]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_metrics_are_chosen_by_name(copy_of, capsys, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(copy_of.parent / "dict")))
    with readers_closed():
        walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=2", "--limit=1", "--metrics=f1,meteor")
    figures = results_of(copy_of)["columns"]["after training"]
    assert set(figures) == {"f1", "f1_parlai", "meteor", "usage", "pairs", "empty_replies"}
    assert "METEOR (%)" in capsys.readouterr().out
    walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=2", "--limit=1", "--metrics=length")
    assert "Words in a reply" in capsys.readouterr().out


def test_what_cannot_be_computed_is_told_and_the_rest_is_there(copy_of, capsys):
    walk("evaluate", f"--workdir={copy_of}", "--nobaselines", "--replies=2", "--limit=1", "--metrics=default,hits")
    assert "hits@1 is left out: no answered turn has candidates" in capsys.readouterr().out
    assert "self_bleu" in results_of(copy_of)["columns"]["after training"]


def test_a_wordnet_that_is_not_where_it_is_said_to_be_is_told_before_the_work(copy_of, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    before = (copy_of / "results.json").read_bytes()
    with readers_closed():
        assert main(["evaluate", f"--workdir={copy_of}", "--metrics=meteor"]) == 2
    said = capsys.readouterr()
    assert "the environment variable WNSEARCHDIR leads to" in said.err
    assert "checkpoint, step" not in said.out
    assert (copy_of / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--metrics=f1,rogue", r"no group of metrics 'rogue'; allowed: default, .*\. Did you mean 'rouge'\?"),
        ("--metrics=nli", "'nli' needs a classifier of entailment; --nli names it"),
        ("--metrics=", "no metric is asked for"),
    ],
)
def test_wrong_metrics_are_told_before_the_work(copy_of, capsys, flag, sentence):
    assert main(["evaluate", f"--workdir={copy_of}", flag]) == 2
    assert re.search(sentence, capsys.readouterr().err)
