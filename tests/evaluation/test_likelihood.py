"""Likelihoods of turns, against a row of one turn behind one prompt at a time, and the figures made of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.evaluation.likelihood import DevelopmentEvaluator, Likelihoods, score_rows
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.parallel.mesh import make_mesh

LAYOUTS = {"one": (1, 1, 1), "rows": (8, 1, 1), "mixed": (2, 2, 2)}


def mesh_of(name: str):
    sizes = LAYOUTS[name]
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def scored(layout: str = "dialogue", mesh: str = "one", **options) -> Likelihoods:
    options = {"batch_size": 4, "pad_id": 0, "max_buckets": 1} | options
    rows = options.pop("rows", tiny.packed(layout).rows)
    return score_rows(tiny.MODEL, tiny.params(), tiny.trainable(), rows, mesh=mesh_of(mesh), **options)


def likelihoods(nll, scores, tokens) -> Likelihoods:
    count = len(tokens)
    return Likelihoods(
        np.zeros(count, int), np.arange(count), np.array(tokens), np.float32(nll).reshape(count, -1), np.float32(scores)
    )


def assert_same(a: Likelihoods, b: Likelihoods) -> None:
    assert (a.dialogue.tolist(), a.turn.tolist(), a.tokens.tolist()) == (
        *(b.dialogue.tolist(), b.turn.tolist(), b.tokens.tolist()),
    )
    assert tiny.relative_difference((a.nll, a.scores), (b.nll, b.scores)) <= 1e-5


def test_turns_come_in_the_order_of_the_dialogues_with_their_targets():
    found = scored(max_buckets=3, batch_size=2)
    turns = [(d, t) for d, dialogue in enumerate(tiny.DIALOGUES) for t in range(len(dialogue.turns))]
    assert list(zip(found.dialogue, found.turn, strict=True)) == turns
    assert found.tokens.tolist() == [len(f" {tiny.DIALOGUES[d].turns[t].response}") + 1 for d, t in turns]


@jax.jit
def _log_probabilities(prompt, tokens, length):
    """Of one row behind one prompt, by the plain functions of the decoder."""
    frozen = tiny.params()
    inputs = jnp.concatenate([prompt, embed(tiny.CONFIG, frozen, tokens)])[None]
    places = jnp.arange(inputs.shape[1])[None]
    hidden, _ = decode(tiny.CONFIG, frozen, inputs, places, places < len(prompt) + length)
    return jax.nn.log_softmax(vocabulary_logits(tiny.CONFIG, frozen, hidden[0, len(prompt) :]))


def test_nll_is_that_of_one_turn_behind_one_prompt_computed_alone():
    found, prompts = scored(), tiny.trainable()["bank"]["prompts"]
    rows = {(row.dialogue, int(row.turns[0])): row for row in tiny.packed("turn").rows}
    for u in range(len(found.tokens)):
        row = rows[int(found.dialogue[u]), int(found.turn[u])]
        for k, prompt in enumerate(prompts):
            log_probabilities = _log_probabilities(prompt, np.pad(row.tokens, (0, 224 - len(row))), len(row))
            nll = -log_probabilities[row.target_positions, row.target_ids].mean()
            assert found.nll[u, k] == pytest.approx(float(nll), rel=1e-5)


def test_layouts_give_the_same():
    assert_same(scored("turn"), scored("dialogue"))


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64}, {"max_buckets": 4}, {"pad_id": 77}])
def test_batches_buckets_and_padding_change_nothing(options):
    assert_same(scored(**options), scored())


@pytest.mark.parametrize("mesh", ["rows", "mixed"])
def test_devices_change_nothing(mesh):
    assert_same(scored(mesh=mesh), scored())


def test_every_batch_is_told_once_with_its_turns():
    told: list[Likelihoods] = []
    found = scored(batch_size=2, on_batch=lambda part, known: told.append(part))
    assert len(told) == 2
    joined = Likelihoods.joined(told)
    assert_same(joined.at(np.lexsort((joined.turn, joined.dialogue))), found)


def test_batches_that_are_known_are_taken_as_they_are_and_the_others_are_scored():
    parts: list[Likelihoods] = []
    whole = scored(batch_size=2, on_batch=lambda part, known: parts.append(part))
    marked = dataclasses.replace(parts[0], nll=parts[0].nll + 7)
    # Of the second batch a turn is missing, so that it is scored.
    known = Likelihoods.joined([parts[1].at(range(1, len(parts[1]))), marked])
    told: list[bool] = []
    found = scored(batch_size=2, known=known, on_batch=lambda part, known: told.append(known))
    assert told == [True, False]
    first = np.isin(found.dialogue, parts[0].dialogue)
    np.testing.assert_array_equal(found.nll, np.where(first[:, None], whole.nll + 7, whole.nll))
    assert_same(dataclasses.replace(found, nll=whole.nll), whole)


def test_perplexities_by_hand():
    found = likelihoods(
        nll=[[1.0, 2.0], [4.0, 0.5], [3.0, 3.0]], scores=[[0.9, 0.1], [0.8, 0.2], [0.3, 0.3]], tokens=[2, 4, 1]
    )
    assert found.selected.tolist() == [0, 0, 0]  # the lowest among equals
    assert found.selected_nll.tolist() == [1.0, 4.0, 3.0]
    assert found.perplexity == pytest.approx(np.exp((2 * 1.0 + 4 * 4.0 + 3.0) / 7))
    assert found.oracle_perplexity == pytest.approx(np.exp((2 * 1.0 + 4 * 0.5 + 3.0) / 7))
    assert found.usage.tolist() == [1.0, 0.0]
    assert found.perplexity_per_word([3, 2, 2]) == pytest.approx(np.exp((2 * 1.0 + 4 * 4.0 + 3.0) / 7))
    assert found.perplexity_per_word([3, 2, 5]) == pytest.approx(np.exp(21 / 10))


def test_the_oracle_is_never_worse_and_with_one_prompt_the_same():
    found = scored()
    assert found.oracle_perplexity <= found.perplexity
    one = likelihoods(nll=[1.0, 2.0], scores=[[0.5], [0.1]], tokens=[1, 3])
    assert one.oracle_perplexity == one.perplexity
    assert one.usage.tolist() == [1.0]


def test_the_development_evaluator_tells_the_figures_of_its_rows():
    rows = tiny.packed("dialogue").rows[:3]
    evaluator = DevelopmentEvaluator(
        tiny.MODEL, tiny.params(), rows, mesh=mesh_of("one"), batch_size=4, pad_id=0, max_buckets=1
    )
    figures = dict(evaluator.run(SimpleNamespace(trainable=tiny.trainable())))
    found = scored(rows=rows)
    assert figures["development/perplexity"] == pytest.approx(found.perplexity)
    assert figures["development/oracle_perplexity"] == pytest.approx(found.oracle_perplexity)
    assert [figures[f"development/usage/{k}"] for k in range(3)] == found.usage.tolist()
    assert len(figures) == 5


def test_an_evaluation_may_be_left_between_its_batches_and_only_there():
    rows, asked = tiny.packed("dialogue").rows[:3], []
    whole = scored(rows=rows)
    assert scored(rows=rows, batch_size=1, between=lambda: asked.append(1)).perplexity == pytest.approx(
        whole.perplexity
    )
    assert len(asked) == len(rows) - 1

    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(rows=rows, batch_size=1, between=leave)
    assert scored(rows=rows, batch_size=3, between=leave).perplexity == pytest.approx(whole.perplexity)
