"""How the prompt that answers is chosen at evaluation: hard, soft, or disturbed by noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from tiny_experiment import experiment

from spt_jax.evaluation.run_evaluation import AFTER, Evaluation, evaluate_run
from spt_jax.prompting.selective_lm import mixed_prompts

BANK = jax.random.normal(jax.random.key(0), (3, 4, 8))


def evaluated(score_temperature: float = 1.0, **options: Any) -> Evaluation:
    setting = experiment(samples=0, **options)
    setting.config.objective.score_temperature = score_temperature
    return evaluate_run(setting, tiny.trainable(), None, tiny.DIALOGUES[2:], replies=4)


def answers(evaluation: Evaluation) -> list[tuple[str, int]]:
    return [(p["prediction"], p["selected"]) for p in evaluation.predictions]


def test_mixtures_are_sums_of_prompts_weighted_by_a_softmax():
    scores = np.array([[0.3, 0.1, -2.0], [0.0, 0.0, 0.0]], np.float32)
    weights = np.exp(2 * scores) / np.exp(2 * scores).sum(axis=-1, keepdims=True)
    expected = [sum(w * np.asarray(prompt) for w, prompt in zip(row, BANK, strict=True)) for row in weights]
    np.testing.assert_allclose(mixed_prompts(BANK, scores, 0.5), expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_at_a_low_temperature_is_the_prompt_with_the_best_score():
    scores = np.asarray(jax.random.normal(jax.random.key(1), (6, 3)))
    np.testing.assert_allclose(mixed_prompts(BANK, scores, 1e-4), jnp.take(BANK, scores.argmax(axis=-1), axis=0))


def test_soft_selection_at_a_low_temperature_answers_as_hard_selection_and_else_differently():
    hard = evaluated(selection="hard")
    cold, warm = evaluated(1e-5, selection="soft"), evaluated(1.0, selection="soft")
    assert answers(cold) == answers(hard)
    assert answers(warm) != answers(hard)
    for name in ("perplexity", "oracle_perplexity", "usage"):
        assert warm.results["columns"][AFTER][name] == hard.results["columns"][AFTER][name]


def test_noise_on_the_selection_follows_the_seed_and_none_is_no_noise():
    plain = evaluated()
    assert evaluated(selection_noise=0.0).predictions == plain.predictions
    noisy, again = evaluated(selection_noise=5.0), evaluated(selection_noise=5.0)
    assert noisy.predictions == again.predictions
    assert [p["scores"] for p in noisy.predictions] != [p["scores"] for p in plain.predictions]
    assert [p["selected"] for p in noisy.predictions] != [p["selected"] for p in plain.predictions]
    assert [p["nll"] for p in noisy.predictions] == [p["nll"] for p in plain.predictions]


def test_selection_noise_is_independent_of_the_number_of_replies():
    setting = experiment(samples=0, selection_noise=5.0)
    few, all_ = (evaluate_run(setting, tiny.trainable(), None, tiny.DIALOGUES[2:], replies=n) for n in (2, 0))
    by_turn = {(p["dialogue"], p["turn"]): p for p in all_.predictions}
    assert [by_turn[p["dialogue"], p["turn"]] for p in few.predictions] == few.predictions
