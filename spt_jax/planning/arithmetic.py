"""FLOPs of a traced program's matrix products, over all devices."""

from __future__ import annotations

import math
from typing import Any

from jax import extend


def product_flops(jaxpr: Any, unknown_trips: int = 1) -> float:
    """FLOPs of the matrix products of a jaxpr, recomputation and masked halves included.

    The body of a scan counts as often as it runs, that of a `shard_map` on every device, that of a kernel at every
    place of its grid; of alternatives the dearest counts.

    Args:
        jaxpr: Of a traced function.
        unknown_trips: How often the body of a while loop runs.
    """
    return sum(_of_equation(equation, unknown_trips) for equation in jaxpr.eqns)


def _of_equation(equation: Any, unknown_trips: int) -> float:
    inner = [product_flops(each, unknown_trips) for each in extend.core.jaxprs_in_params(equation.params)]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        case "scan":
            return equation.params["length"] * sum(inner)
        case "while":
            return unknown_trips * sum(inner)
        case "cond":
            return max(product_flops(branch.jaxpr, unknown_trips) for branch in equation.params["branches"])
        case "shard_map":
            return equation.params["mesh"].size * sum(inner)
        case "pallas_call":
            return math.prod(equation.params["grid_mapping"].grid) * sum(inner)
    return sum(inner)
