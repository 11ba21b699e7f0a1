"""The authors' checkpoints become runs here: the same numbers, and the doors work on them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from official_checkpoints import (
    BASE,
    PROMPT,
    STATES,
    as_saved,
    convert,
    golden_arrays,
    golden_checkpoint,
    golden_config,
    write_checkpoint,
)

from spt_jax.commands import restored
from spt_jax.commands.main import main
from spt_jax.commands.restored import open_run
from spt_jax.data.sources import read_dialogues
from spt_jax.data.template import turn_history
from spt_jax.interop.official import find_model_states, read_official_tensors
from spt_jax.interop.official_config import read_official_run
from spt_jax.interop.official_tree import official_trainable
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.encoder import to_torch
from spt_jax.training import experiment

TRANSFORMER = "opt_b4_retriever_extra_lm"

pytestmark = pytest.mark.torch


def cases(shared: Path) -> list[str]:
    return sorted(path.parent.name for path in (shared / "golden").glob("*/manifest.json"))


def converted_tree(folder: Path) -> dict[str, Any]:
    tensors = read_official_tensors(find_model_states(folder))
    run = read_official_run(folder / "opt.yml", "lm", tensors.engine)
    return official_trainable(tensors, run.config)


def torch_names(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tree back under torch's names."""
    named = {PROMPT.format(k): prompt for k, prompt in enumerate(tree["bank"]["prompts"])}
    lin = tree["retriever"]["lin"]
    named |= {"prompt_normalizer.weight": lin["kernel"].T, "prompt_normalizer.bias": lin["bias"]}
    if "encoder" in tree["retriever"]:
        named |= {f"retriever.{name}": value for name, value in to_torch(tree["retriever"]["encoder"]).items()}
    return named


