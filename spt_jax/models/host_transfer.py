"""Arrays of the host to (sharded) device arrays: each device's part straight from where it lies, in a mapped file too.

A transposed view goes to the runtime as it is: its blocked transposition is ten times as fast as NumPy's, and no second
copy stands on the host meanwhile.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64
"""Bytes; JAX's CPU devices borrow a contiguous host array that starts at a multiple of this."""
_SMALL = 1 << 20
"""Bytes; less is not worth a thread."""


def to_devices(view: np.ndarray, sharding: jax.sharding.Sharding | None, *, borrow: bool = False) -> jax.Array:
    """A device array of the values of `view`, in its type; returns when all are there.

    Args:
        view: Of any strides, at most four bytes a number.
        sharding: Of the result; None for the default device, uncommitted.
        borrow: Whether the result may use the memory of `view`, if that is cheaper; otherwise a mapped file behind
            it may be unmapped, cut or overwritten.
    """

    def place(item: tuple[Any, Any]) -> jax.Array:
        device, index = item
        part = view[index]
        if part.flags.c_contiguous and not borrow:
            part = _aligned_copy(part)
        return jax.block_until_ready(jax.device_put(part, device))

    if sharding is None:
        return place((None, ...))
    places = sharding.addressable_devices_indices_map(view.shape).items()
    spread = _threads().map if len(places) > 1 and view.nbytes > _SMALL else map
    return jax.make_array_from_single_device_arrays(view.shape, sharding, list(spread(place, places)))


def _aligned_copy(part: np.ndarray) -> np.ndarray:
    # Aligned, so that a CPU device takes over the copy rather than making another.
    buffer = np.empty(part.nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + part.nbytes].view(part.dtype).reshape(part.shape)
    copy[...] = part
    return copy


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="host-transfer")
