from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.generation.processors import (
    MinNewTokens,
    NoRepeatNgram,
    PresencePenalty,
    Processor,
    RepetitionPenalty,
)

ROWS, VOCABULARY, ROOM = 40, 7, 12
EOS = (2, 5)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)


@pytest.fixture(scope="module")
def history() -> np.ndarray:
    """Few different tokens, so that n-grams repeat."""
    return np.random.default_rng(1).integers(0, VOCABULARY - 2, (ROWS, ROOM)).astype(np.int32)


def run(processor: Processor, logits: np.ndarray, history: np.ndarray, count: int) -> np.ndarray:
    return np.asarray(processor.process(jnp.asarray(logits), jnp.asarray(history), jnp.int32(count)))


CASES: dict[str, tuple[Processor, str, tuple[Any, ...]]] = {
    "repetition 1.4": (RepetitionPenalty(1.4), "RepetitionPenaltyLogitsProcessor", (1.4,)),
    "repetition 0.5": (RepetitionPenalty(0.5), "RepetitionPenaltyLogitsProcessor", (0.5,)),
    **{f"{n}-gram": (NoRepeatNgram(n), "NoRepeatNGramLogitsProcessor", (n,)) for n in (1, 2, 3, 4, 13, 20)},
    "at least 4": (MinNewTokens(4, EOS), "MinNewTokensLengthLogitsProcessor", (0, 4, list(EOS))),
}


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_a_processor_does_what_transformers_processor_of_that_name_does(case, logits, history):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    processor, name, arguments = CASES[case]
    theirs = getattr(logits_process, name)(*arguments)
    changed = 0
    for count in range(ROOM + 1):
        expected = theirs(torch.tensor(history[:, :count], dtype=torch.long), torch.tensor(logits)).numpy()
        found = run(processor, logits, history, count)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"after {count} tokens")
        changed += int((expected != logits).any())
    assert changed or case in ("13-gram", "20-gram"), "nothing was compared"


def test_a_presence_penalty_is_taken_once_from_what_was_generated(logits, history):
    found = run(PresencePenalty(0.7), logits, history, 5)
    for row in range(ROWS):
        seen = np.isin(np.arange(VOCABULARY), history[row, :5])
        np.testing.assert_allclose(found[row], logits[row] - 0.7 * seen, atol=1e-6)


@pytest.mark.parametrize("case", [*CASES, "presence"])
def test_what_lies_behind_the_count_and_in_other_rows_has_no_say(case, logits, history):
    processor = CASES[case][0] if case in CASES else PresencePenalty(0.5)
    for count in (0, 1, 5, 11):
        expected = run(processor, logits, history, count)
        other = history.copy()
        other[:, count:] = (other[:, count:] + 1) % VOCABULARY
        np.testing.assert_array_equal(run(processor, logits, other, count), expected)
        np.testing.assert_array_equal(run(processor, logits[3:4], history[3:4], count)[0], expected[3])
