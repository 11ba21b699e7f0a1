"""Splash attention, interpreted, is XLA's attention over causal rows, on one device and on a mesh."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.models.attention import attention
from spt_jax.models.splash import can_share, splash_attention, splash_lacks
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import attention_sharding

TPU: Any = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
TOLERANCES = {jnp.float32: 1e-4, jnp.bfloat16: 2e-2}


def arrays(dtype: Any, length: int, heads: int, groups: int, dim: int, rows: int = 2) -> list[jax.Array]:
    """Queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(length), 4)
    counts = (heads, groups, groups, heads)
    return [jax.random.normal(key, (rows, length, n, dim), dtype) for key, n in zip(keys, counts, strict=True)]


def differences(found: Any, wanted: Any) -> list[float]:
    """Of output and three gradients: the largest difference over the largest value."""
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(found, wanted, strict=True)]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


def with_gradients(given: list[jax.Array], **options: Any) -> Any:
    """The output of attention without a mask and the gradients of queries, keys and values."""

    def run(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, None, **options), query, key, value)
        return out, *vjp(cotangent)

    return jax.jit(run)(*given)


@pytest.mark.parametrize(
    ("dtype", "length", "heads", "groups", "dim", "scale", "softcap"),
    [
        (jnp.float32, 200, 4, 2, 64, None, None),
        (jnp.bfloat16, 140, 2, 2, 128, None, None),
        (jnp.float32, 128, 3, 1, 80, 0.3, 20.0),
    ],
)
def test_splash_attention_is_xlas(dtype, length, heads, groups, dim, scale, softcap):
    given = arrays(dtype, length, heads, groups, dim)
    settings = {"scale": scale, "softcap": softcap}
    found, wanted = (with_gradients(given, kernel=kernel, **settings) for kernel in ("splash", "xla"))
    assert found[0].dtype == dtype
    assert np.max(differences(found, wanted)) <= TOLERANCES[dtype]


def test_a_mesh_splits_rows_and_heads_of_the_kernel():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    given, sharding = arrays(jnp.float32, 72, 4, 2, 64, rows=4), attention_sharding(mesh)
    found = with_gradients(given, kernel="splash", sharding=sharding)
    assert np.max(differences(found, with_gradients(given, kernel="xla"))) <= 1e-4
    program = jax.jit(lambda *qkv: splash_attention(*qkv, sharding=sharding)).lower(*given[:3]).as_text()
    assert "tensor<1x72x2x64xf32>" in program, "a device has one of the rows and two of the heads"


def test_what_devices_cannot_share_or_a_mask_hides_goes_to_xla(monkeypatch):
    monkeypatch.setattr("spt_jax.models.attention.splash_attention", lambda *_, **__: pytest.fail("cannot serve"))
    sharding = attention_sharding(make_mesh(data=2, fsdp=2, tensor=2))
    query, key, value, _ = arrays(jnp.float32, 40, 4, 2, 8, rows=2)
    assert not can_share(2, 4, 2, sharding)  # two rows on four devices
    assert can_share(4, 4, 2, sharding) and not can_share(4, 4, 1, sharding) and not can_share(4, 3, 2, sharding)
    wanted = attention(query, key, value, None)
    np.testing.assert_array_equal(attention(query, key, value, None, kernel="splash", sharding=sharding), wanted)
    mask = jnp.ones((2, 1, 40, 40), bool)
    np.testing.assert_array_equal(
        attention(query, key, value, mask, kernel="splash"), attention(query, key, value, mask)
    )


@pytest.mark.parametrize(
    ("fields", "tensor", "words"),
    [
        ({"head_dim": 60}, 1, "60 wide"),
        ({"num_key_value_heads": 2}, 4, "does not divide 4 heads and 2 heads of keys"),
    ],
)
def test_where_splash_cannot_serve_the_reason_is_told(fields, tensor, words):
    decoder = dataclasses.replace(tiny.CONFIG, **fields)
    assert words in splash_lacks(decoder, TPU, tensor)
    assert splash_lacks(tiny.CONFIG, TPU, 2) == ""
    assert "needs a TPU" in splash_lacks(tiny.CONFIG, jax.devices()[0])
