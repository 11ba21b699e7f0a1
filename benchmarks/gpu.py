"""How much of a GPU does a train step use? Its model FLOP utilisation of the ceiling measured in the same run.

    python benchmarks/gpu.py --data=train_self_original.txt --tokenizer=OPT_FOLDER
    python benchmarks/gpu.py --models smollm2-135m:32 opt-2.7b:16:full --epoch smollm2-135m:64

A model is NAME:ROWS[:REMAT], of `spt_jax.models.shapes` with random weights. The data are repeated to the length of
ConvAI2's training set, 17,878 dialogues, and go through the package's loader; timed is a batch of ROWS dialogues, of
the epoch's middle shape, behind each of K prompts. Counted is the arithmetic that the method needs: forward, and
gradients with respect to activations, of K rows a dialogue, real tokens alone; recomputation, padding, and the masked
half of attention are not counted. `--epoch` trains one epoch of that set for real, in steps of all its shapes, and adds
up the steps' time, compilation left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arguments import positive
from flax import traverse_util
from machine import machine
from train_step_setup import EPOCH, read_turns, tokenizer_of

from spt_jax.config import default_config
from spt_jax.data.collate import Batch
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.packing import Row
from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.loading import load_lm
from spt_jax.models.shapes import shape_fields
from spt_jax.models.weights import kernel_shape
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, place_batch
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.remat import POLICIES
from spt_jax.training.step import init_state, make_train_step


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
    b = b * size**-0.5  # so that the result keeps its size, with no work beside the products
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, 10, lambda _, x: x @ b, a))
    large = jnp.ones((size * size * 8,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    return {
        "flops_per_second": 10 * 2 * size**3 / seconds(lambda: product(a, b), 5),
        "bytes_per_second": 2 * large.nbytes / seconds(lambda: copy(large), 5),
    }


def long_epoch(data: str, tokenizer: str) -> tuple[list[Row], list[list[str]], int]:
    """Packed rows of a source, repeated to ConvAI2's length; the text that decides about pairs, a turn; the pad id."""
    found, _ = tokenizer_of(tokenizer, 1 << 20)
    turns = read_turns(data, found)
    count = max(EPOCH, len(turns.packed))
    rows = list(itertools.islice(itertools.cycle(turns.packed), count))
    texts = [[" ".join(turns.dialogues[row.dialogue].persona)] * len(row.turns) for row in rows]
    return rows, texts, found.pad_id


def in_vocabulary(batch: Batch, vocab_size: int) -> Batch:
    """The same batch with tokens that an LM of another vocabulary has."""
    return batch | {name: batch[name] % vocab_size for name in ("tokens", "target_ids")}


def needed_flops(config: DecoderConfig, batch: Batch, prompts: int, prompt_length: int) -> float:
    """Forward and input gradients of K rows a dialogue: matrix products, causal attention, vocabulary at targets."""
    leaves = traverse_util.flatten_dict(abstract_params(config)["layers"])
    per_token = 2 * 2 * sum(math.prod(kernel_shape(leaf)) for path, leaf in leaves.items() if path[-1] == "kernel")
    lengths = batch["lengths"].astype(np.float64) + prompt_length
    # Two products forward and four backward over half of the square.
    attention = 6 * 2 * config.num_layers * config.num_attention_heads * config.head_dim * np.sum(lengths**2) / 2
    head = 2 * 2 * config.vocab_size * (config.embedding_size or config.hidden_size) * batch["target_mask"].sum()
    return prompts * (per_token * lengths.sum() + attention + head)


