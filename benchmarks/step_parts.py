"""Where does the time of a train step go?

    python benchmarks/step_parts.py --shape=small
    python benchmarks/step_parts.py --shape=opt-125m --rows=8

The whole step, and two parts of it compiled alone on the same arrays: the LM's blocks (all K rows, forward and the
gradient of what enters them) and the vocabulary (projection at target positions, LM and fusion losses, and their
gradient). The three take turns, and the shares are of medians; what is in neither part is the rest: embedding, bank,
retriever, selection, contrastive loss, optimizer, metrics. Float32 on the CPU, random weights, one batch of ConvAI2's
proportions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from drawn_batch import draw_batch
from machine import machine
from train_step_setup import SHAPES, lm_fields

from spt_jax.config import default_config
from spt_jax.models.decoder import decode, vocabulary_head, vocabulary_logits
from spt_jax.models.families.registry import family_of_hf
from spt_jax.models.frozen_tree import random_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch
from spt_jax.prompting.losses import TargetWeights, weighted_target_losses
from spt_jax.prompting.selective_lm import logit_chunks
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state, make_train_step


def parts(shape: str, rows: int) -> dict[str, Callable[[], Any]]:
    """Calls that run the step and its parts once."""
    fields, config = lm_fields(shape), default_config()
    decoder = family_of_hf(fields, shape).config_from_hf(fields, shape)
    mesh = make_mesh(devices=jax.devices()[:1])
    model, optimizer = describe(config, decoder, mesh), make_optimizer(config.optimizer, 1000)
    params = random_params(decoder, jax.random.key(0))
    batch = place_batch(mesh, draw_batch(rows, decoder.vocab_size))
    step = make_train_step(model, objective_of(config), optimizer, mesh)
    state = init_state(model.init(jax.random.key(0), params), optimizer, mesh)
    count, length = model.num_prompts, batch["tokens"].shape[1] + config.bank.prompt_length

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, params, batch)
        return metrics

    @jax.jit
    def blocks(params: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(length), x.shape[:2])
        return jax.vjp(lambda x: decode(decoder, params, x, positions, None)[0], x)[1](cotangent)[0]

    @jax.jit
    def vocabulary(params: Any, hidden: jax.Array, scores: jax.Array) -> Any:
        mask = batch["target_mask"]
        weights = TargetWeights(mask[..., None] / mask.sum(), mask / mask.sum())
        chunks = logit_chunks(model, rows, count, mask.shape[1])

        def total(hidden: jax.Array, scores: jax.Array) -> Any:
            project = lambda head, h: vocabulary_logits(decoder, head, h)  # noqa: E731
            head, targets = vocabulary_head(params), batch["target_ids"]
            return weighted_target_losses(project, head, hidden, scores, targets, mask, weights, chunks)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, scores)

    keys = jax.random.split(jax.random.key(1), 4)
    x, cotangent = (jax.random.normal(key, (rows * count, length, decoder.hidden_size)) for key in keys[:2])
    positions = batch["target_mask"].shape[1]
    hidden = jax.random.normal(keys[2], (rows, positions, count, decoder.hidden_size))
    scores = jax.random.uniform(keys[3], (rows, positions, count))
    return {
        "step": train,
        "blocks": lambda: blocks(params, x, cotangent),
        "vocabulary": lambda: vocabulary(params, hidden, scores),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="sizes of the LM; tiny is for tests")
    parser.add_argument("--rows", type=int, default=8, help="dialogues of the batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if min(options.rows, options.rounds) < 1:
        parser.error("--rows and --rounds must be above 0")
    calls = parts(options.shape, options.rows)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cores: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(options.rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - wall)
            cores[name].append(time.process_time() - cpu)
    whole = statistics.median(cores["step"])
    found = {name: statistics.median(times) for name, times in cores.items()}
    found["rest"] = whole - found["blocks"] - found["vocabulary"]
    print(f"{'':<12} {'cores·s':>9} {'share':>8} {'seconds':>9}")
    for name, spent in found.items():
        clock = f"{statistics.median(seconds[name]):>9.3f}" if name in seconds else ""
        print(f"{name:<12} {spent:>9.3f} {spent / whole:>8.1%} {clock}")
    facts = {"shape": options.shape, "rows": options.rows}
    print(json.dumps({"core_seconds": found, "seconds": seconds} | facts | machine()))


if __name__ == "__main__":
    main()
