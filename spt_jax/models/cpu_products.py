"""Which library XLA's compiler for CPUs gives products of matrices to."""

from __future__ import annotations

import functools
import os

import jax

_YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"


@functools.cache
def options_for_many_rows() -> dict[str, str]:
    """Compiler options for programs on a CPU that multiply thousands of rows by a block's kernels, and do not learn.

    XLA gives products to YNNPACK where it can, and to Eigen otherwise. Of few rows, and by a vocabulary, YNNPACK's are
    the faster ones; of many rows by the kernels of an MLP, Eigen's are (measured in docs/performance.md). Empty where
    this version of XLA knows no such choice, or ``XLA_FLAGS`` makes it.
    """
    if _YNN_FUSIONS in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {_YNN_FUSIONS: ""}
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