class Bench:
    """A model of random weights with its train step.

    Args:
        name: Of a shape.
        remat: Policy.
        arguments: The command's.
    """

    def __init__(self, name: str, remat: str, arguments: argparse.Namespace) -> None:
        config = default_config()
        config.model.dtype, config.model.remat = arguments.dtype, remat
        config.model.attention = arguments.attention
        config.model.max_logit_rows = arguments.max_logit_rows
        config.bank.num_prompts, config.bank.prompt_length = arguments.prompts, 1 if name.startswith("llama") else 8
        self.mesh = make_mesh(devices=jax.devices()[:1])
        spread = partial(parameter_sharding, self.mesh)
        lm = load_lm(f"shape:{name}", dtype=arguments.dtype, remat=remat, sharding_for=spread)
        self.prompts, self.prompt_length = config.bank.num_prompts, config.bank.prompt_length
        self.decoder, self.params = lm.config, lm.params
        self.model = describe(config, lm.config, self.mesh)
        optimizer = make_optimizer(config.optimizer, 100)
        self.state = init_state(self.model.init(jax.random.key(0), lm.params), optimizer, self.mesh)
        self.step = make_train_step(self.model, objective_of(config), optimizer, self.mesh)

    def compiled(self, batch: Batch) -> Any:
        """The program for batches of this shape."""
        return self.step.lower(self.state, self.params, jax.eval_shape(lambda: batch)).compile()

    def run(self, compiled: Any, placed: Any) -> jax.Array:
        """One step."""
        self.state, metrics = compiled(self.state, self.params, placed)
        return metrics["loss/total"]


def loader_of(epoch: Any, rows: int, max_buckets: int, pairs: bool) -> DialogueLoader:
    """The package's loader over the long epoch."""
    packed, texts, pad_id = epoch
    texts = texts if pairs else None
    return DialogueLoader(packed, batch_size=rows, pad_id=pad_id, seed=0, max_buckets=max_buckets, pair_texts=texts)


