"""What reaches the devices is what lay on the host, whatever its strides, and shares no memory with it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spt_jax.models.host_transfer import to_devices

VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as stored": lambda array: array,
    "transposed": lambda array: array.T,
    "heads of a transposed kernel": lambda array: array.T.reshape(array.shape[1], 16, -1),
    "inputs of heads": lambda array: array.T.reshape(16, -1, array.shape[0]),
    "every other row": lambda array: array[::2],
    "a part of the columns": lambda array: array[:, 32:96],
    "a read-only copy of a row": lambda array: np.broadcast_to(array[0], array.shape),
}


def numbers(rows: int, columns: int, dtype: type) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32).astype(dtype)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts where a CPU device could use it in place."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("rows", [64, 8192], ids=["in one thread", "in several threads"])
@pytest.mark.parametrize("name", VIEWS)
def test_sharded_and_unsharded_arrays_hold_the_values_of_any_view(name: str, rows: int, borrow: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        view = VIEWS[name](numbers(rows, 128, dtype))
        for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(None, "fsdp"), PartitionSpec("tensor")):
            sharding = NamedSharding(mesh, spec)
            array = to_devices(view, sharding, borrow=borrow)
            assert (array.sharding, array.dtype) == (sharding, view.dtype)
            np.testing.assert_array_equal(array, view)
        np.testing.assert_array_equal(to_devices(view, None, borrow=borrow), view)


@pytest.mark.parametrize("spec", [None, PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")], ids=str)
def test_nothing_is_borrowed_unasked(spec: PartitionSpec | None) -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    source = aligned(numbers(4096, 128, np.float32))
    expected = source.copy()
    array = to_devices(source, None if spec is None else NamedSharding(mesh, spec))
    source[...] = 0
    np.testing.assert_array_equal(array, expected)


def test_without_a_sharding_the_result_may_follow_other_arrays() -> None:
    elsewhere = jax.device_put(np.float32(2), jax.devices()[1])
    assert (to_devices(numbers(2, 2, np.float32), None) * elsewhere).devices() == {jax.devices()[1]}