def test_the_tree_of_every_golden_case_is_bitwise_what_their_program_had_learned(
    shared_dir: Path, tmp_path: Path
) -> None:
    assert len(cases(shared_dir)) > 10
    for case in cases(shared_dir):
        found = torch_names(converted_tree(golden_checkpoint(shared_dir, tmp_path / case, case)))
        expected = golden_arrays(shared_dir, case)
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert np.asarray(found[name]).dtype == np.float32
            np.testing.assert_array_equal(found[name], array, err_msg=f"{case} {name}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_become_float32_without_loss(shared_dir: Path, tmp_path: Path, dtype: str) -> None:
    import torch

    found = torch_names(converted_tree(golden_checkpoint(shared_dir, tmp_path / "run", BASE, dtype)))
    for name, array in golden_arrays(shared_dir, BASE).items():
        saved = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(found[name], saved)


def test_the_run_is_found_from_its_folder_its_checkpoints_the_best_of_them_and_the_file(
    shared_dir: Path, tmp_path: Path
) -> None:
    folder = golden_checkpoint(shared_dir, tmp_path / "run")
    file = folder / "ds_ckpt" / "best" / STATES
    for place in (folder, folder / "ds_ckpt", folder / "ds_ckpt" / "best", file):
        assert find_model_states(place) == file


def test_frozen_tensors_that_were_not_left_out_are_passed_over(shared_dir: Path, tmp_path: Path) -> None:
    import torch

    states = as_saved(golden_arrays(shared_dir, BASE), torch.float32)
    shared_weight = torch.full((3, 4), float("nan"))
    for name in ("model.lm_head.0.weight", "models.0.base_model.model.x", "models.1.word_embeddings.weight"):
        states["module"][name] = shared_weight
    states["module"]["models.0.base_model.mask"] = torch.ones(2, dtype=torch.bool)
    folder = write_checkpoint(tmp_path / "run", states, golden_config(shared_dir, BASE))
    assert set(torch_names(converted_tree(folder))) == set(golden_arrays(shared_dir, BASE))


def test_a_normaliser_that_does_nothing_leaves_no_parameters_or_the_identity(shared_dir: Path, tmp_path: Path) -> None:
    import torch

    for case in (BASE, TRANSFORMER):
        arrays = {n: a for n, a in golden_arrays(shared_dir, case).items() if not n.startswith("prompt_normalizer")}
        config = golden_config(shared_dir, case)
        del config["model"]["normalizer"]
        tree = converted_tree(write_checkpoint(tmp_path / case, as_saved(arrays, torch.float32), config))
        if case == BASE:
            assert set(tree) == {"bank"}
        else:
            np.testing.assert_array_equal(tree["retriever"]["lin"]["kernel"], np.eye(64))
            assert not tree["retriever"]["lin"]["bias"].any()


@pytest.fixture(scope="module")
def converted(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    assert convert(golden_checkpoint(shared_dir, folder / "theirs"), shared_dir, folder / "deep" / "run") == 0
    return folder / "deep" / "run"


def test_the_working_directory_opens_like_a_trained_run_and_holds_their_numbers(
    converted: Path, shared_dir: Path
) -> None:
    run = open_run(str(converted))
    assert run.step == 0 and run.config.retriever.context == "official" and run.config.data.layout == "turn"
    assert Path(run.config.model.source) == shared_dir / "golden" / "models" / "opt-tiny"
    found = torch_names(jax.device_get(run.trainable))
    for name, array in golden_arrays(shared_dir, BASE).items():
        np.testing.assert_array_equal(found[name], array)
    assert jax.tree.structure(run.initial) == jax.tree.structure(jax.device_get(run.trainable))
    assert {path.name for path in converted.iterdir()} == {"config.json", "initial.safetensors", "checkpoints"}
    assert {path.name for path in converted.parent.iterdir()} == {"run"}


def test_the_doors_work_on_it(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "talk.txt"
    data.write_text("1 your persona: i bake bread .\n2 hi !\thello .\n3 who are you ?\ti am a baker .\n")
    scores = tmp_path / "scores.jsonl"
    assert main(["score", f"--workdir={converted}", f"--data={data}", "--batch=8", f"--out={scores}"]) == 0
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["scores"]).all() for line in lines)
    assert main(["score", f"--workdir={converted}", f"--data={data}", "--layout=dialogue", f"--out={scores}.2"]) == 2
    assert "official" in capsys.readouterr().err


def test_a_converted_checkpoint_scores_and_selects_as_their_program_did(shared_dir: Path, tmp_path: Path) -> None:
    import torch

    case = "opt_trained_b8"
    steps = json.loads((shared_dir / "golden" / case / "test_step.json").read_text())
    step = next(step for step in steps if len(step["selected"]) == 8)
    arrays = golden_arrays(shared_dir, case, "params_test.npz")
    states, config = as_saved(arrays, torch.float32), golden_config(shared_dir, case)
    folder = write_checkpoint(tmp_path / "theirs", states, config)
    out, data, scores = tmp_path / "run", tmp_path / "talk.jsonl", tmp_path / "scores.jsonl"
    assert convert(folder, shared_dir, out) == 0
    # Their batch takes turns from here and there; with its history inside the query, each is a dialogue of one turn.
    batch = step["batch"]
    lines = [
        {"persona": persona, "turns": [{"query": " ".join(context).removeprefix("Q: "), "response": target}]}
        for persona, context, target in zip(batch["persona_list"], batch["context_input"], batch["target"], strict=True)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["score", f"--workdir={out}", f"--data={data}", "--batch=8", f"--out={scores}"]) == 0
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [line["selected"] for line in lines] == step["selected"]
    expected = np.asarray(step["sim_scores_bk"])
    assert np.abs(np.asarray([line["scores"] for line in lines]) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that any number of turns is a batch."""
    monkeypatch.setattr(experiment, "make_mesh", lambda **_: make_mesh(1, devices=jax.devices()[:1]))


PERSONAS = ("i bake bread .", "i have two cats and a dog that sleeps all day .", "i sail .")
TALK = (("hi !", "hello ."), ("who are you ?", "i am a baker , up at four every morning ."), ("wow", "yes ."))


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dialogues of 3, 2 and 2 turns."""
    lines: list[str] = []
    for persona, turns in zip(PERSONAS, (TALK, TALK[1:], TALK[:2]), strict=True):
        lines.append(f"1 your persona: {persona}")
        lines += [f"{number} {query}\t{response}" for number, (query, response) in enumerate(turns, start=2)]
    path = tmp_path_factory.mktemp("talk") / "talk.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def objects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(run: Path, data: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    assert main(["score", f"--workdir={run}", f"--data={data}", f"--out={out}", *more]) == 0
    return objects(out)


def scores_of(lines: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray([line["scores"] for line in lines])


def scores_beside(run: Any, data: Path, neighbours: int) -> np.ndarray:
    """Scores of every turn of a file, so many turns in file order read at once."""
    dialogues = read_dialogues(str(data)).dialogues
    contexts = [
        run.encode_context(dialogue.persona, turn_history(dialogue, turn))
        for dialogue in dialogues
        for turn in range(len(dialogue.turns))
    ]
    groups = [contexts[start : start + neighbours] for start in range(0, len(contexts), neighbours)]
    return np.concatenate([run.score_contexts(group) for group in groups])


@pytest.mark.usefixtures("one_device")
def test_batch_says_how_many_neighbours_a_turn_is_scored_beside(converted: Path, talk: Path, tmp_path: Path) -> None:
    run = open_run(str(converted))
    beside_three = scores_beside(run, talk, 3)
    found = scores_of(scored(converted, talk, tmp_path / "scores.jsonl", "--batch=3"))
    np.testing.assert_allclose(found, beside_three, rtol=1e-5)
    for others in (2, run.config.evaluation.batch):
        assert others != 3
        assert np.abs(beside_three - scores_beside(run, talk, others)).max() > 1e-3 * np.abs(beside_three).max()


@pytest.mark.usefixtures("one_device")
def test_evaluation_scores_as_score_does_with_the_same_neighbours(converted: Path, talk: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(converted, run)
    asked = [f"--workdir={run}", f"--data={talk}", "--batch=3", "--nobaselines"]
    assert main(["evaluate", *asked]) == 0
    predictions = objects(run / "predictions.jsonl")
    lines = scored(run, talk, tmp_path / "scores.jsonl", "--batch=3")
    assert [(p["dialogue"], p["turn"]) for p in predictions] == [(line["dialogue"], line["turn"]) for line in lines]
    np.testing.assert_allclose(scores_of(predictions), scores_of(lines), rtol=1e-6)
    assert [p["selected"] for p in predictions] == [line["selected"] for line in lines]


@pytest.mark.parametrize("pad", ["eos", "bos"])
def test_where_the_tokenizer_names_no_padding_every_door_averages_the_one_of_the_option(
    converted: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pad: str
) -> None:
    """With all seven turns at once, behind padding that is not the tokenizer's."""
    run = tmp_path / "run"
    shutil.copytree(converted, run)
    opened = open_run(str(run))
    tokenizer = opened.lm.tokenizer
    # OPT's bos and eos are one token; here the bos is another, of no meaning.
    nameless = dataclasses.replace(tokenizer, own_pad_id=None, bos_id=7)
    record = json.loads((run / "config.json").read_text())
    record["config"]["data"]["official_pad"] = pad
    (run / "config.json").write_text(json.dumps(record))
    opens = experiment.open_lm
    monkeypatch.setattr(
        experiment, "open_lm", lambda *args, **more: dataclasses.replace(opens(*args, **more), tokenizer=nameless)
    )
    monkeypatch.setattr(restored, "check_lm", lambda *args: None)
    reopened = open_run(str(run))
    assert reopened.lm.tokenizer.pad_id not in (nameless.bos_id, nameless.eos_id)
    other = "bos" if pad == "eos" else "eos"
    expected = scores_beside(reopened, talk, 8)
    named = dataclasses.replace(nameless, own_pad_id={"eos": nameless.eos_id, "bos": nameless.bos_id}[pad])
    lm = dataclasses.replace(reopened.lm, tokenizer=named)
    as_named = dataclasses.replace(reopened, experiment=dataclasses.replace(reopened.experiment, lm=lm))
    np.testing.assert_array_equal(scores_beside(as_named, talk, 8), expected)
    reopened.config.data.official_pad = other
    assert np.abs(scores_beside(reopened, talk, 8) - expected).max() > 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(scores_of(scored(run, talk, tmp_path / "s.jsonl", "--batch=8")), expected, rtol=1e-5)
    asked = [f"--workdir={run}", f"--data={talk}", "--batch=8", "--nobaselines", "--replies=1"]
    assert main(["evaluate", *asked]) == 0
    first = objects(run / "predictions.jsonl")[:1]
    np.testing.assert_allclose(scores_of(first), expected[:1], rtol=1e-5)


SAID = "i get up at 5:30 R: and you"


def test_every_door_cuts_a_reply_of_a_converted_run_at_its_first_colon(
    converted: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(converted, run)
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: SAID)
    assert main(["evaluate", f"--workdir={run}", f"--data={talk}", "--replies=2", "--nobaselines"]) == 0
    assert {p["prediction"] for p in objects(run / "predictions.jsonl")} == {"i get up at 5"}
    samples = json.loads((run / "results.json").read_text())["samples"]
    assert {reply for sample in samples for reply in sample["replies"]} == {"i get up at 5"}
    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text(json.dumps({"persona": ["i bake ."], "history": ["hi"]}) + "\n")
    assert main(["generate", f"--workdir={run}", f"--input={asked}", f"--out={answers}", "--max_new_tokens=2"]) == 0
    assert [answer["reply"] for answer in objects(answers)] == ["i get up at 5"]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/exit\n"))
    assert main(["chat", f"--workdir={run}", "--persona=i bake .", "--max_new_tokens=2"]) == 0
    said = capsys.readouterr().out
    assert "i get up at 5" in said and ":30" not in said


def test_an_empty_folder_is_taken_and_the_notes_are_told(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = golden_config(shared_dir, BASE)
    config["training"]["contrastive_threshold"] = 20
    config["training"]["colour"] = "blue"
    import torch

    folder = write_checkpoint(tmp_path / "a", as_saved(golden_arrays(shared_dir, BASE), torch.float32), config)
    (tmp_path / "run").mkdir()
    assert convert(folder, shared_dir, tmp_path / "run") == 0
    said = capsys.readouterr()
    assert "4 soft prompts of 8 tokens" in said.out and "spt-jax evaluate --workdir=" in said.out
    notes = [line.removeprefix("note: ") for line in said.err.splitlines() if line.startswith("note: ")]
    assert any(re.fullmatch(r"training.contrastive_threshold is 20, which .* used 0.0", note) for note in notes)
    assert "training.colour is ignored ('blue')" in notes
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["objective"]["bleu_threshold"] == 0.0
    assert record["config"]["optimizer"]["learning_rate"] == 1e-4 and record["config"]["data"]["batch"] == 4
