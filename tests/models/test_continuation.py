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
from spt_jax.models.layers_apart import layers_apart, on_one_cpu

pytestmark = pytest.mark.first_python

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


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("name", CONFIGS)
def test_strands_of_changing_ancestry_equal_whole_rows(name, apart):
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

    def alone_in_a_row(row: int, ids: list[int]) -> jax.Array:
        """Hidden states of a text: of one width, for one program; an LM is causal, and does not see what is behind."""
        tokens = np.pad(ids, (0, max(LENGTHS) + NEW - len(ids)))
        return whole(config, params, prompts[row], tokens)[: len(ids)]

    for row, length in enumerate(LENGTHS):
        expected = alone_in_a_row(row, list(text[row, :length]))
        np.testing.assert_allclose(hidden[row, :length], expected, rtol=1e-4, atol=1e-5)

    strands, step_params = 3, params
    if apart:
        context, step_params = context.taken_apart(), params | {"layers": layers_apart(params["layers"])}
    said = [[list(text[row, :length]) for _ in range(strands)] for row, length in enumerate(LENGTHS)]
    past = Continuation.empty(config, 2, strands, NEW, apart=apart)
    for step in range(NEW):
        tokens = rng.integers(0, 61, (2, strands))
        hidden, past = compiled(extend)(config, step_params, embed(config, params, tokens), context, past)
        said = [[[*ids, tokens[row, n]] for n, ids in enumerate(rows)] for row, rows in enumerate(said)]
        for row in range(2):
            for n in range(strands):
                expected = alone_in_a_row(row, said[row][n])[-1]
                np.testing.assert_allclose(
                    hidden[row, n], expected, rtol=1e-4, atol=1e-5, err_msg=f"step {step}, row {row}, strand {n}"
                )
        parents = rng.integers(0, strands, (2, strands))
        past = past.descended(jnp.asarray(parents, jnp.int32))
        said = [[said[row][parent] for parent in parents[row]] for row in range(2)]


def test_layers_apart_are_views_of_their_stack():
    stack = {"kernel": jnp.arange(2 * 16 * 32, dtype=jnp.bfloat16).reshape(2, 16, 32), "scale": jnp.ones((2, 3))}
    apart = layers_apart(stack)
    assert len(apart) == 2
    for number, layer in enumerate(apart):
        for name, array in layer.items():
            assert array.dtype == stack[name].dtype
            np.testing.assert_array_equal(array, stack[name][number])
        offset = number * layer["kernel"].nbytes
        assert layer["kernel"].unsafe_buffer_pointer() == stack["kernel"].unsafe_buffer_pointer() + offset
    kept = np.asarray(apart[1]["kernel"]).copy()
    del stack
    np.testing.assert_array_equal(apart[1]["kernel"], kept)


def test_layers_are_taken_apart_on_one_cpu_alone():
    first, second, *_ = jax.devices("cpu")
    here, there = (jax.device_put(jnp.ones(3), device) for device in (first, second))
    assert on_one_cpu({"a": here, "b": here})
    assert not on_one_cpu({"a": here, "b": there})
    mesh = jax.sharding.Mesh(np.array([first, second]), ("x",))
    assert not on_one_cpu({"a": jax.device_put(here, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))})
