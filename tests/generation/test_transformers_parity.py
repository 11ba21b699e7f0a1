"""The same ids as transformers' ``generate`` with input embeddings, on random models of three families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from references import FAMILIES, LENGTHS, ROWS, Reference, make_reference

from spt_jax.generation.decoding import Decoding
from spt_jax.generation.engine import Continued, GenerationEngine

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    # It says that history is what was generated, as it is here.
    pytest.mark.filterwarnings("ignore:Passing `:UserWarning"),
]

NEW, MARGIN = 12, 1e-4
Stopped = Callable[[Sequence[int]], bool]
EOS = [5, 11, 50, 99, 200, 201]
MANY_EOS = [*EOS, *range(210, 250)]
"""So many hypotheses end that it matters when a search does."""


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, tmp_path_factory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Reference:
    return make_reference("Llama", tmp_path_factory.mktemp("llama"))


def ours(
    reference: Reference,
    decoding: Decoding,
    rows: int | None = None,
    eos: Sequence[int] = EOS,
    stopped: Stopped | None = None,
) -> list[list[Continued]]:
    lm = reference.lm
    engine = GenerationEngine(lm.config, lm.params, eos_ids=eos, pad_id=0, max_batch=16)
    bank = jnp.asarray(reference.bank)
    return engine.continuations(
        bank,
        reference.contexts[:rows],
        reference.selected[:rows],
        max_new_tokens=NEW,
        decoding=decoding,
        stopped=stopped,
    )


def until_end(ids: list[int], eos: Sequence[int] = EOS, stopped: Stopped | None = None) -> list[int]:
    ids = ids[: next((place for place, token in enumerate(ids) if token in eos), len(ids))]
    return ids[: next((end for end in range(1, len(ids)) if stopped and stopped(ids[:end])), len(ids))]


def _criterion(stopped: Stopped) -> Any:
    """A stopping criterion as transformers calls them: of new tokens, where the context comes as embeddings."""
    import torch

    return lambda ids, scores, **_: torch.tensor([stopped(row) for row in ids.tolist()])


@dataclasses.dataclass
class Comparison:
    """How many rows were the same, and how many could have gone either way."""

    same: int = 0
    near_ties: int = 0
    ended: int = 0
    stopped: int = 0
    different: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, found: list[int], expected: list[int], margin: float) -> None:
        self.ended += len(expected) < NEW
        if margin < MARGIN:
            self.near_ties += 1
        elif found == expected:
            self.same += 1
        else:
            self.different.append(f"{name}: {found} instead of {expected}, margin {margin:.1e}")

    def check(self, rows: int) -> None:
        told = f"{self.same} rows identical, {self.near_ties} with margins below {MARGIN}, {len(self.different)} differ"
        print(f"\n{told}; {self.ended} ended by themselves")
        assert not self.different, f"{told}: {self.different[:3]}"
        assert self.same >= rows, told
        assert self.ended, "some row should end by itself"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 5},
    ],
    ids=["plain", "processors"],
)
def test_greedy_rows_equal_transformers(reference, options):
    found, compared = ours(reference, Decoding(**options)), Comparison()
    theirs = dict(options)
    if "no_repeat_ngram" in theirs:
        theirs["no_repeat_ngram_size"] = theirs.pop("no_repeat_ngram")
    for rows in reference.groups():
        output = reference.generate(
            rows, max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, output_scores=True, **theirs
        )
        best = np.stack([scores.numpy() for scores in output.scores])  # behind the processors
        best = np.sort(best, axis=-1)[..., -2:]
        for place, row in enumerate(rows):
            expected = until_end(output.sequences[place].tolist())
            steps = min(len(expected) + 1, len(best))
            margin = float((best[:steps, place, 1] - best[:steps, place, 0]).min())
            compared.add(f"row {row}", found[row][0].tokens, expected, margin)
    compared.check(len(LENGTHS) * ROWS - 6)


def compare_beams(
    reference: Reference,
    options: dict[str, Any],
    rows: int | None = None,
    eos: Sequence[int] = EOS,
    stopped: Stopped | None = None,
) -> Comparison:
    """All `samples` hypotheses of every row and their scores against transformers'."""
    decoding = Decoding(**options)
    found, compared = ours(reference, decoding, rows, eos, stopped), Comparison()
    for group in reference.groups():
        group = [row for row in group if row < len(found)]
        if not group:
            continue
        output = reference.generate(
            group,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=list(eos),
            num_beams=decoding.beams,
            num_return_sequences=decoding.samples,
            no_repeat_ngram_size=decoding.no_repeat_ngram,
            repetition_penalty=decoding.repetition_penalty,
            min_new_tokens=decoding.min_new_tokens,
            length_penalty=decoding.length_penalty,
            early_stopping={"true": True, "false": False}.get(str(decoding.early_stopping), "never"),
            stopping_criteria=None if stopped is None else [_criterion(stopped)],
            output_scores=True,
        )
        sequences = output.sequences.reshape(len(group), decoding.samples, -1)
        scores = output.sequences_scores.reshape(len(group), decoding.samples).numpy()
        for place, row in enumerate(group):
            # What could go either way: the order of two hypotheses of one score.
            margin = float(-np.diff(scores[place]).max()) if decoding.samples > 1 else float("inf")
            for rank, hypothesis in enumerate(found[row][: decoding.samples - 1 or 1]):
                expected = until_end(sequences[place, rank].tolist(), eos, stopped)
                compared.add(f"row {row}, rank {rank}", hypothesis.tokens, expected, margin)
                compared.stopped += third_low(expected) and not third_low(expected[:-1])
                if hypothesis.tokens == expected:
                    assert hypothesis.score == pytest.approx(scores[place, rank], rel=1e-6, abs=2e-5)
    return compared


def third_low(ids: Sequence[int]) -> bool:
    """What ends a hypothesis in the test below, as a stop string of several tokens would."""
    return sum(token < 80 for token in ids) >= 3


@pytest.mark.parametrize(
    "options", [{"beams": 4, "samples": 4, "length_penalty": -0.5}, {"beams": 3, "early_stopping": True, "samples": 3}]
)
def test_hypotheses_that_a_text_ends_are_those_that_a_stopping_criterion_ends_in_transformers(llama, options):
    compared = compare_beams(llama, options, rows=40, stopped=third_low)
    compared.check(30)
    assert compared.stopped >= 10  # of some hundred, or the comparison would say nothing
    unwatched = compare_beams(llama, options, rows=40)
    assert unwatched.stopped < compared.stopped


def test_the_papers_beam_search_equals_transformers(reference):
    compared = compare_beams(reference, {"beams": 10, "no_repeat_ngram": 4, "samples": 2})
    compared.check(len(LENGTHS) * ROWS - 6)


@pytest.mark.parametrize(
    "options",
    [
        {"beams": 3, "early_stopping": True, "samples": 3},
        {"beams": 3, "early_stopping": "never", "samples": 3, "length_penalty": 2.0},
        {"beams": 4, "early_stopping": "never", "length_penalty": 0.0, "samples": 4},
        {"beams": 4, "length_penalty": -1.0, "samples": 4},
        {"beams": 5, "min_new_tokens": 6, "repetition_penalty": 1.4, "no_repeat_ngram": 1, "samples": 2},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_option_of_beam_search_means_what_it_means_in_transformers(llama, options):
    compared = compare_beams(llama, options, rows=40, eos=MANY_EOS)
    compared.check(30)
