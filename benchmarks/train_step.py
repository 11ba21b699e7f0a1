"""How many turns a second does a train step learn from, beside the authors' way and the strongest rivals in torch?

    python benchmarks/train_step.py --shape=opt-125m --data=valid_self_original_no_cands.txt --tokenizer=OPT_FOLDER
    python benchmarks/train_step.py --shape=small

Float32 on the CPU, 2 threads, or with ``--device=gpu`` bfloat16 on a GPU; K = 4, P = 8, the paper's losses for
OPT-125M, Adam. One random LM serves four sides:

- ``ours``: packed dialogues through `spt_jax.data.loader` and `spt_jax.training.step`.
- ``authors``: their way in torch, transformers and PEFT: turn rows padded to 512, 2 a step on the CPU, K forward passes
  with gradient checkpointing, eager attention, logits of the whole vocabulary at every position.
- ``strong``: turn rows by length, no padding beyond the batch, prompts folded into the batch, no checkpointing, fused
  attention, logits at target positions.
- ``strong_packed``: the same on our packed rows.

The dialogues timed are such as share a batch in an epoch of ConvAI2's whole training set: groups of neighbours by
length from equal parts of all lengths, and for us the buckets of that epoch. First the losses and gradients of all
sides are compared on the same turns; if a loss differs by more than 1e-4 the program stops with no time measured. Then
each side whose batch is free tries a few sizes and keeps the fastest, and the sides take turns, each alone in a fresh
process: a round is one epoch over the same dialogues (of the authors' side a step or two). Only real turns count.
Ratios are of medians. Memory is the peak of a side's process from its start to its last step. BLEU is computed
beforehand for the rivals and by the loader for us. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arguments import positive
from machine import machine
from train_step_setup import GROUP, SHAPES, prepared
from train_step_workers import SIDES, Side, Worker

from spt_jax.errors import UserError

ALLOWED_DIFFERENCE = {"cpu": 1e-4, "gpu": 2e-2}
"""Relative, of a loss: in float32, and in bfloat16."""
AUTHORS_BATCH = 2
LOSSES = ("lm", "selection", "contrastive", "fusion", "total")
TRIED = {
    "cpu": {"ours": (4, 8, 16), "authors": (AUTHORS_BATCH,), "strong": (8, 16, 32), "strong_packed": (2, 4, 8)},
    "gpu": {"ours": (32, 64), "authors": (8, 16, 32), "strong": (128, 256), "strong_packed": (32, 64)},
}
"""Rows of a step that a side may choose from."""
SIZES = {"opt-125m": (16, 3, 1), "small": (32, 5, 2), "tiny": (4, 1, 1)}
"""Dialogues, rounds, and the authors' steps a round, where they are not asked for."""
GPU_SIZES = (128, 2, 8)
"""The same on a GPU."""
PUBLISHED = {"opt-125m": (0.061, 5.0), "small": (0.24, 3.8)}
"""The authors' own program on ConvAI2, 2 cores, float32, batch 2, padded to 512: turns a second and GB."""
EXPLAINED = 0.15
RATIOS = {"authors": "ratio", "strong": "ratio_strong", "strong_packed": "ratio_strong_packed"}
"""What the last line calls our speed over each of the others'."""
MULTIPLIERS = {"ours": "xla", "authors": "torch"}
"""Whose matrix product each of these sides uses."""

Start = Callable[..., contextlib.AbstractContextManager[Side]]
"""Starts a side: ``(side, folder, batch, threads, checking=False, device="cpu")``."""


