"""The transformer retriever's encoder: torch's arithmetic, the laws of its masks, the authors' use of it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from moments import moments_apart

from spt_jax.errors import UserError
from spt_jax.prompting.encoder import TransformerEncoder, across_rows, from_torch, to_torch

LAYERS, HEADS, WIDTH, FEED_FORWARD = 2, 4, 16, 24
ENCODER = TransformerEncoder(LAYERS, HEADS, FEED_FORWARD)
ROWS = np.random.default_rng(0).normal(size=(3, 7, WIDTH)).astype(np.float32)
CAUSAL = jnp.tril(jnp.ones((7, 7), bool))
KINDS = ("tokens, causally", "across rows")


@functools.cache
def parameters(seed: int = 1) -> Any:
    """Every parameter random, norms and biases too."""
    leaves, tree = jax.tree.flatten(ENCODER.init(jax.random.key(seed), ROWS)["params"])
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    spread = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, spread)


def apply(params: Any, x: Any, mask: Any = None) -> jax.Array:
    return ENCODER.apply({"params": params}, x, mask)  # pyright: ignore[reportReturnType]


encode = jax.jit(apply)
encode_across_rows = jax.jit(lambda params, x, present: across_rows(functools.partial(apply, params), x, present))


def torch_encoder(dropout: float = 0.0, tensors: Any = None, feed_forward: int = FEED_FORWARD) -> Any:
    """Torch's own, made with its defaults: rows of the batch come second."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, feed_forward, dropout)
        encoder = torch.nn.TransformerEncoder(layer, LAYERS)
    if tensors is not None:
        encoder.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    return encoder


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_torchs(kind, record_property):
    torch = pytest.importorskip("torch")
    weights = np.random.default_rng(1).normal(size=ROWS.shape).astype(np.float32)
    x = torch.tensor(ROWS, requires_grad=True)
    reference = torch_encoder(tensors=to_torch(parameters())).train()  # training: no fused path
    if kind == "across rows":
        expected = reference(x)
    else:
        expected = reference(x.swapaxes(0, 1), mask=torch.tensor(~np.asarray(CAUSAL))).swapaxes(0, 1)
    (expected * torch.tensor(weights)).sum().backward()

    def total(params: Any, rows: Any) -> Any:
        if kind == "across rows":
            found = across_rows(functools.partial(apply, params), rows)
        else:
            found = apply(params, rows, CAUSAL)
        return jnp.sum(found * weights), found

    (_, found), (gradients, to_rows) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(parameters(), ROWS)
    differences = {
        "forward": tiny.relative_difference(found, expected.detach().numpy()),
        "to the input": tiny.relative_difference(to_rows, x.grad.numpy()),
        "to the parameters": tiny.relative_difference(
            to_torch(gradients), {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
        ),
    }
    record_property("differences", differences)
    print(kind, differences)
    assert differences["forward"] <= 1e-5, differences
    assert np.max(list(differences.values())) <= 1e-4, differences


@pytest.mark.torch
def test_dropout_has_torchs_distribution():
    torch = pytest.importorskip("torch")
    rate = 0.3
    copies = np.repeat(2 * ROWS[:1, :3], 8192, axis=0)

    def draws(rate: float) -> np.ndarray:
        noisy = TransformerEncoder(LAYERS, HEADS, FEED_FORWARD, rate)
        program = jax.jit(lambda p, x, key: noisy.apply({"params": p}, x, None, False, rngs={"dropout": key}))
        return np.asarray(program(parameters(), copies, jax.random.key(3)), np.float64)

    torch.manual_seed(4)
    with torch.no_grad():
        reference = torch_encoder(rate, to_torch(parameters())).train()
        expected = reference(torch.tensor(copies).swapaxes(0, 1)).swapaxes(0, 1).double().numpy()
    print("equal rates:", moments_apart(draws(rate), expected), "another:", moments_apart(draws(0.25), expected))
    assert moments_apart(draws(rate), expected) < 5 < moments_apart(draws(0.25), expected)


@pytest.mark.torch
def test_initial_values_spread_like_torchs():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    expected = {name: tensor.numpy() for name, tensor in torch_encoder(feed_forward=4096).state_dict().items()}
    encoder = TransformerEncoder(LAYERS, HEADS, feed_forward=4096)
    found = to_torch(dict(encoder.init(jax.random.key(0), ROWS)["params"]))
    for name, tensor in expected.items():
        ours = found[name]
        if tensor.std() == 0:
            np.testing.assert_array_equal(ours, tensor)
            continue
        # Uniform draws: a band of four standard errors of the smaller matrices' extreme and spread.
        slack = 4 / np.sqrt(tensor.size)
        np.testing.assert_allclose([ours.std(), np.abs(ours).max()], [tensor.std(), np.abs(tensor).max()], rtol=slack)


def test_later_tokens_change_nothing_under_a_causal_mask():
    changed = ROWS.copy()
    changed[:, 4:] += 3
    a, b = (np.asarray(encode(parameters(), rows, CAUSAL)) for rows in (ROWS, changed))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 0.1


def test_tokens_are_a_set_without_a_mask():
    order = np.random.default_rng(2).permutation(7)
    a, b = np.asarray(encode(parameters(), ROWS)), np.asarray(encode(parameters(), ROWS[:, order]))
    np.testing.assert_allclose(a[:, order], b, atol=1e-5)


def test_masked_tokens_are_as_good_as_absent():
    mask = jnp.ones((7, 7), bool).at[:, 5:].set(False)
    a, b = encode(parameters(), ROWS, mask), encode(parameters(), ROWS[:, :5])
    np.testing.assert_allclose(a[:, :5], b, atol=1e-6)


def test_values_and_gradients_are_finite_where_a_token_sees_nothing():
    mask = CAUSAL.at[2].set(False)
    value, gradients = jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply(p, ROWS, mask) ** 2)))(parameters())
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_across_rows_each_position_is_alone():
    present = jnp.ones(3, bool)
    whole = encode_across_rows(parameters(), ROWS, present)
    alone = [encode_across_rows(parameters(), ROWS[:, t : t + 1], present) for t in range(7)]
    np.testing.assert_allclose(whole, np.concatenate(alone, axis=1), atol=1e-6)


