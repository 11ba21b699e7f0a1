"""What is read in parts and continued in strands equals the whole row read at once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.continuation import Continuation, extend, read
from spt_jax.models.decoder import decode, embed
from spt_jax.models.decoder_config import DecoderConfig, LayerKind
from spt_jax.models.frozen_tree import random_params

PLAIN = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=96,
)
CONFIGS = {
    "grouped queries": PLAIN,
    "learned positions": dataclasses.replace(PLAIN, position_embedding="learned", num_key_value_heads=4),
    "windows, soft cap": dataclasses.replace(
        PLAIN,
        layer_kinds=(LayerKind(window=4), LayerKind()),
        layer_pattern=(0, 1),
        attention_softcap=2.0,
        attention_scale=0.7,
    ),
}
P, LENGTHS, NEW = 3, (9, 4), 5


@pytest.mark.parametrize("name", CONFIGS)
def test_strands_of_changing_ancestry_equal_whole_rows(name):
    config = CONFIGS[name]
    params = random_params(config, jax.random.key(0))
    params = {**params, "embed_tokens": params["embed_tokens"] * 20}
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.normal(size=(2, P, 16)), jnp.float32)
    text = rng.integers(0, 61, (2, max(LENGTHS)))
    nothing = jnp.zeros((2, 2, 2, 0, config.num_key_value_heads, 4))
    compiled = functools.partial(jax.jit, static_argnums=0)
    _, alone = compiled(read)(config, params, prompts, jnp.full(2, P), nothing)
    prefixes = jnp.stack([alone.key, alone.value]).transpose(2, 1, 0, 4, 3, 5)
    lengths = jnp.asarray(LENGTHS)
    hidden, context = compiled(read)(config, params, embed(config, params, text), lengths, prefixes)
    assert context.lengths.tolist() == [P + length for length in LENGTHS]

    @compiled
    def whole(config, params, prompt, tokens):
        row = jnp.concatenate([prompt, embed(config, params, tokens)])[None]
        positions = jnp.arange(row.shape[1])[None]
        return decode(config, params, row, positions, positions >= 0)[0][0, P:]

    for row, length in enumerate(LENGTHS):
        expected = whole(config, params, prompts[row], text[row, :length])
        np.testing.assert_allclose(hidden[row, :length], expected, rtol=1e-4, atol=1e-5)

    strands = 3
    said = [[list(text[row, :length]) for _ in range(strands)] for row, length in enumerate(LENGTHS)]
    past = Continuation.empty(config, 2, strands, NEW)
    for step in range(NEW):
        tokens = rng.integers(0, 61, (2, strands))
        hidden, past = compiled(extend)(config, params, embed(config, params, tokens), context, past)
        said = [[[*ids, tokens[row, n]] for n, ids in enumerate(rows)] for row, rows in enumerate(said)]
        for row in range(2):
            for n in range(strands):
                expected = whole(config, params, prompts[row], np.asarray(said[row][n]))[-1]
                np.testing.assert_allclose(
                    hidden[row, n], expected, rtol=1e-4, atol=1e-5, err_msg=f"step {step}, row {row}, strand {n}"
                )
        parents = rng.integers(0, strands, (2, strands))
        past = past.descended(jnp.asarray(parents, jnp.int32))
        said = [[said[row][parent] for parent in parents[row]] for row in range(2)]
