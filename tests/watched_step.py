"""`losses_and_gradients` with the gradient of the scores beside it, compiled once for all weights and temperatures."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import jax

from spt_jax.prompting import objective as objective_module
from spt_jax.prompting.objective import Losses, Objective, losses_and_gradients
from spt_jax.prompting.selective_lm import SelectiveLM

_TRACED = (
    "lm_weight",
    "selection_weight",
    "contrastive_weight",
    "gold_temperature",
    "score_temperature",
    "annealing_bounds",
)


def watched_step(
    model: SelectiveLM,
    objective: Objective,
    params: Any,
    trainable: Any,
    batch: Any,
    progress: float = 0.0,
    *,
    once: bool = False,
) -> tuple[Losses, Any, jax.Array]:
    """Losses, gradients shaped like `trainable`, and the total's gradient with respect to the scores ``[D, N, K]``.

    Numbers that decide no branch of the objective are arguments of the compiled function, so that cases which differ
    in them alone share it. Unless it runs `once`, it is worth a longer compilation than the other tests' programs.
    """
    # Of a batch without pairs it is asked whether the contrastive loss has a weight.
    traced = [name for name in _TRACED if "similar" in batch or name != "contrastive_weight"]
    numbers = {name: getattr(objective, name) for name in traced}
    blank = dataclasses.replace(objective, **{name: getattr(Objective(), name) for name in traced})
    compiled = _ONCE if once else _OFTEN
    return compiled(model, blank, params, trainable, batch, progress, numbers)


def _step(
    model: SelectiveLM, objective: Objective, params: Any, trainable: Any, batch: Any, progress: Any, numbers: Any
) -> Any:
    seen: list[jax.Array] = []
    original = objective_module._scores

    def watched(*args: Any) -> tuple[jax.Array, Any]:
        scores, backward = original(*args)

        def noted(cotangent: jax.Array) -> Any:
            seen.append(cotangent)
            return backward(cotangent)

        return scores, noted

    with mock.patch.object(objective_module, "_scores", watched):
        losses, gradients = losses_and_gradients(
            model, dataclasses.replace(objective, **numbers), params, trainable, batch, progress=progress
        )
    return losses, gradients, seen[0]


_ONCE = jax.jit(_step, static_argnums=(0, 1))
_OFTEN = jax.jit(_step, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 1})
