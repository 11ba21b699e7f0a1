"""How many replies a second does the engine give, beside transformers' ``generate`` with soft prompts?

    python benchmarks/generate.py --shape=opt-125m
    python benchmarks/generate.py --shape=small --rounds=5

Float32 on the CPU, 2 threads, K = 4, P = 8, a batch of 16 rows that select among the prompts, contexts of about 241
tokens (random ids: what they say changes no time), greedy, 32 new tokens in every row on all sides. One random OPT,
written by transformers, serves four runs:

- ``ours``: the engine, every row behind its own prompt.
- ``authors``: as the authors' program does: transformers' ``generate`` of the whole batch once for each distinct prompt
  among its rows; every row keeps its own prompt's reply.
- ``ours_single`` and ``single``: one prompt for all rows, on either side one call.

First the replies of all runs are compared, which also compiles and warms them; where a row differs, two tokens must
have been nearly equally likely, else the program stops with no time measured. Then the runs take turns. Ratios are of
medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arguments import positive

SIZES = {"opt-125m": (16, 241, 32), "small": (16, 241, 32), "tiny": (4, 20, 5)}
"""Rows, mean tokens of a context, and new tokens."""
SPREAD = 0.06
"""Contexts are up to so much longer or shorter than the mean."""
NEAR_TIE = 1e-3
"""A logit of float32 differs by less from one program to another."""
RUNS = ("ours", "authors", "ours_single", "single")

Replies = list[list[int]]


def make_rows(rows: int, mean: int, vocabulary: int, prompts: int) -> tuple[Replies, list[int]]:
    """Contexts of random tokens, the special ones left out, and the prompt of each, all of them in turn."""
    rng = np.random.default_rng(0)
    spread = int(mean * SPREAD)
    lengths = np.linspace(mean - spread, mean + spread, rows).round().astype(int)
    contexts = [rng.integers(4, vocabulary, length).tolist() for length in rng.permutation(lengths)]
    return contexts, [row % prompts for row in range(rows)]


class Ours:
    """The engine on a folder of transformers.

    Args:
        folder: Holds the LM.
        bank: float32 ``[K, P, M]``.
        new: Tokens of every reply.
        length_multiple: See `GenerationEngine`.
    """

    def __init__(self, folder: Path, bank: np.ndarray, new: int, length_multiple: int) -> None:
        import jax.numpy as jnp

        from spt_jax.generation.decoding import Decoding
        from spt_jax.generation.engine import GenerationEngine
        from spt_jax.models.families.registry import family_of_hf
        from spt_jax.models.files.weight_files import weights_of_folder
        from spt_jax.models.weights import load_params

        fields = json.loads((folder / "config.json").read_text())
        family = family_of_hf(fields, str(folder))
        config = family.config_from_hf(fields, str(folder))
        params = load_params(config, weights_of_folder(folder), family.hf_tensors)
        self.engine = GenerationEngine(
            config, params, eos_ids=[fields["eos_token_id"]], pad_id=1, length_multiple=length_multiple
        )
        self.bank, self.new, self.decoding = jnp.asarray(bank), new, Decoding(min_new_tokens=new)

    def replies(self, contexts: Replies, selected: Sequence[int]) -> Replies:
        """New tokens of every row."""
        return self.engine.generate(self.bank, contexts, selected, max_new_tokens=self.new, decoding=self.decoding)


class Theirs:
    """transformers' ``generate``, soft prompt and text as input embeddings, padded on the left.

    Args:
        lm: An LM of transformers, in evaluation mode.
        bank: float32 ``[K, P, M]``.
        pad_id: What rows are padded with.
        options: Of ``generate``.
    """

    def __init__(self, lm: Any, bank: np.ndarray, pad_id: int, **options: Any) -> None:
        import torch

        self.lm, self.torch, self.bank = lm, torch, torch.tensor(bank)
        self.pad_id, self.options = pad_id, options

    def generated(self, contexts: Replies, prompt: int, **options: Any) -> Any:
        """One call for all rows behind one prompt."""
        torch = self.torch
        width = max(map(len, contexts))
        tokens = torch.tensor([[self.pad_id] * (width - len(context)) + context for context in contexts])
        real = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
        front = self.bank[prompt].expand(len(contexts), -1, -1)
        with torch.no_grad():
            return self.lm.generate(
                inputs_embeds=torch.cat([front, self.lm.get_input_embeddings()(tokens)], dim=1),
                attention_mask=torch.cat([torch.ones(front.shape[:2], dtype=real.dtype), real], dim=1),
                do_sample=False,
                **self.options,
                **options,
            )

    def replies(self, contexts: Replies, selected: Sequence[int]) -> Replies:
        """New tokens of every row, a call for each distinct prompt."""
        found = {prompt: self.generated(contexts, prompt).tolist() for prompt in sorted(set(selected))}
        return [found[prompt][row] for row, prompt in enumerate(selected)]

    def checked(self, contexts: Replies, selected: Sequence[int]) -> tuple[Replies, np.ndarray]:
        """As `replies`, and for each row and token how far apart the two best logits were, ``[rows, new]``."""
        rows, margins = [], []
        found = {
            prompt: self.generated(contexts, prompt, return_dict_in_generate=True, output_scores=True)
            for prompt in sorted(set(selected))
        }
        for row, prompt in enumerate(selected):
            best = self.torch.stack([scores[row] for scores in found[prompt].scores]).topk(2).values
            rows.append(found[prompt].sequences[row].tolist())
            margins.append((best[:, 0] - best[:, 1]).numpy())
        return rows, np.asarray(margins)


def compare(ours: Replies, theirs: Replies, margins: np.ndarray) -> tuple[int, int]:
    """How many rows are the same, and how many part at two tokens that were nearly equally likely.

    Raises:
        SystemExit: A row differs for no such reason.
    """
    ties = 0
    for row, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        if found == expected:
            continue
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        if margins[row, place] >= NEAR_TIE:
            sys.exit(
                f"Row {row} differs at token {place}, {found[place]} instead of {expected[place]}, where the best two "
                f"logits are {margins[row, place]:.1e} apart, so no time is measured."
            )
        ties += 1
    return len(ours) - ties, ties


def measure(runs: Mapping[str, Callable[[], Replies]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in `rounds` rounds, every other one in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            begun = time.perf_counter()
            count = len(runs[name]())
            seconds[name].append(time.perf_counter() - begun)
            print(f"round {number + 1} {name:<12} {count} replies in {seconds[name][-1]:>7.3f} s", flush=True)
    return seconds


def table(seconds: Mapping[str, Sequence[float]], rows: int) -> str:
    """A line a run: replies a second, and how many times as fast ours is at the same task."""
    lines = [f"{'run':<12} " + " ".join(f"{name:>10}" for name in ("replies/s", "slowest", "fastest", "ours is"))]
    for name, found in seconds.items():
        own = seconds["ours_single" if name.endswith("single") else "ours"]
        speeds = rows / statistics.median(found), rows / max(found), rows / min(found)
        ratio = statistics.median(found) / statistics.median(own)
        lines.append(f"{name:<12} " + " ".join(f"{speed:>10.3f}" for speed in speeds) + f" {ratio:>9.2f}×")
    return "\n".join(lines)


def summary(
    options: argparse.Namespace, seconds: Mapping[str, Sequence[float]], same: int, ties: int
) -> dict[str, Any]:
    """The last line."""
    from machine import machine
    from train_step_setup import NUM_PROMPTS, PROMPT_LENGTH

    median = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "shape": options.shape,
        "ratio": median["authors"] / median["ours"],
        "ratio_single": median["single"] / median["ours_single"],
        "replies_per_second": {name: options.rows / value for name, value in median.items()},
        "rounds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "rows": options.rows,
        "context_tokens": options.tokens,
        "new_tokens": options.new,
        "prompts": NUM_PROMPTS,
        "prompt_length": PROMPT_LENGTH,
        "same_rows": same,
        "near_ties": ties,
        "threads": options.threads,
        "dtype": "float32",
        **machine("torch", "transformers"),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SIZES), default="small", help="sizes of the LM; tiny is for tests")
    parser.add_argument("--rows", type=positive, help="rows of the batch")
    parser.add_argument("--tokens", type=positive, help="mean tokens of a context")
    parser.add_argument("--new", type=positive, help="new tokens of every row")
    parser.add_argument("--rounds", type=positive, default=3, help="times that every run is measured")
    parser.add_argument("--threads", type=positive, default=2, help="cores and threads of every side")
    parser.add_argument("--length_multiple", type=positive, default=32, help="our widths are multiples of it")
    options = parser.parse_args(arguments)
    rows, tokens, new = SIZES[options.shape]
    options.rows, options.tokens, options.new = options.rows or rows, options.tokens or tokens, options.new or new
    return options


def main(options: argparse.Namespace) -> None:
    """Compares the replies, measures, prints a table and one line of JSON.

    Raises:
        SystemExit: The replies differ.
    """
    from train_step_setup import NUM_PROMPTS, lm_fields, write_initial, write_lm
    from transformers import OPTForCausalLM

    with tempfile.TemporaryDirectory(prefix="generate-") as name:
        folder = Path(name)
        fields = lm_fields(options.shape)
        write_lm(folder, fields)
        write_initial(folder, fields["hidden_size"])
        bank = np.load(folder / "initial.npz")["bank"]
        contexts, mixed = make_rows(options.rows, options.tokens, fields["vocab_size"], NUM_PROMPTS)
        ours = Ours(folder, bank, options.new, options.length_multiple)
        lm = OPTForCausalLM.from_pretrained(folder, dtype="float32").eval()
        theirs = Theirs(lm, bank, 1, max_new_tokens=options.new, min_new_tokens=options.new)
    same = ties = 0
    alone = [0] * options.rows
    for selected in (mixed, alone):
        expected, margins = theirs.checked(contexts, selected)
        counts = compare(ours.replies(contexts, selected), expected, margins)
        same, ties = same + counts[0], ties + counts[1]
    print(
        f"{options.shape}, float32, {options.threads} threads: {same} of {same + ties} rows are the same, {ties} ties"
    )
    runs = {
        "ours": lambda: ours.replies(contexts, mixed),
        "authors": lambda: theirs.replies(contexts, mixed),
        "ours_single": lambda: ours.replies(contexts, alone),
        "single": lambda: theirs.replies(contexts, alone),
    }
    seconds = measure(runs, options.rounds)
    print(table(seconds, options.rows))
    print(json.dumps(summary(options, seconds, same, ties)))


if __name__ == "__main__":
    parsed = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA has as many threads as cores it may use, and asks when it is first imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: parsed.threads])
    import torch

    torch.set_num_threads(parsed.threads)
    main(parsed)