def middle_batch(loader: DialogueLoader) -> Batch:
    """A batch of the shape that the middle step of an epoch has, in order of length."""
    steps = sorted(range(loader.steps_per_epoch), key=lambda step: loader.shape(step).length)
    return loader.batch(steps[len(steps) // 2])


def measure(name: str, rows: int, remat: str, epoch: Any, arguments: argparse.Namespace, ceiling: float) -> Any:
    """One model's train step on a batch of middle length."""
    bench = Bench(name, remat, arguments)
    batch = in_vocabulary(middle_batch(loader_of(epoch, rows, arguments.max_buckets, True)), bench.decoder.vocab_size)
    placed = place_batch(bench.mesh, batch)
    begun = time.perf_counter()
    compiled = bench.compiled(batch)
    compilation = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    took = seconds(lambda: bench.run(compiled, placed), arguments.steps)
    flops = needed_flops(bench.decoder, batch, bench.prompts, bench.prompt_length)
    turns = float(batch["turn_mask"].sum())
    return {
        "model": name,
        "rows": rows,
        "remat": remat,
        "attention": bench.model.decoder.attention_kernel,
        "tokens_a_row": batch["tokens"].shape[1],
        "padding": 1 - float(batch["lengths"].sum() / batch["tokens"].size),
        "step_seconds": took,
        "turns_per_second": turns / took,
        "utilisation": flops / took / ceiling,
        "needed_tflops": flops / 1e12,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "argument_gigabytes": memory.argument_size_in_bytes / 1e9,
        "compilation_seconds": compilation,
    }


def train_epoch(name: str, rows: int, remat: str, epoch: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """One epoch of the long set: seconds of its steps, compilation left out, and of waiting for the loader."""
    bench = Bench(name, remat, arguments)
    loader = loader_of(epoch, rows, arguments.max_buckets, True)
    first = {loader.shape(step): step for step in range(loader.steps_per_epoch)}
    examples = [in_vocabulary(loader.batch(step), bench.decoder.vocab_size) for step in first.values()]
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(examples)) as pool:
        programs = list(pool.map(bench.compiled, examples))
    compilation = time.perf_counter() - begun
    by_shape = {}
    for example, program in zip(examples, programs, strict=True):
        by_shape[example["tokens"].shape + example["target_ids"].shape] = program
        jax.block_until_ready(bench.run(program, place_batch(bench.mesh, example)))
    wait, turns, pending = 0.0, 0.0, None
    batches = loader.iterate(0, loader.steps_per_epoch)
    begun = time.perf_counter()
    for _ in range(loader.steps_per_epoch):
        before = time.perf_counter()
        _, batch = next(batches)
        wait += time.perf_counter() - before
        batch = in_vocabulary(batch, bench.decoder.vocab_size)
        program = by_shape[batch["tokens"].shape + batch["target_ids"].shape]
        loss = bench.run(program, place_batch(bench.mesh, batch))
        if pending is not None:
            jax.block_until_ready(pending)
        pending, turns = loss, turns + float(batch["turn_mask"].sum())
    jax.block_until_ready(pending)
    return {
        "model": name,
        "rows": rows,
        "seconds": time.perf_counter() - begun,
        "wait_seconds": wait,
        "turns": turns,
        "steps": loader.steps_per_epoch,
        "shapes": len(examples),
        "padding": loader.padding_share,
        "compilation_seconds": compilation,
    }


def main() -> None:
    """Measures, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [parts_of(spec) for spec in ("smollm2-135m:64", "opt-125m:64", "opt-2.7b:16", "llama2-7b:8")]
    parser.add_argument("--models", nargs="*", type=parts_of, default=default, help="NAME:ROWS[:REMAT]")
    parser.add_argument("--epoch", type=parts_of, help="NAME:ROWS[:REMAT] that trains a whole epoch")
    parser.add_argument("--data", default="builtin:train", help="dialogues, such as ConvAI2's file in ParlAI's format")
    parser.add_argument("--tokenizer", default="", help="folder or source; default: SmolLM2's, else bytes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--attention", default="auto", choices=("auto", "xla", "cudnn"))
    parser.add_argument("--prompts", type=positive, default=4, help="K")
    parser.add_argument("--steps", type=positive, default=10, help="steps timed; the median counts")
    parser.add_argument("--max_logit_rows", type=positive, default=4096)
    parser.add_argument("--max_buckets", type=positive, default=12)
    parser.add_argument("--product", type=positive, default=8192, help="size of the product whose rate is the ceiling")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    found = ceilings(arguments.product)
    print(f"{device.device_kind}, jax {jax.__version__}, {arguments.dtype}")
    print(f"ceilings: {found['flops_per_second'] / 1e12:.1f} TFLOP/s, {found['bytes_per_second'] / 1e9:.0f} GB/s")
    epoch = long_epoch(arguments.data, arguments.tokenizer)
    print(
        f"{'model':<16}{'rows':>5} {'remat':<6}{'attention':<10}{'s/step':>9}{'turns/s':>10}{'MFU':>8}{'padding':>9}"
        f"{'GB':>7}{'compile':>9}"
    )
    results = []
    for name, rows, remat in arguments.models:
        try:
            r = measure(name, rows, remat, epoch, arguments, found["flops_per_second"])
        except jax.errors.JaxRuntimeError as error:
            print(f"{name:<16}{rows:>5} {remat:<6}  {str(error).splitlines()[0][:90]}", flush=True)
            continue
        results.append(r)
        print(
            f"{name:<16}{rows:>5} {remat:<6}{r['attention']:<10}{r['step_seconds']:>9.4f}{r['turns_per_second']:>10.1f}"
            f"{r['utilisation']:>8.1%}{r['padding']:>9.1%}"
            f"{r['temporary_gigabytes'] + r['argument_gigabytes']:>7.1f}{r['compilation_seconds']:>8.1f}s",
            flush=True,
        )
    line = {"device": device.device_kind, "jax": jax.__version__, "ceilings": found, "models": results}
    line["machine"] = machine()
    if arguments.epoch:
        line["epoch"] = e = train_epoch(*arguments.epoch, epoch, arguments)
        print(
            f"an epoch of {EPOCH:,} dialogues, {e['turns']:,.0f} turns, with {e['model']}: {e['seconds']:.1f} s of "
            f"{e['steps']} steps ({e['wait_seconds']:.1f} s of them waiting for the loader), {e['padding']:.1%} "
            f"padding in {e['shapes']} shapes, compiled before in {e['compilation_seconds']:.0f} s"
        )
    print(json.dumps(line))


def parts_of(spec: str) -> tuple[str, int, str]:
    """NAME, ROWS and REMAT.

    Raises:
        argparse.ArgumentTypeError: They are not what is allowed.
    """
    name, *rest = spec.split(":")
    rows, remat = (*rest, "none")[:2] if rest else ("", "")
    try:
        shape_fields(f"shape:{name}")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(rest) > 2 or not rows.isdecimal() or int(rows) < 1 or remat not in POLICIES:
        raise argparse.ArgumentTypeError(
            f"{spec!r} is not NAME:ROWS[:REMAT] with 1 row or more and REMAT of {', '.join(POLICIES)}"
        )
    return name, int(rows), remat


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"gpu: {error}")
