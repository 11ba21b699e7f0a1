"""How much of a GPU does a train step use? Its model FLOP utilisation of the ceiling measured in the same run.

    python benchmarks/gpu.py                                              # the paper's shapes in bfloat16
    python benchmarks/gpu.py --models smollm2-135m:32:none opt-2.7b:8:full

A model is NAME:ROWS:REMAT, of `spt_jax.models.shapes` with random weights. A batch holds ROWS dialogues with lengths,
turns and targets drawn like ConvAI2's (270 tokens, 7.8 turns, 107 targets on average), padded to the longest, behind
each of K prompts. Counted is the arithmetic that the method needs: forward, and gradients with respect to activations,
of K rows a dialogue, real tokens alone; recomputation, padding, and the masked half of attention are not counted.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from spt_jax.config import default_config
from spt_jax.models.decoder import abstract_params
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.loading import load_lm
from spt_jax.models.weights import kernel_shape
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state, make_train_step

CONVAI2_TURNS = 131_438


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` calls, after two that warm up."""
    times = []
    for repeat in range(repeats + 2):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        if repeat > 1:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def ceilings(size: int) -> dict[str, float]:
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy (read and written)."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: (x @ b) * 0.01, a))
    large = jnp.ones((size * size * 8,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    return {
        "flops_per_second": 10 * 2 * size**3 / seconds(lambda: product(a, b), 5),
        "bytes_per_second": 2 * large.nbytes / seconds(lambda: copy(large), 5),
    }


def draw_batch(rows: int, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of dialogues with ConvAI2's counts and random tokens."""
    rng = np.random.default_rng(seed)
    turns = np.clip(rng.normal(7.8, 0.6, rows).round().astype(int), 6, 10)
    lengths = np.clip(rng.normal(270, 35, rows).round().astype(int), 180, 400)
    width, slots = math.ceil(lengths.max() / 32) * 32, int(turns.max())
    reply = 14
    targets = math.ceil(slots * reply / 16) * 16
    batch = {
        "tokens": rng.integers(3, vocab_size, (rows, width)).astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "context_lengths": np.zeros((rows, slots), np.int32),
        "turn_mask": np.zeros((rows, slots), np.float32),
        "target_positions": np.zeros((rows, targets), np.int32),
        "target_ids": rng.integers(3, vocab_size, (rows, targets)).astype(np.int32),
        "target_turns": np.zeros((rows, targets), np.int32),
        "target_mask": np.zeros((rows, targets), np.float32),
        "dialogue_ids": np.arange(rows, dtype=np.int32),
        "turn_ids": np.zeros((rows, slots), np.int32),
    }
    for row in range(rows):
        ends = np.linspace(60, lengths[row], turns[row]).astype(int)
        for turn, end in enumerate(ends):
            batch["context_lengths"][row, turn] = end - reply
            batch["turn_mask"][row, turn] = 1
            here = slice(turn * reply, (turn + 1) * reply)
            batch["target_positions"][row, here] = np.arange(end - reply - 1, end - 1)
            batch["target_turns"][row, here] = turn
            batch["target_mask"][row, here] = 1
    batch["similar"] = np.zeros((rows * slots, rows * slots), bool)
    return batch


def needed_flops(config: DecoderConfig, batch: dict[str, np.ndarray], prompts: int, prompt_length: int) -> float:
    """Forward and input gradients of K rows a dialogue: matrix products, causal attention, vocabulary at targets."""
    leaves = traverse_util.flatten_dict(abstract_params(config)["layers"])
    per_token = 2 * 2 * sum(math.prod(kernel_shape(leaf)) for path, leaf in leaves.items() if path[-1] == "kernel")
    lengths = batch["lengths"].astype(np.float64) + prompt_length
    # Two products forward and four backward over half of the square.
    attention = 6 * 2 * config.num_layers * config.num_attention_heads * config.head_dim * np.sum(lengths**2) / 2
    head = 2 * 2 * config.vocab_size * (config.embedding_size or config.hidden_size) * batch["target_mask"].sum()
    return prompts * (per_token * lengths.sum() + attention + head)


def measure(name: str, rows: int, remat: str, arguments: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """One model's train step."""
    config = default_config()
    config.model.dtype, config.model.remat = arguments.dtype, remat
    config.model.max_logit_rows = arguments.max_logit_rows
    config.bank.num_prompts, config.bank.prompt_length = arguments.prompts, 1 if name.startswith("llama") else 8
    mesh = make_mesh()
    lm = load_lm(f"shape:{name}", dtype=arguments.dtype, remat=remat, sharding_for=partial(parameter_sharding, mesh))
    model, optimizer = describe(config, lm.config, mesh), make_optimizer(config.optimizer, 100)
    state = init_state(model.init(jax.random.key(0), lm.params), optimizer, mesh)
    step = make_train_step(model, objective_of(config), optimizer, mesh)
    batch = draw_batch(rows, lm.config.vocab_size)
    placed = jax.device_put(batch)
    begun = time.perf_counter()
    compiled = step.lower(state, lm.params, placed).compile()
    compilation = time.perf_counter() - begun
    memory = compiled.memory_analysis()

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, lm.params, placed)
        return metrics["loss/total"]

    took = seconds(run, arguments.steps)
    flops = needed_flops(lm.config, batch, arguments.prompts, config.bank.prompt_length)
    turns = float(batch["turn_mask"].sum())
    return {
        "model": name,
        "rows": rows,
        "remat": remat,
        "step_seconds": took,
        "turns_per_second": turns / took,
        "utilisation": flops / took / ceiling,
        "needed_tflops": flops / 1e12,
        "convai2_epoch_seconds": CONVAI2_TURNS / turns * took,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "argument_gigabytes": memory.argument_size_in_bytes / 1e9,
        "compilation_seconds": compilation,
    }


def main() -> None:
    """Measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["smollm2-135m:32:none", "opt-125m:32:none", "opt-2.7b:8:full", "llama2-7b:8:full"]
    parser.add_argument("--models", nargs="+", default=default, help="NAME:ROWS:REMAT")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=4, help="K")
    parser.add_argument("--steps", type=int, default=10, help="steps timed; the median counts")
    parser.add_argument("--max_logit_rows", type=int, default=4096)
    parser.add_argument("--product", type=int, default=8192, help="size of the product whose rate is the ceiling")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    found = ceilings(arguments.product)
    print(f"{device.device_kind}, jax {jax.__version__}, {arguments.dtype}")
    print(f"ceilings: {found['flops_per_second'] / 1e12:.1f} TFLOP/s, {found['bytes_per_second'] / 1e9:.0f} GB/s")
    print(
        f"{'model':<16}{'rows':>5} {'remat':<6}{'s/step':>9}{'turns/s':>10}{'MFU':>8}{'epoch s':>9}{'GB':>7}"
        f"{'compile':>9}"
    )
    results = []
    for spec in arguments.models:
        name, rows, remat = spec.split(":")
        try:
            r = measure(name, int(rows), remat, arguments, found["flops_per_second"])
        except jax.errors.JaxRuntimeError as error:
            print(f"{name:<16}{rows:>5} {remat:<6}  {str(error).splitlines()[0][:90]}", flush=True)
            continue
        results.append(r)
        print(
            f"{name:<16}{rows:>5} {remat:<6}{r['step_seconds']:>9.4f}{r['turns_per_second']:>10.1f}"
            f"{r['utilisation']:>8.1%}{r['convai2_epoch_seconds']:>9.1f}"
            f"{r['temporary_gigabytes'] + r['argument_gigabytes']:>7.1f}{r['compilation_seconds']:>8.1f}s",
            flush=True,
        )
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "ceilings": found, "models": results}))


if __name__ == "__main__":
    main()
