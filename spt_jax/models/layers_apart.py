"""A stack of layers taken apart, for loops that read every weight for the sake of a few tokens.

On a CPU, XLA copies a layer's arrays out of their stack before it multiplies by them. A product of few rows, as in
decoding, takes no longer than that copy; of arrays that lie apart nothing is copied.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def on_one_cpu(tree: Any) -> bool:
    """Whether all arrays of a tree lie on one and the same CPU device."""
    devices = {device for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def layers_apart(stack: Any) -> list[Any]:
    """The L layers of a tree of arrays ``[L, ...]`` that lie on one CPU; views of the stack.

    The smallest arrays, and those of int4, which NumPy has a byte each for, are copies.
    """
    leaves, structure = jax.tree.flatten(stack)
    (device,) = leaves[0].devices()
    # As tied to their device as the stack is, or programs would be compiled for either kind.
    device = device if leaves[0].committed else None
    whole = [np.asarray(leaf) for leaf in leaves]  # a view, which keeps the stack alive
    # JAX takes NumPy's memory as it is where it is aligned, as all but the smallest arrays are.
    return [
        jax.tree.unflatten(structure, jax.device_put([leaf[number] for leaf in whole], device))
        for number in range(len(whole[0]))
    ]
