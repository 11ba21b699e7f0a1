"""The authors' checkpoints become runs here: the same numbers, and the doors work on them."""

from __future__ import annotations

import json
import re
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

from spt_jax.commands.main import main
from spt_jax.commands.restored import open_run
from spt_jax.interop.official import find_model_states, read_official_tensors
from spt_jax.interop.official_config import read_official_run
from spt_jax.interop.official_tree import official_trainable
from spt_jax.prompting.encoder import to_torch

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
