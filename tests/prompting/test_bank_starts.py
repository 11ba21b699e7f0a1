"""What a bank holds before the first step."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.config import default_config
from spt_jax.errors import UserError
from spt_jax.prompting.bank import from_normal, from_token_ids, from_vocabulary
from spt_jax.training.initial import initial_trainable


class Spelling(tiny.CharacterEncoder):
    """Can spell all of the decoder's tokens."""

    text_vocab_size = tiny.CONFIG.vocab_size


TABLE = jax.random.normal(jax.random.key(0), (40, 8))


def embedder(ids):
    return jnp.take(TABLE, jnp.asarray(ids), axis=0)


def tokens_of(prompts: jax.Array) -> np.ndarray:
    """Which row of the table each virtual token is, ``[K, P]``; fails where one is none."""
    same = (np.asarray(prompts)[:, :, None] == np.asarray(TABLE)).all(axis=-1)
    assert (same.sum(axis=-1) == 1).all()
    return same.argmax(axis=-1)


def test_virtual_tokens_are_embeddings_of_distinct_tokens_that_the_tokenizer_can_spell():
    drawn = tokens_of(from_vocabulary(jax.random.key(1), 30, embedder, (6, 5, 8)))
    assert sorted(drawn.ravel()) == list(range(30))
    assert sorted(drawn.ravel()) != drawn.ravel().tolist(), "they are drawn"
    other = tokens_of(from_vocabulary(jax.random.key(2), 30, embedder, (6, 5, 8)))
    assert (drawn != other).any()


def test_where_tokens_do_not_last_some_are_drawn_again():
    drawn = tokens_of(from_vocabulary(jax.random.key(1), 4, embedder, (3, 7, 8)))
    assert set(drawn.ravel()) == set(range(4))


def test_normal_values_have_the_standard_deviation_asked_for():
    prompts = np.asarray(from_normal(jax.random.key(3), (20, 50, 30), stddev=0.25))
    assert prompts.dtype == np.float32
    assert abs(prompts.mean()) < 5 * 0.25 / np.sqrt(prompts.size)
    assert prompts.std() == pytest.approx(0.25, rel=5 / np.sqrt(2 * prompts.size))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([[3, 1, 4, 1, 5]], [[3, 1, 4], [3, 1, 4]]),
        ([[7, 9], [2]], [[7, 9, 7], [2, 2, 2]]),
    ],
)
def test_a_text_is_cut_to_the_prompt_or_repeated_until_it_is_full(texts, expected):
    assert tokens_of(from_token_ids(texts, embedder, (2, 3, 8))).tolist() == expected


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([[1], [2]], "bank.init_text has 2 texts; allowed: 1, or one for each of 3 prompts"),
        ([[1], [], [2]], "bank.init_text: text 1 has no token"),
    ],
)
def test_texts_that_do_not_fit_the_bank_are_refused(texts, sentence):
    with pytest.raises(UserError, match=sentence):
        from_token_ids(texts, embedder, (3, 3, 8))


@pytest.mark.parametrize("init", ["vocabulary", "text", "normal", "file"])
def test_a_run_starts_as_its_configuration_says(init, tmp_path):
    config = default_config()
    config.bank.init, config.bank.init_stddev = init, 0.5
    config.bank.init_text = ("ab",)
    saved = np.asarray(jax.random.normal(jax.random.key(4), (3, 4, tiny.CONFIG.hidden_size)))
    np.save(tmp_path / "bank.npy", saved)
    config.bank.init_file = str(tmp_path / "bank.npy")
    params, encoder = tiny.params(), cast(Any, Spelling())

    def start() -> np.ndarray:
        return np.asarray(initial_trainable(config, tiny.MODEL, params, encoder, tiny.DIALOGUES)["bank"]["prompts"])

    prompts = start()
    assert prompts.shape == saved.shape
    table = np.asarray(params["embed_tokens"])
    if init == "vocabulary":
        assert all((table == token).all(axis=-1).any() for token in prompts.reshape(-1, table.shape[1]))
    elif init == "text":
        a, b = table[encoder.encode(["ab"])[0]]
        np.testing.assert_array_equal(prompts, np.broadcast_to([a, b, a, b], prompts.shape))
    elif init == "normal":
        assert 0.3 < prompts.std() < 0.7
    else:
        np.testing.assert_array_equal(prompts, saved)
    config.seed = 1
    assert (start() == prompts).all() == (init in ("text", "file"))