def test_across_rows_empty_rows_are_as_good_as_absent():
    rows = np.concatenate([ROWS, np.full_like(ROWS[:2], 9.0)])
    a = encode_across_rows(parameters(), rows, jnp.arange(5) < 3)
    b = encode_across_rows(parameters(), ROWS, jnp.ones(3, bool))
    np.testing.assert_allclose(a[:3], b, atol=1e-6)
    assert np.isfinite(a).all()
    assert np.isfinite(encode_across_rows(parameters(), ROWS, jnp.zeros(3, bool))).all()


@pytest.mark.parametrize("copies", [2, 5])
def test_across_rows_copies_of_the_batch_change_nothing(copies):
    once = encode_across_rows(parameters(), ROWS, jnp.ones(3, bool))
    often = encode_across_rows(parameters(), np.tile(ROWS, (copies, 1, 1)), jnp.ones(3 * copies, bool))
    np.testing.assert_allclose(often, np.tile(once, (copies, 1, 1)), atol=2e-6)
    # A copy of one row alone does change the others' view of the batch.
    uneven = encode_across_rows(parameters(), np.concatenate([ROWS, ROWS[:1]]), jnp.ones(4, bool))
    assert np.abs(uneven[:3] - once).max() > 1e-2


def test_dropout_is_off_unless_asked_for_and_follows_its_key():
    noisy = TransformerEncoder(LAYERS, HEADS, FEED_FORWARD, dropout=0.5)

    def draw(seed: int) -> Any:
        return noisy.apply({"params": parameters()}, ROWS, None, False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(noisy.apply({"params": parameters()}, ROWS), apply(parameters(), ROWS))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.abs(np.asarray(draw(0)) - np.asarray(draw(1))).max() > 0.1


def test_torchs_names_come_back_from_the_tree():
    tensors = to_torch(parameters())
    again = from_torch(tensors, LAYERS, HEADS)
    jax.tree.map(np.testing.assert_array_equal, again, parameters())
    assert all(tensor.flags["C_CONTIGUOUS"] for tensor in tensors.values())


NAME = "layers.1.linear1.weight"


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (lambda t: t.pop(NAME), HEADS, f"tensor {NAME} is missing"),
        (lambda t: t.pop("layers.0.linear1.weight"), HEADS, r"tensor layers\.0\.linear1\.weight is missing"),
        (
            lambda t: t.update({"layers.1.linear_1.weight": t.pop(NAME)}),
            HEADS,
            "Did you mean 'layers.1.linear_1.weight'",
        ),
        (lambda t: t.update({NAME: np.zeros((24, 15))}), HEADS, r"has the shape \[24, 15\]; .* needs \[24, 16\]"),
        (lambda t: t.update({"layers.0.linear1.weight": np.zeros(3)}), HEADS, "allowed: a matrix"),
        (lambda t: t.update({"norm.weight": np.zeros(16)}), HEADS, "no place for the tensor norm.weight"),
        (lambda t: None, 3, "3 heads for a width of 16"),
    ],
)
def test_tensors_of_another_encoder_are_refused(change, heads, message):
    tensors = to_torch(parameters())
    change(tensors)
    with pytest.raises(UserError, match=message):
        from_torch(tensors, LAYERS, heads)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="5 heads for a width of 16"):
        TransformerEncoder(1, 5).init(jax.random.key(0), ROWS)


def test_both_sides_of_the_authors_cosine_are_reproduced(shared_dir: Path, record_property):
    golden = shared_dir / "golden" / "opt_b4_retriever_extra_lm"
    if not golden.is_dir():
        pytest.skip("the golden cases are not among the shared reference data")
    given, step, inputs = (np.load(golden / f"{name}.npz") for name in ("params_init", "step0", "inputs"))
    weights = safetensors.numpy.load_file(shared_dir / "golden" / "models" / "opt-tiny" / "model.safetensors")
    (table,) = (tensor for name, tensor in weights.items() if name.endswith("decoder.embed_tokens.weight"))
    prefix = "retriever."
    tensors = {name.removeprefix(prefix): given[name] for name in given.files if name.startswith(prefix)}
    params = from_torch(tensors, num_layers=2, num_heads=4)

    def encode(x: jax.Array, mask: jax.Array | None) -> Any:
        return TransformerEncoder(2, 4).apply({"params": params}, x, mask)

    bank = np.stack([given[f"models.{k}.prompt"] for k in range(4)])
    mapped = bank @ given["prompt_normalizer.weight"].T + given["prompt_normalizer.bias"]
    contexts = table[inputs["s0_input_ids"]]
    every_row = jnp.ones(4, bool)
    found = {
        "prompts": np.repeat(across_rows(encode, jnp.asarray(mapped)).mean(axis=1), 4, axis=0),  # index k·B + b
        "contexts": np.tile(across_rows(encode, jnp.asarray(contexts), every_row).mean(axis=1), (4, 1)),
    }
    expected = {"prompts": step["cos_prompt_vec"], "contexts": step["cos_ctx_vec"]}
    differences = {side: tiny.relative_difference(found[side], expected[side]) for side in found}
    record_property("differences", differences)
    print(differences)
    assert np.max(list(differences.values())) <= 1e-4, differences
