"""Whether two samples may have one distribution."""

from __future__ import annotations

import numpy as np


def moments_apart(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of two samples' means or variances, in standard errors; draws along the first axis."""

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        return float(np.max(np.abs(a.mean(axis=0) - b.mean(axis=0)) / error))

    spread = apart((x - x.mean(axis=0)) ** 2, (y - y.mean(axis=0)) ** 2)
    return float(np.maximum(apart(x, y), spread))
