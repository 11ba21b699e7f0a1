"""What the retriever's options decide: which parameters there are, and that a transformer sees no later token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.config import default_config
from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.errors import UserError
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.prompting.retriever import Contexts, RetrieverConfig
from spt_jax.prompting.selective_lm import batch_contexts, batch_scores, retriever_scores
from spt_jax.training.initial import initial_trainable

TRANSFORMER = RetrieverConfig("transformer", heads=2, feed_forward=8, layers=2)
SIDES = ("both", "prompts", "contexts", "none")
KINDS = (RetrieverConfig(), TRANSFORMER)


def model_with(config: RetrieverConfig):
    return dataclasses.replace(tiny.MODEL, retriever_config=config)


@pytest.mark.parametrize("kind", ["linear", "transformer"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("share", [True, False])
def test_parameters_that_are_not_used_are_not_in_the_tree(kind, sides, share):
    config = RetrieverConfig(kind, sides, share, layers=1, heads=2, feed_forward=4)
    model = model_with(config)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    name = "lin" if kind == "linear" else "encoder"
    used = [f"{name}_context"] * (sides in ("both", "contexts")) + [f"{name}_prompt"] * (sides in ("both", "prompts"))
    expected = {name} if share and used else set(used)
    assert set(tree.get("retriever", {})) == expected
    assert ("retriever" in tree) == bool(expected)


@pytest.mark.parametrize("sides", SIDES)
def test_every_parameter_of_the_tree_has_a_gradient(sides):
    model = model_with(RetrieverConfig(sides=sides, share=False))
    batch, tree = tiny.packed("dialogue").batch(), tiny.trainable(model)
    gradient = jax.jit(jax.grad(lambda t: (batch_scores(model, tiny.params(), t, batch) ** 2).sum()))(tree)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradient))


SCORES = jax.jit(retriever_scores, static_argnums=0)


def test_a_later_token_changes_no_earlier_turns_score_of_a_transformer():
    model = model_with(TRANSFORMER)
    tree = model.init(jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 2)
    text = jax.random.normal(keys[0], (1, 20, 32))
    lengths = jnp.array([[6, 11, 20]], jnp.int32)
    other = text.at[:, 11:].set(jax.random.normal(keys[1], (1, 9, 32)))
    a, b = (np.asarray(SCORES(model, tree, Contexts.of(x, lengths)))[0] for x in (text, other))
    np.testing.assert_array_equal(a[:2], b[:2])
    assert np.abs(a[2] - b[2]).max() > 1e-3
    earlier = text.at[:, 2].set(0.0)
    assert np.abs(np.asarray(SCORES(model, tree, Contexts.of(earlier, lengths)))[0] - a).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_scores_are_the_same_in_both_layouts(config):
    model = model_with(config)
    tree = tiny.trainable(model)

    def by_turn(layout: str) -> dict[tuple[int, int], np.ndarray]:
        batch = tiny.packed(layout).batch()
        scores = np.asarray(SCORES(model, tree, batch_contexts(model, tiny.params(), batch)))
        return {
            (int(batch["dialogue_ids"][d]), int(batch["turn_ids"][d, n])): scores[d, n]
            for d, n in np.argwhere(np.asarray(batch["turn_mask"]) > 0)
        }

    dialogues, turns = by_turn("dialogue"), by_turn("turn")
    assert len(dialogues) == 10
    assert tiny.relative_difference(dialogues, turns) <= 2e-5


def clustered(seed: int, dialogues=None, prompts: int = 4) -> np.ndarray:
    config = default_config()
    config.bank.init, config.bank.num_prompts, config.bank.prompt_length, config.seed = "clusters", prompts, 4, seed
    model = dataclasses.replace(tiny.MODEL, adapter=SoftPrompts(prompts, 4))
    people = tuple(Dialogue((f"i am {word} and like {word} a lot",), (Turn("hi", "ho"),)) for word in WORDS)
    encoder: Any = tiny.CharacterEncoder()
    tree = initial_trainable(config, model, tiny.params(), encoder, dialogues or people)
    return np.asarray(tree["bank"]["prompts"])


WORDS = ("sea", "bread", "mud", "chess", "rain", "music", "vv", "q8", "zebra", "kkkk", "jazz", "football")


def test_clusters_of_personas_start_distinct_prompts_the_same_each_time():
    prompts = clustered(0)
    assert prompts.shape == (4, 4, 32)
    np.testing.assert_array_equal(prompts, clustered(0))
    assert not np.array_equal(prompts, clustered(1))
    means = prompts.mean(axis=1)
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert apart.min() > 1e-2


def test_a_prompt_a_persona_holds_each_persona_once():
    people = [Dialogue((word * 3,), (Turn("hi", "ho"),)) for word in WORDS[:3]]
    prompts = clustered(0, people * 2, prompts=3)
    embedded = [tiny.params()["embed_tokens"][np.array(tiny.CharacterEncoder().encode([w * 3])[0])] for w in WORDS[:3]]
    means = sorted(np.asarray(x).mean(axis=0).tolist() for x in embedded)
    np.testing.assert_allclose(sorted(prompts[:, 0].tolist()), means, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(prompts[:, 0], prompts[:, 3])


@pytest.mark.parametrize(("personas", "count"), [((("a",), ("b",), ("b",)), 2), (((), ()), 0)])
def test_fewer_personas_than_prompts_are_refused(personas, count):
    people = [Dialogue(persona, (Turn("hi", "ho"),)) for persona in personas]
    with pytest.raises(UserError, match=rf"clusters.*have {count} personas for 4 prompts"):
        clustered(0, people)
