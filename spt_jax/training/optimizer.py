"""AdamW over the trainable tree: warm-up, a schedule, clipping, and the retriever's own learning rate."""

from __future__ import annotations

from typing import Any

import optax

from spt_jax.config import Config


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Linear warm-up over ``warmup_steps``, then constant, or a cosine down to ``final_fraction`` of the peak.

    Args:
        config: The section ``optimizer``.
        total_steps: Steps of the whole run; the cosine ends there.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # The first step already moves: its rate is peak / warmup, not 0.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of the run.

    Args:
        config: The section ``optimizer``.
        total_steps: Steps of the whole run.
    """
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    steps.append(
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    )
    if config.retriever_factor != 1.0:

        def scaled(updates: Any, params: Any = None) -> Any:
            del params
            return {
                name: optax.tree.scale(config.retriever_factor, tree) if name == "retriever" else tree
                for name, tree in updates.items()
            }

        steps.append(optax.stateless(scaled))
    return optax.chain(*steps)