def compare_losses(
    folder: Path, threads: int, start: Start, sides: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Every side's losses on the same turns, and the largest relative difference of its gradients from ours."""
    losses = {}
    for side in sides:
        with start(side, folder, AUTHORS_BATCH, threads, checking=True) as worker:
            losses[side] = worker.check()
    gradients = {side: dict(np.load(folder / f"gradients_{side}.npz")) for side in sides}
    ours = gradients["ours"]
    differences = {
        side: float(np.max([np.abs(found[x] - ours[x]).max() / np.abs(ours[x]).max() for x in ours]))
        for side, found in gradients.items()
    }
    return losses, differences


def loss_difference(losses: Mapping[str, Mapping[str, float]]) -> float:
    """The largest relative difference between ours and any other side's, over all losses; NaN where one is."""
    ours = losses["ours"]
    differences = [
        abs(found[name] - ours[name]) / max(abs(ours[name]), 1e-12) for found in losses.values() for name in LOSSES
    ]
    return float(np.max(differences))


def choose_batches(
    folder: Path, threads: int, start: Start, given: Mapping[str, int], dialogues: int, tried: Mapping[str, Any]
) -> dict[str, int]:
    """Rows of a step of every side: those given, else the fastest of those tried that the dialogues can fill."""
    batches = dict(given)
    for side, sizes in tried.items():
        if side in batches:
            continue
        if side in ("ours", "strong_packed"):  # whose rows are dialogues
            sizes = [size for size in sizes if size <= dialogues] or [dialogues]
        if len(sizes) == 1:
            [batches[side]] = sizes
            continue
        speeds = {}
        for size in sizes:
            try:
                with start(side, folder, size, threads) as worker:
                    [speeds[size]] = rates([worker.probe()])
            except RuntimeError as error:  # on a GPU the most rows may be too many; why is on standard error
                print(f"{side:<14} {size:>3} rows a step: {error}", flush=True)
                continue
            print(f"{side:<14} {size:>3} rows a step: {speeds[size]:.3f} turns/s", flush=True)
        if not speeds:
            tried_rows = ", ".join(map(str, sizes))
            sys.exit(f"{side}: no step of {tried_rows} rows could be measured; give fewer by --batch {side}=ROWS")
        batches[side] = max(speeds, key=lambda size: speeds[size])
    return batches


def measure(
    folder: Path, threads: int, start: Start, batches: Mapping[str, int], rounds: int, authors_steps: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, int], dict[str, float]]:
    """`rounds` rounds in which the sides take turns, each in a fresh process; every other round in the opposite order.

    Returns:
        Each side's runs, its peak memory in bytes, and the rate of a large matrix product under XLA and torch.
    """
    sides = [side for side in SIDES if side in batches]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    memory = dict.fromkeys(sides, 0)
    products: dict[str, float] = {}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            # Alone on the machine: beside the memory of the other sides, the one that needs most would be slowed most.
            with start(side, folder, batches[side], threads) as worker:
                worker.warm_up()
                found = worker.run(authors_steps if side == "authors" else 0)
                memory[side] = max(memory[side], getattr(worker, "peak_memory", 0))
                if number == rounds - 1 and side in MULTIPLIERS:
                    # Last, since the product's operands would count.
                    products[MULTIPLIERS[side]] = worker.product()
            runs[side].append(found)
            print(
                f"round {number + 1} {side:<14} {found['turns']:>5.0f} turns in {found['seconds']:>7.2f} s: "
                f"{found['turns'] / found['seconds']:.3f} turns/s",
                flush=True,
            )
    return runs, memory, products


def loss_table(losses: Mapping[str, Mapping[str, float]], gradients: Mapping[str, float]) -> str:
    """A line a side."""
    lines = [f"{'side':<14} " + " ".join(f"{name:>12}" for name in LOSSES) + f" {'gradients':>12}"]
    for side, found in losses.items():
        lines.append(
            f"{side:<14} " + " ".join(f"{found[name]:>12.7f}" for name in LOSSES) + f" {gradients[side]:>12.1e}"
        )
    return "\n".join(lines)


def rates(runs: Sequence[Mapping[str, float]]) -> list[float]:
    """Turns a second of every run."""
    return [run["turns"] / run["seconds"] for run in runs]


def core_seconds(runs: Sequence[Mapping[str, float]]) -> float:
    """Seconds of all cores together a turn: hardly changed by what else the machine does, if it takes cores alone."""
    return sum(run["core_seconds"] for run in runs) / sum(run["turns"] for run in runs)


def time_table(
    runs: Mapping[str, Sequence[Mapping[str, float]]], memory: Mapping[str, int], batches: Mapping[str, int]
) -> str:
    """A line a side: turns a second, how many times as fast ours is, work a turn, and memory."""
    columns = ("turns/s", "slowest", "fastest", "ours is", "cores·s/turn", "peak GB")
    lines = [f"{'side':<14} {'rows':>4} " + " ".join(f"{column:>12}" for column in columns)]
    ours = statistics.median(rates(runs["ours"]))
    for side, found in runs.items():
        speeds = rates(found)
        median = statistics.median(speeds)
        lines.append(
            f"{side:<14} {batches[side]:>4} {median:>12.3f} {min(speeds):>12.3f} {max(speeds):>12.3f} "
            f"{ours / median:>11.2f}× {core_seconds(found):>12.3f} {memory[side] / 1e9:>12.2f}"
        )
    return "\n".join(lines)


def beside_published(shape: str, speed: float, memory: int, products: Mapping[str, float]) -> str:
    """The authors' way as measured here beside the figures of their own program, and why they may differ."""
    published, gigabytes = PUBLISHED[shape]
    text = (
        f"authors: {speed:.4f} turns/s and {memory / 1e9:.1f} GB here; their own program on 2 cores: {published} "
        f"turns/s and {gigabytes} GB."
    )
    away = speed / published - 1
    if abs(away) > EXPLAINED:
        text += (
            f" That is {abs(away):.0%} {'faster' if away > 0 else 'slower'}: a matrix product ran at "
            f"{products['torch'] / 1e9:.0f} GFLOP/s in torch and {products['xla'] / 1e9:.0f} under XLA when this run "
            f"ended (2 undisturbed cores there: 155 to 180), the load average was {os.getloadavg()[0]:.1f}, and the "
            "program is ours, with one cross-entropy a prompt and no work beside the losses."
        )
    return text


