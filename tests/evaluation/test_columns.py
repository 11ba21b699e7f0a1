from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
import tiny
from tiny_experiment import experiment

from spt_jax.evaluation.columns import ColumnEvaluator, ColumnOptions
from spt_jax.evaluation.reply_writer import turn_contexts
from spt_jax.evaluation.spread import spread_evenly
from spt_jax.generation.engine import GenerationEngine
from spt_jax.generation.replies import cut_reply
from spt_jax.progress import ProgressBar
from spt_jax.prompting.selective_lm import without_prompt
from spt_jax.training.experiment import pack_dialogues


@pytest.fixture(scope="module")
def setting():
    return experiment()


def evaluator_of(setting, layout: str = "dialogue", replies: int = 0) -> ColumnEvaluator:
    rows = pack_dialogues(setting.config, tiny.DIALOGUES, setting.lm.tokenizer, layout=layout).rows
    options = ColumnOptions(batch_size=4, max_buckets=1, max_new_tokens=3, cut=cut_reply, replies=replies)
    return ColumnEvaluator(setting.lm, setting.mesh, tiny.DIALOGUES, rows, options)


def test_contexts_are_the_same_whatever_the_layout(setting):
    packed, turns = (
        turn_contexts(pack_dialogues(setting.config, tiny.DIALOGUES, setting.lm.tokenizer, layout=layout).rows)
        for layout in ("dialogue", "turn")
    )
    assert packed == turns
    text = "given persona: I mend clocks. I have two dogs.; context: Q: what do you do? R: i mend clocks Q: wow R:"
    assert packed[1, 1] == [tiny.CharacterEncoder.bos_id, *tiny.CharacterEncoder().encode([text])[0]]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_a_spread_is_even_ordered_and_reaches_both_ends(count):
    for wanted in range(count + 3):
        chosen = spread_evenly(count, wanted)
        assert len(chosen) == (wanted if 0 < wanted < count else count)
        assert (np.diff(chosen) > 0).all()
        assert chosen[0] == 0
        assert wanted == 1 or chosen[-1] == count - 1
        assert len(chosen) < 2 or np.ptp(np.diff(chosen)) <= 1


def test_a_column_replies_behind_the_selected_prompt_of_each_turn(setting):
    tree, bars = tiny.trainable(), []

    def bar(what: str, total: int) -> ProgressBar:
        bars.append((what, total))
        return ProgressBar(what, total, shown=False)

    evaluator = evaluator_of(setting, replies=4)
    column = evaluator.run(setting.model, tree, bar)
    assert len(column.answered) == len(column.replies) == 4
    assert bars == [("scoring", evaluator.turns), ("replying", 4)]
    lm, found = setting.lm, column.likelihoods
    engine = GenerationEngine(lm.config, lm.params, eos_ids=[lm.tokenizer.eos_id], pad_id=lm.tokenizer.pad_id)
    contexts = turn_contexts(pack_dialogues(setting.config, tiny.DIALOGUES, lm.tokenizer).rows)
    for u, reply in zip(column.answered, column.replies, strict=True):
        context = contexts[int(found.dialogue[u]), int(found.turn[u])]
        ids = engine.generate(tree["bank"]["prompts"], [context], [int(found.selected[u])], max_new_tokens=3)[0]
        assert reply == cut_reply(lm.tokenizer.decode(ids))
    assert column.figures["perplexity"] == found.perplexity
    assert column.figures["usage"] == found.usage.tolist()
    words = sum(len(turn.response.split()) for dialogue in tiny.DIALOGUES for turn in dialogue.turns)
    total = float((found.selected_nll * found.tokens).sum())
    assert column.figures["perplexity_per_word"] == pytest.approx(np.exp(total / words), rel=1e-5)


def test_the_lm_without_a_prompt_learns_and_selects_nothing(setting):
    bare = without_prompt(setting.model)
    assert (bare.num_prompts, bare.init(jax.random.key(0))) == (1, {})
    column = evaluator_of(setting, replies=2).run(bare, {}, partial(ProgressBar, shown=False))
    assert column.likelihoods.nll.shape == (10, 1)
    assert np.isfinite(column.likelihoods.scores).all()
    assert column.figures["usage"] is None
    assert column.figures["oracle_perplexity"] == column.figures["perplexity"]


def test_the_engine_sees_the_reference_of_a_turn(setting):
    assert evaluator_of(setting).reference(2, 3) == "bye"
