"""How does the cost of a train step grow with K, P, dialogue length, layers, width, batch and devices?

    python benchmarks/scaling.py                   # arithmetic and memory of compiled programs; nothing runs
    python benchmarks/scaling.py --seconds         # the median time of a step too, on a machine that does nothing else

One quantity is varied at a time from a base (OPT, 6 layers of width 256, V 50,272, K = 4, P = 8, 4 dialogues of 8 turns
and 270 tokens, float32). Arithmetic is the matrix products of the step, loops counted as often as they run, and depends
on no machine; memory is what the compiler sets aside beside arguments. For each curve the slope in a log-log fit of its
upper half stands beside the one that theory gives: 1 where every row costs the same, less where a part does not grow.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from drawn_batch import draw_batch
from machine import machine

from spt_jax.config import default_config
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import random_params
from spt_jax.models.loading import open_lm
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch
from spt_jax.planning.arithmetic import product_flops
from spt_jax.planning.programs import frozen_shapes
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Point:
    """One step whose cost is measured."""

    prompts: int = 4
    prompt_length: int = 8
    rows: int = 4
    tokens: int = 1
    layers: int = 6
    width: int = 256
    devices: int = 1
    remat: str = "none"


CURVES: dict[str, tuple[tuple[int, ...], str]] = {
    "prompts": ((1, 2, 4, 8, 16, 32, 64), "1: K rows a dialogue, K logits a target"),
    "prompt_length": ((1, 8, 32, 128, 256), "below 1: P tokens beside 270 of text; 1 to 2 far beyond them"),
    "rows": ((1, 2, 4, 8, 16), "1, but for the contrastive pairs' U² · K, which stays out of sight"),
    "tokens": ((1, 2, 3), "1 to 2: kernels and targets grow with the length, attention with its square"),
    "layers": ((2, 4, 8, 16), "below 1: the vocabulary projection does not grow"),
    "width": ((128, 256, 512, 768), "1 to 2: kernels grow with the square, vocabulary and attention with the width"),
    "devices": ((1, 2, 4, 8), "-1 a device: rows are shared, nothing is done twice"),
}
"""What is varied, over which values, and what theory says of its slope. ``tokens`` are multiples of the base length."""


def decoder_of(point: Point) -> DecoderConfig:
    """The base decoder with the point's layers and width; a head is 64 wide."""
    return dataclasses.replace(
        open_lm("shape:opt-125m").config,
        hidden_size=point.width,
        intermediate_size=4 * point.width,
        num_layers=point.layers,
        num_attention_heads=point.width // 64,
        num_key_value_heads=point.width // 64,
        embedding_size=None,
        remat=point.remat,
    )


def longer(batch: dict[str, np.ndarray], times: int) -> dict[str, np.ndarray]:
    """Dialogues `times` as long, with as many more turns and targets: the rows side by side, masks and all."""
    if times == 1:
        return batch
    length = batch["tokens"].shape[1]
    shifted = {"target_positions": length, "context_lengths": length, "target_turns": batch["turn_mask"].shape[1]}
    joined = {
        name: np.concatenate([array + part * shifted.get(name, 0) for part in range(times)], axis=1)
        for name, array in batch.items()
        if array.ndim == 2 and name != "similar"
    }
    joined["turn_mask"] = np.tile(batch["turn_mask"], (1, times))
    turns = joined["turn_mask"].size
    kept = {"lengths": batch["lengths"] * times, "dialogue_ids": batch["dialogue_ids"]}
    return joined | kept | {"similar": np.zeros((turns, turns), bool)}


def measure(point: Point, repeats: int) -> dict[str, float]:
    """Arithmetic and memory of the compiled step, a device's share; seconds too when it is repeated."""
    traced, compiled, (state, params, batch) = _step(point)
    memory = compiled.memory_analysis()
    assert memory is not None
    products = product_flops(traced.jaxpr.jaxpr)
    if point.devices > 1:
        # The trace is of the whole step; what a device does of it is known to the compiler alone, which counts the body
        # of a loop once: as many chunks of logits on each device as on one alone make counts compare.
        shared = _step(point, point.devices)[1]
        alone = _step(dataclasses.replace(point, devices=1))[1]
        products *= shared.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    found = {"products": products, "temporary_bytes": float(memory.temp_size_in_bytes)}
    if repeats:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        weights = jax.device_put(random_params(decoder_of(point), jax.random.key(0)), shardings)
        found["seconds"] = _seconds(compiled, state, weights, batch, repeats)
    return found


def _step(point: Point, parts: int = 1) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """The step as traced and as compiled, with its arguments: state, abstract weights, batch.

    Args:
        point: What it is of.
        parts: Chunks of logits are so many times as small as they would be.
    """
    decoder, config = decoder_of(point), default_config()
    config.bank.num_prompts, config.bank.prompt_length = point.prompts, point.prompt_length
    config.model.max_logit_rows //= parts
    mesh = make_mesh(devices=jax.devices()[: point.devices])
    model, optimizer = describe(config, decoder, mesh), make_optimizer(config.optimizer, 100)
    # As much of a frozen tree as a bank from the vocabulary needs.
    table = {"embed_tokens": jnp.ones((decoder.vocab_size, decoder.hidden_size), decoder.jax_dtype)}
    state = init_state(model.init(jax.random.key(0), table), optimizer, mesh)
    batch = place_batch(mesh, longer(draw_batch(point.rows, decoder.vocab_size), point.tokens))
    arguments = (state, frozen_shapes(decoder, mesh), batch)
    traced = make_train_step(model, objective_of(config), optimizer, mesh).trace(*arguments)
    return traced, traced.lower().compile(), arguments


def _seconds(step: Callable[..., Any], state: Any, params: Any, batch: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        state, metrics = step(state, params, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def slope(values: list[int], costs: list[float]) -> float:
    """Of log cost over log value, least squares over the upper half of the curve."""
    upper = slice(len(values) // 2, None)
    return float(np.polyfit(np.log(values[upper]), np.log(costs[upper]), 1)[0])


def main(arguments: list[str] | None = None) -> None:
    """Prints a table a curve and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--seconds", action="store_true", help="time the steps too")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    options = parser.parse_args(arguments)
    here = machine()
    print(f"{here['cpu']}, jax {jax.__version__}, Python {platform.python_version()}, remat {options.remat}")
    found: dict[str, Any] = {"machine": here}
    for name in options.curves:
        values, theory = CURVES[name]
        base = Point(remat=options.remat, rows=8 if name == "devices" else 4)
        points = [dataclasses.replace(base, **{name: value}) for value in values]
        costs = [measure(point, 3 if options.seconds and name != "devices" else 0) for point in points]
        slopes = {kind: slope(list(values), [cost[kind] for cost in costs]) for kind in costs[0]}
        found[name] = {"values": values, "costs": costs, "slopes": slopes}
        print(f"\n{name}: theory {theory}")
        for value, cost in zip(values, costs, strict=True):
            seconds = f"{cost['seconds']:>9.2f} s" if "seconds" in cost else ""
            print(f"{value:>6}{cost['products'] / 1e9:>12.1f} GFLOP{cost['temporary_bytes'] / 1e6:>12.0f} MB{seconds}")
        print("slope " + ", ".join(f"{kind} {value:.2f}" for kind, value in slopes.items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
