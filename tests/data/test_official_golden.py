"""The authors' rows equal, to the last token, the arrays that their program made of the same file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_jax.data import Dialogue, DialogueSet, Row, Turn
from spt_jax.data.official import official_prompt, official_rows
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder

pytestmark = pytest.mark.first_python

CASES = (
    "llama436_gqa_b4_k4_v1",
    "llama_b2_k4_v1",
    "opt_b2_only_longest",
    "opt_b4_annealing",
    "opt_b4_k2_v1_prompt",
    "opt_b4_no_contrastive",
    "opt_b4_no_ensemble",
    "opt_b4_relu",
    "opt_b4_retriever_extra_lm",
    "opt_b4_selective_off",
    "opt_b4_tau",
    "opt_base_b2_k4_v8_both",
    "opt_trained_b8",
)


class GoldenCase:
    """One folder of reference numbers, with the tokenizer and the options it was made with."""

    def __init__(self, shared: Path, name: str) -> None:
        self.folder = shared / "golden" / name
        if not self.folder.is_dir():
            pytest.skip("the folder ../shared/golden with the authors' numbers is not on this machine")
        config = json.loads((self.folder / "manifest.json").read_text())["config"]
        self.tokenizer = tokenizer_of_folder(shared / "golden" / "models" / config["model"]["model_name"])
        self.max_length: int = config["dataset"]["max_token_length"]
        self.max_turns: int = max(0, config["dataset"]["max_context_turns"])
        self.last_turn_only: bool = config["training"]["only_longest"]
        self.arrays: Any = np.load(self.folder / "inputs.npz")
        self.batches: list[dict[str, Any]] = json.loads((self.folder / "batches.json").read_text())
        self.tests: list[dict[str, Any]] = json.loads((self.folder / "test_step.json").read_text())


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, shared_dir: Path) -> GoldenCase:
    return GoldenCase(shared_dir, request.param)


def prompt_of(row: Row) -> np.ndarray:
    assert row.inference_prompt is not None
    return row.inference_prompt


def padded(rows: Sequence[np.ndarray], pad_id: int, length: int, left: bool = False) -> np.ndarray:
    """[rows, length], the padding on one side."""
    filled = np.full((len(rows), length), pad_id)
    for target, row in zip(filled, rows, strict=True):
        target[length - len(row) if left else 0 :][: len(row)] = row
    return filled


def labels_of(row: Row, pad_id: int) -> np.ndarray:
    """The authors' `lm_target` of an unpadded row."""
    labels = np.full(len(row), pad_id)
    labels[row.target_positions] = row.target_ids
    return labels


def test_rows_of_the_file_equal_the_authors_batches(case: GoldenCase, valid_set: DialogueSet) -> None:
    options: Any = {"max_turns": case.max_turns, "last_turn_only": case.last_turn_only}
    last = max(index for batch in case.batches for index in batch["dataset_idx"])
    dialogues = valid_set.dialogues[: last + 2 if case.last_turn_only else 1 + last // 3]
    rows = official_rows(dialogues, case.tokenizer, max_length=case.max_length, **options)
    uncut = official_rows(dialogues, case.tokenizer, max_length=10_000, **options)
    pad = case.tokenizer.pad_id
    for step, batch in enumerate(case.batches):
        mine = [rows[index] for index in batch["dataset_idx"]]
        expected = {name[3:]: array for name, array in case.arrays.items() if name.startswith(f"s{step}_")}
        assert (padded([row.tokens for row in mine], pad, case.max_length) == expected["input_ids"]).all()
        assert [len(row) for row in mine] == expected["attention_mask"].sum(1).tolist()
        labels = [labels_of(row, pad) for row in mine]
        assert (padded(labels, pad, case.max_length) == expected["lm_target"]).all()
        # The reference cut these prompts with the trainer's settings, on the right; no step of the program ever does:
        # prompts are only made by its test, in another process, which cuts on the left. So the cut is made here.
        prompts = [prompt_of(uncut[index])[: case.max_length] for index in batch["dataset_idx"]]
        width = expected["inference_ids_traintrunc"].shape[1]
        assert max(map(len, prompts)) == width
        assert (padded(prompts, pad, width, left=True) == expected["inference_ids_traintrunc"]).all()
        masks = [np.ones(len(prompt), dtype=int) for prompt in prompts]
        assert (padded(masks, 0, width, left=True) == expected["inference_mask_traintrunc"]).all()


def dialogue_of(persona: Sequence[str], context: Sequence[str], target: str) -> Dialogue:
    said = [*(line.removeprefix("Q: ").removeprefix("R: ") for line in context), target]
    return Dialogue(tuple(persona), tuple(Turn(q, r) for q, r in zip(said[::2], said[1::2], strict=True)))


def test_prompts_equal_the_authors_test_step(case: GoldenCase) -> None:
    for entry in case.tests:
        batch = entry["batch"]
        told = list(zip(batch["persona_list"], batch["context_input"], batch["target"], strict=True))
        dialogues = [dialogue_of(*each) for each in told]
        rows = official_rows(dialogues, case.tokenizer, max_length=case.max_length)
        prompts = [prompt_of([row for row in rows if row.dialogue == d][-1]) for d in range(len(dialogues))]
        width = len(entry["inference_ids"][0])
        assert max(map(len, prompts)) == width
        assert padded(prompts, case.tokenizer.pad_id, width, left=True).tolist() == entry["inference_ids"]
        assert [len(prompt) for prompt in prompts] == [sum(mask) for mask in entry["inference_mask"]]
        for (persona, context, _), prompt in zip(told, prompts, strict=True):
            history = [line[3:] for line in context]
            again = official_prompt(persona, history, case.tokenizer, max_length=case.max_length)
            np.testing.assert_array_equal(again, prompt)