def summary(
    options: argparse.Namespace,
    turns: Mapping[str, Any],
    losses: Mapping[str, Mapping[str, float]],
    gradients: Mapping[str, float],
    batches: Mapping[str, int],
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    memory: Mapping[str, int],
    products: Mapping[str, float],
) -> dict[str, Any]:
    """The last line."""
    speed = {side: statistics.median(rates(found)) for side, found in runs.items()}
    ours = runs["ours"]
    return {
        "shape": options.shape,
        **{RATIOS[side]: speed["ours"] / speed[side] for side in speed if side != "ours"},
        "max_loss_difference": loss_difference(losses),
        "max_gradient_difference": max(gradients.values()),
        "peak_memory": dict(memory),
        "memory_ratio": memory["ours"] / max(memory["authors"], 1),
        "turns_per_second": speed,
        "rounds": {side: [round(rate, 4) for rate in rates(found)] for side, found in runs.items()},
        "core_seconds_per_turn": {side: core_seconds(found) for side, found in runs.items()},
        "input_wait": sum(run["wait"] for run in ours) / sum(run["seconds"] for run in ours),
        "batches": dict(batches),
        "losses": losses["ours"],
        "turns": dict(turns),
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "product_flops_per_second": dict(products),
        **machine("safetensors", "torch", "transformers", "peft"),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="sizes of the LM; tiny is for tests")
    parser.add_argument("--data", default="builtin:train", help="dialogues, such as ConvAI2's file in ParlAI's format")
    parser.add_argument(
        "--tokenizer", default="", help="folder or source of a tokenizer, or bytes; default: SmolLM2's, else bytes"
    )
    parser.add_argument("--dialogues", type=positive, help="so many dialogues are timed")
    parser.add_argument("--turns", type=positive, default=12, help="turns, of 3 dialogues, to compare losses on")
    parser.add_argument("--rounds", type=positive, help="times that every side is measured")
    parser.add_argument("--authors_steps", type=positive, help="steps of the authors' side in a round")
    parser.add_argument("--threads", type=positive, default=2, help="cores and threads of every side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="ours and some of the others")
    parser.add_argument("--folder", default="", help="what the sides share is kept here, and taken from here if it is")
    parser.add_argument("--device", choices=tuple(TRIED), default="cpu", help="cpu in float32, or gpu in bfloat16")
    parser.add_argument("--batch", nargs="*", default=[], metavar="SIDE=ROWS", help="instead of trying a few sizes")
    options = parser.parse_args(arguments)
    dialogues, rounds, steps = SIZES[options.shape] if options.device == "cpu" else GPU_SIZES
    options.dtype = "float32" if options.device == "cpu" else "bfloat16"
    options.group = GROUP if options.device == "cpu" else max(TRIED["gpu"]["ours"])
    for name, default in {"dialogues": dialogues, "rounds": rounds, "authors_steps": steps}.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    free = [side for side, sizes in TRIED[options.device].items() if len(sizes) > 1]
    given = {}
    for text in options.batch:
        side, _, rows = text.partition("=")
        if side not in free or not rows.isdigit() or int(rows) < 1:
            parser.error(f"--batch: {text!r} is not a side of {', '.join(free)} with its rows, such as ours=8")
        if side not in options.sides:
            parser.error(f"--batch: {side} is not among --sides {' '.join(options.sides)}")
        given[side] = int(rows)
    options.batch = given
    if not {"ours", "authors"} <= set(options.sides):
        parser.error("--sides: ours and authors are always among them")
    return options


def main(options: argparse.Namespace, start: Start = Worker) -> None:
    """Writes what the sides share, compares their losses, measures, prints tables and one line of JSON.

    Raises:
        SystemExit: The losses differ by more than `ALLOWED_DIFFERENCE`.
    """
    start = functools.partial(start, device=options.device)
    with tempfile.TemporaryDirectory(prefix="train_step-") as name:
        folder = Path(options.folder or name)
        turns = prepared(folder, options)
        print(f"{options.shape}, {options.dtype}, {options.threads} threads, {turns}")
        losses, gradients = compare_losses(folder, options.threads, start, options.sides)
        print(loss_table(losses, gradients), flush=True)
        difference = loss_difference(losses)
        print(f"largest relative difference of a loss: {difference:.1e}")
        allowed = ALLOWED_DIFFERENCE[options.device]
        if not difference <= allowed:
            sys.exit(f"The losses differ by {difference:.1e} (allowed: {allowed}), so no time is measured.")
        dialogues = turns["dialogues"]
        tried = {side: TRIED[options.device][side] for side in options.sides}
        batches = choose_batches(folder, options.threads, start, options.batch, dialogues, tried)
        runs, memory, products = measure(folder, options.threads, start, batches, options.rounds, options.authors_steps)
    line = summary(options, turns, losses, gradients, batches, runs, memory, products)
    print(time_table(runs, memory, batches))
    if options.shape in PUBLISHED and options.device == "cpu":
        print(beside_published(options.shape, line["turns_per_second"]["authors"], memory["authors"], products))
    print(f"ours waited {line['input_wait']:.2%} of its time for the loader")
    print(json.dumps(line))


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"train_step: {error}")
