"""A few of many, evenly apart."""

from __future__ import annotations

import numpy as np


def spread_evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` indices, evenly apart; all of them when `wanted` is 0 or larger."""
    if not 0 < wanted < count:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))
