"""How much is there to gain by choosing a prompt, and how much of it does the retriever get?

    python benchmarks/selection.py runs/spt/seed_0 runs/spt/seed_1

Reads the ``predictions.jsonl`` that `spt-jax evaluate` leaves and compares perplexities per token: under each single
prompt, under the retriever's choice, under the best prompt of each turn and of each dialogue in hindsight, and under
the prompt that was best on the first half of a dialogue's turns, measured on its second half. The last tells whether
the best prompt is a property of the persona or chance. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def read(run: Path) -> dict[str, np.ndarray]:
    """Dialogue ``[U]``, target tokens ``[U]``, mean nll ``[U, K]`` and selected prompt ``[U]`` of answered turns."""
    path = run / "predictions.jsonl"
    if not path.is_file():
        sys.exit(f"selection: there is no {path}; spt-jax evaluate --workdir={run} writes it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    fields = {"dialogue": "dialogue", "tokens": "target_tokens", "nll": "nll", "selected": "selected"}
    return {name: np.asarray([row[field] for row in rows]) for name, field in fields.items()}


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Of mean nlls ``[U]`` over tokens ``[U]``."""
    return float(np.exp(np.sum(nll * tokens) / np.sum(tokens)))


def chosen(nll: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The nll ``[U]`` under a prompt for each turn."""
    return np.take_along_axis(nll, prompts[:, None], axis=1)[:, 0]


def best_of_dialogues(turns: dict[str, np.ndarray], counted: np.ndarray) -> np.ndarray:
    """For every turn the prompt with the least total nll over its dialogue's `counted` turns."""
    total = turns["nll"] * (turns["tokens"] * counted)[:, None]
    _, place = np.unique(turns["dialogue"], return_inverse=True)
    sums = np.zeros((place.max() + 1, total.shape[1]))
    np.add.at(sums, place, total)
    return sums.argmin(axis=1)[place]


def first_halves(dialogue: np.ndarray) -> np.ndarray:
    """Whether each turn lies in the first half of its dialogue."""
    order = np.zeros(len(dialogue), int)
    for d in np.unique(dialogue):
        mine = np.flatnonzero(dialogue == d)
        order[mine] = np.arange(len(mine)) < len(mine) // 2
    return order.astype(bool)


def headroom(turns: dict[str, np.ndarray]) -> dict[str, Any]:
    """The perplexities, and how often the retriever names the best prompt of a turn."""
    nll, tokens = turns["nll"], turns["tokens"]
    first = first_halves(turns["dialogue"])
    second = {name: values[~first] for name, values in turns.items()}
    foreseen = best_of_dialogues(turns, first)[~first]
    return {
        "each prompt": [perplexity(nll[:, k], tokens) for k in range(nll.shape[1])],
        "retriever": perplexity(chosen(nll, turns["selected"]), tokens),
        "best of the turn": perplexity(nll.min(axis=1), tokens),
        "best of the dialogue": perplexity(chosen(nll, best_of_dialogues(turns, np.ones(len(tokens)))), tokens),
        "second halves, best of the first half": perplexity(chosen(second["nll"], foreseen), second["tokens"]),
        "second halves, any prompt": perplexity(second["nll"].mean(axis=1), second["tokens"]),
        "agreement with the best of the turn": float(np.mean(turns["selected"] == nll.argmin(axis=1))),
        "agreement by chance": 1 / nll.shape[1],
    }


def main() -> None:
    """Prints one column a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="working directories of evaluated runs")
    found = {str(run): headroom(read(run)) for run in parser.parse_args().runs}
    for name in next(iter(found.values())):
        values = [column[name] for column in found.values()]
        cells = [
            " / ".join(f"{x:.2f}" for x in value) if isinstance(value, list) else f"{value:.3f}" for value in values
        ]
        print(f"{name:<40}" + "".join(f"{cell:>32}" for cell in cells))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
