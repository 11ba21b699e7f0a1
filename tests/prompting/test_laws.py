"""The laws of the method in float32: layouts, micro-batches, padding, and plain prompt tuning as a special case."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.prompting.adapters import Prefixes, SoftPrompts
from spt_jax.prompting.losses import selection_loss, selection_target
from spt_jax.prompting.objective import Losses, Objective, losses_and_gradients
from spt_jax.prompting.retriever import RetrieverConfig
from spt_jax.prompting.selective_lm import (
    SelectiveLM,
    batch_contexts,
    join,
    retriever_scores,
    score_turns,
    without_prompt,
)

OBJECTIVE = Objective(selection_weight=0.7, contrastive_weight=0.4, fusion_weight=0.9, gold_temperature=0.8)
TERMS = ("total", "lm", "selection", "contrastive", "fusion", "usage", "selection_entropy", "selected_nll")


def _run(batch, objective=OBJECTIVE, model=tiny.MODEL, micro_batches=1):
    return tiny.STEP(model, objective, tiny.params(), tiny.trainable(model), batch, micro_batches)


def _terms(losses: Losses):
    return {name: getattr(losses, name) for name in TERMS}


def _by_turn(losses: Losses, batch):
    """nll and scores keyed by (dialogue, turn)."""
    found = {}
    for d, n in np.argwhere(np.asarray(batch["turn_mask"]) > 0):
        key = (int(batch["dialogue_ids"][d]), int(batch["turn_ids"][d, n]))
        found[key] = np.stack([losses.nll[d, n], losses.scores[d, n]])
    return found


def _assert_same(a, b, tolerance):
    (losses_a, gradients_a), (losses_b, gradients_b) = a, b
    difference = tiny.relative_difference((_terms(losses_a), gradients_a), (_terms(losses_b), gradients_b))
    assert difference <= tolerance


@pytest.mark.parametrize("pairs", ["across", "all"])
def test_dialogue_layout_equals_turn_layout(pairs):
    objective = dataclasses.replace(OBJECTIVE, pairs=pairs)
    packed, turns = tiny.packed("dialogue").batch(), tiny.packed("turn").batch()
    assert packed["tokens"].shape[0] == 4
    assert turns["tokens"].shape[0] == 10
    a, b = _run(packed, objective), _run(turns, objective)
    _assert_same(a, b, 1e-5)
    by_turn_a, by_turn_b = _by_turn(a[0], packed), _by_turn(b[0], turns)
    assert len(by_turn_a) == 10
    assert tiny.relative_difference(by_turn_a, by_turn_b) <= 1e-5


def test_a_nan_anywhere_is_no_small_difference():
    whole = {"a": np.ones(3), "b": np.ones(2), "c": np.ones(())}
    assert tiny.relative_difference(whole, whole) == 0.0
    for name in whole:
        for one, other in (
            (whole | {name: whole[name] * np.nan}, whole),
            (whole, whole | {name: whole[name] * np.nan}),
        ):
            assert not tiny.relative_difference(one, other) <= 1e9


def test_the_batch_of_the_laws_has_every_kind_of_pair_and_several_choices():
    batch = tiny.packed("dialogue").batch()
    losses, gradients = _run(batch)
    present = np.asarray(batch["turn_mask"]).reshape(-1) > 0
    similar = np.asarray(batch["similar"])[np.ix_(present, present)]
    assert similar.any()
    assert not similar.all()
    for name in ("lm", "selection", "contrastive", "fusion"):
        assert float(getattr(losses, name)) > 1e-4, name
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_one_batch_equals_its_micro_batches(micro_batches):
    batch = tiny.packed("dialogue").batch()
    _assert_same(_run(batch, micro_batches=micro_batches), _run(batch), 1e-5)


def test_padding_rows_and_longer_buckets_change_nothing():
    packed = tiny.packed("dialogue")
    _assert_same(_run(packed.batch(rows=7, length=250)), _run(packed.batch()), 1e-5)


def test_chunks_of_the_vocabulary_projection_change_nothing():
    batch = tiny.packed("dialogue").batch()
    whole = dataclasses.replace(tiny.MODEL, max_logit_rows=10**6)
    single = dataclasses.replace(tiny.MODEL, max_logit_rows=1)
    _assert_same(_run(batch, model=single), _run(batch, model=whole), 1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(remat):
    batch = tiny.packed("dialogue").batch()
    config = dataclasses.replace(tiny.CONFIG, remat=remat)
    _assert_same(_run(batch, model=dataclasses.replace(tiny.MODEL, decoder=config)), _run(batch), 1e-5)


def test_gradients_equal_central_differences_of_the_total():
    batch = tiny.packed("dialogue").batch()
    # The selection target carries no gradient, so the difference quotient is taken with that term switched off.
    objective = dataclasses.replace(OBJECTIVE, selection_weight=0.0)
    _, gradients = _run(batch, objective)
    start = tiny.trainable()
    direction = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape), jnp.float32), start
    )
    total = jax.jit(lambda tree: losses_and_gradients(tiny.MODEL, objective, tiny.params(), tree, batch)[0].total)
    step = 1e-2
    ahead = total(jax.tree.map(lambda x, d: x + step * d, start, direction))
    behind = total(jax.tree.map(lambda x, d: x - step * d, start, direction))
    slope = sum(
        float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
    )
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_with_only_the_selection_loss_the_bank_learns_through_its_side_of_the_cosine_alone():
    """The selection target carries no gradient: what the LM says moves the target, not the bank."""
    batch = tiny.packed("dialogue").batch()
    only = Objective(selection_weight=1.0, contrastive_weight=0.0, fusion_weight=0.0)
    without = dataclasses.replace(only, selection_weight=0.0)
    _, with_selection = _run(batch, only)
    _, lm_alone = _run(batch, without)
    losses, _ = _run(batch, only)

    def through_scores(tree):
        scores = retriever_scores(tiny.MODEL, tree, batch_contexts(tiny.MODEL, tiny.params(), batch))
        weights = batch["turn_mask"] / batch["turn_mask"].sum()
        return selection_loss(selection_target(losses.nll, 1.0), scores, weights, 1.0)

    expected = jax.jit(jax.grad(through_scores))(tiny.trainable())
    difference = jax.tree.map(lambda a, b: a - b, with_selection, lm_alone)
    assert tiny.relative_difference(difference["retriever"], expected["retriever"]) <= 1e-5
    assert tiny.relative_difference(difference["bank"], expected["bank"]) <= 1e-3  # a small difference of large numbers


def test_one_prompt_without_the_other_losses_is_plain_prompt_tuning():
    model = SelectiveLM(tiny.CONFIG, SoftPrompts(1, 4, stddev=0.5), RetrieverConfig())
    objective = Objective(selection_weight=0.0, contrastive_weight=0.0, fusion_weight=0.0)
    turns = tiny.packed("turn")
    losses, gradients = _run(tiny.packed("dialogue").batch(), objective, model)
    frozen, prompt = tiny.params(), tiny.trainable(model)["bank"]["prompts"][0]

    @jax.jit
    @jax.value_and_grad
    def summed_nll(prompt, tokens, positions, ids, counted):
        embeddings = jnp.concatenate([prompt, embed(tiny.CONFIG, frozen, tokens)])[None]
        places = jnp.arange(embeddings.shape[1])[None]
        hidden, _ = decode(tiny.CONFIG, frozen, embeddings, places, jnp.ones_like(places, bool))
        log_probabilities = jax.nn.log_softmax(vocabulary_logits(tiny.CONFIG, frozen, hidden[0, 4:]))
        return -(log_probabilities[positions, ids] * counted).sum()

    value, gradient, count = 0.0, 0.0, 0
    for row in turns.rows:
        size = len(row.target_ids)
        tokens = np.pad(row.tokens, (0, 224 - len(row)))
        targets = (np.pad(x, (0, 64 - size)) for x in (row.target_positions, row.target_ids, np.ones(size, np.float32)))
        row_value, row_gradient = summed_nll(prompt, tokens, *targets)
        value, gradient, count = value + row_value, gradient + row_gradient, count + size
    value, gradient = value / count, gradient / count
    assert float(losses.total) == pytest.approx(float(value), rel=1e-5)
    assert tiny.relative_difference(gradients["bank"]["prompts"][0], gradient) <= 1e-5
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradients["retriever"]))


SCORED = jax.jit(score_turns, static_argnums=0)


def test_scoring_alone_gives_what_training_sees():
    batch = tiny.packed("dialogue").batch()
    losses, _ = _run(batch)
    scored = SCORED(tiny.MODEL, tiny.params(), tiny.trainable(), batch)
    assert tiny.relative_difference((scored.nll, scored.scores), (losses.nll, losses.scores)) <= 1e-6
    assert float(scored.tokens.sum()) == float(batch["target_mask"].sum())


def test_without_a_prompt_the_lm_is_scored_as_it_is():
    batch = tiny.packed("dialogue").batch()
    scored = SCORED(without_prompt(tiny.MODEL), tiny.params(), {}, batch)
    frozen = tiny.params()
    row = tiny.packed("dialogue").rows[3]
    positions = jnp.arange(len(row))[None]
    embeddings = embed(tiny.CONFIG, frozen, jnp.asarray(row.tokens))[None]
    hidden, _ = jax.jit(decode, static_argnums=0)(tiny.CONFIG, frozen, embeddings, positions, positions >= 0)
    logits = jax.nn.log_softmax(vocabulary_logits(tiny.CONFIG, frozen, hidden[0]))
    assert float(scored.nll[3, 0, 0]) == pytest.approx(
        -float(logits[row.target_positions, row.target_ids].mean()), rel=1e-5
    )
    assert np.isfinite(np.asarray(scored.scores)).all()


def test_the_frozen_lm_in_bfloat16_keeps_float32_losses_and_trainables():
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    model = dataclasses.replace(tiny.MODEL, decoder=config)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params())
    batch = tiny.packed("dialogue").batch()
    losses, gradients = tiny.STEP(model, OBJECTIVE, half, tiny.trainable(), batch)
    exact, _ = _run(batch)
    assert {g.dtype for g in jax.tree.leaves((losses, gradients))} == {jnp.dtype("float32")}
    assert float(losses.total) == pytest.approx(float(exact.total), rel=3e-2)


def test_under_bfloat16_the_banks_gradient_is_summed_over_dialogues_in_float32():
    """Rows that cancel in float32 but not in bfloat16: 1 + 256 times 2^-9, of which bfloat16 would lose every one."""
    rows = jnp.concatenate([jnp.ones((1, 1)), jnp.full((256, 1), 2.0**-9)])[:, None]
    text = jnp.zeros((257, 1, 1), jnp.bfloat16)

    def total(prompts):
        return jnp.sum(join(prompts, text)[:, :1].astype(jnp.float32) * rows)

    gradient = jax.grad(total)(jnp.ones((1, 1, 1)))
    assert float(gradient[0, 0, 0]) == 1.5


def test_selection_entropy_is_finite_at_small_temperatures():
    losses, _ = _run(tiny.packed("dialogue").batch(), dataclasses.replace(OBJECTIVE, score_temperature=1e-4))
    assert np.isfinite(float(losses.selection_entropy))


@pytest.mark.parametrize("prompt_length", [4, 5])
def test_rows_in_fused_attention_have_an_even_length_and_the_same_losses(prompt_length, monkeypatch):
    plain = jax.nn.dot_product_attention
    lengths = []

    def in_place_of_cudnn(query, *rest, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(query.shape[1])
        return plain(query, *rest, implementation="xla", **options)

    monkeypatch.setattr("jax.nn.dot_product_attention", in_place_of_cudnn)
    model = dataclasses.replace(tiny.MODEL, adapter=SoftPrompts(3, prompt_length, stddev=0.5))
    fused = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, attention_kernel="cudnn"))
    batch = tiny.packed("dialogue").batch()
    assert batch["tokens"].shape[1] % 2 == 0
    wanted, found = (tiny.STEP(m, OBJECTIVE, tiny.params(), tiny.trainable(model), batch, 1) for m in (model, fused))
    _assert_same(wanted, found, 1e-5)
    assert set(lengths) == {batch["tokens"].shape[1] + prompt_length + prompt_length % 2}


@pytest.mark.parametrize("more", [0, 1])
def test_rows_of_any_length_behind_prefixes_have_the_same_likelihoods_where_attention_could_be_fused(more):
    """A prefix is written into a cache without a slot more than it and its row need."""
    model = dataclasses.replace(tiny.MODEL, adapter=Prefixes(3, 1, 0.5, keys=True))
    fused = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, attention_kernel="cudnn"))
    batch = tiny.packed("dialogue").batch()
    batch = {**batch, "tokens": jnp.pad(batch["tokens"], ((0, 0), (0, more)))}
    score = jax.jit(score_turns, static_argnums=0)
    wanted, found = (score(m, tiny.params(), tiny.trainable(model), batch) for m in (model, fused))
    assert tiny.relative_difference(wanted.nll, found.nll) <= 1e-6
    assert np.abs(np.diff(np.asarray(found.nll)[np.asarray(batch["turn_mask"]) > 0], axis=-1)).max() > 1e-2


def test_a_batch_without_its_pairs_is_refused_where_they_have_a_weight():
    batch = {name: x for name, x in tiny.packed("dialogue").batch().items() if name != "similar"}
    with pytest.raises(ValueError, match=r"no 'similar', of which the contrastive loss is made: give the loader pair_"):
        _run(batch)
    losses, _ = _run(batch, dataclasses.replace(OBJECTIVE, contrastive_weight=0.0))
    assert float(losses.contrastive) == 0.0 and float(losses.total) > 0


def test_what_the_selection_did_is_what_numpy_counts():
    batch = tiny.packed("dialogue").batch()
    objective, tree = dataclasses.replace(OBJECTIVE, score_temperature=0.3), tiny.trainable(seed=4)
    losses, _ = tiny.STEP(tiny.MODEL, objective, tiny.params(), tree, batch, 1)
    arrays = {name: np.asarray(x, np.float64) for name, x in batch.items()}
    present, scores = arrays["turn_mask"] > 0, np.asarray(losses.scores, np.float64)
    best = scores.argmax(axis=-1)
    assert sorted(set(best[present])) == [1, 2]
    shares = [(best[present] == k).mean() for k in range(3)]
    chances = np.exp(scores[present] / 0.3) / np.exp(scores[present] / 0.3).sum(axis=-1, keepdims=True)
    nats = count = 0
    for d, n in np.argwhere(present):
        tokens = arrays["target_mask"][d][arrays["target_turns"][d] == n].sum()
        nats, count = nats + tokens * float(losses.nll[d, n, best[d, n]]), count + tokens
    np.testing.assert_allclose(losses.usage, shares, rtol=1e-6)
    assert float(losses.selection_entropy) == pytest.approx(-(chances * np.log(chances)).sum(-1).mean(), rel=1e-5)
    assert float(losses.selected_nll) == pytest.approx(nats / count, rel=1e-6)


PREFIXED = dataclasses.replace(tiny.MODEL, adapter=Prefixes(3, 2, 0.5, keys=True))


def test_a_bank_of_prefixes_obeys_layouts_and_micro_batches():
    packed = _run(tiny.packed("dialogue").batch(), model=PREFIXED)
    turns = _run(tiny.packed("turn").batch(), model=PREFIXED, micro_batches=5)
    _assert_same(packed, turns, 1e-5)
    assert set(packed[1]["bank"]) == {"prefixes", "keys"}
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(packed[1]))
    assert float(packed[0].fusion) > 1e-4 and float(packed[0].selection) > 1e-4


def test_the_likelihoods_of_a_bank_of_prefixes_are_those_of_each_prefix_alone():
    batch, tree = tiny.packed("dialogue").batch(), tiny.trainable(PREFIXED)
    alone = SelectiveLM(tiny.CONFIG, Prefixes(1, 2, 0.5), None, max_logit_rows=64)
    score = jax.jit(score_turns, static_argnums=0)
    whole = score(PREFIXED, tiny.params(), tree, batch)
    for k in range(3):
        own = {"bank": {"prefixes": tree["bank"]["prefixes"][k : k + 1]}}
        one = score(alone, tiny.params(), own, batch)
        assert tiny.relative_difference(one.nll[..., 0], whole.nll[..., k]) <= 1e-5
    assert float(jnp.abs(jnp.diff(whole.nll, axis=-1)).max()) > 1e-2
