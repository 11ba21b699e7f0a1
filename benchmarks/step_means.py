"""What does each means of the train step save, and what does each loss cost?

    python benchmarks/step_means.py --shape=small
    python benchmarks/step_means.py --shape=opt-125m --rows=4 --rounds=3

The train step on one batch of ConvAI2's proportions, as it is and with one thing changed: its state not donated, every
logit at once, each policy of rematerialisation, bfloat16, and without one loss each. All take turns, a figure is the
median of the rounds. Memory is what the compiler finds that the program needs, its arguments included. Random weights,
the CPU's two threads or one GPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
from arguments import positive
from drawn_batch import draw_batch
from machine import machine
from train_step_setup import SHAPES, lm_fields

from spt_jax.config import default_config
from spt_jax.models.families.registry import family_of_hf
from spt_jax.models.frozen_tree import random_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.remat import program_memory, with_remat
from spt_jax.training.step import init_state, make_train_step

AS_IT_IS = "as it is"


@dataclasses.dataclass(frozen=True)
class Means:
    """A step with one thing changed.

    Attributes:
        options: Of the configuration, by flat name.
        remat: What the backward pass computes again.
        donated: Whether the new state takes the place of the old one.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remat: str = "none"
    donated: bool = True


MEANS = {
    AS_IT_IS: Means(),
    "state not donated": Means(donated=False),
    "all logits at once": Means({"model.max_logit_rows": 1 << 20}),
    "remat dots": Means(remat="dots"),
    "remat full": Means(remat="full"),
    "bfloat16": Means({"model.dtype": "bfloat16"}),
    "without the fusion loss": Means({"objective.fusion_weight": 0.0}),
    "without the selection loss": Means({"objective.selection_weight": 0.0}),
    "without the contrastive loss": Means({"objective.contrastive_weight": 0.0}),
}


class Step:
    """The step of one `Means`, compiled, with arrays of its own.

    Args:
        shape: Of `SHAPES`.
        rows: Dialogues of the batch.
        means: What is changed.

    Attributes:
        memory: Bytes that the program needs, its arguments included.
    """

    def __init__(self, shape: str, rows: int, means: Means) -> None:
        config = default_config()
        config.update_from_flattened_dict(means.options)
        fields = lm_fields(shape)
        decoder = family_of_hf(fields, shape).config_from_hf(fields, shape)
        decoder = dataclasses.replace(decoder, dtype=config.model.dtype)
        mesh = make_mesh(devices=jax.devices()[:1])
        model = with_remat(describe(config, decoder, mesh), means.remat)
        optimizer = make_optimizer(config.optimizer, 1000)
        self._params = random_params(decoder, jax.random.key(0))
        self._batch = place_batch(mesh, draw_batch(rows, decoder.vocab_size))
        self._state = init_state(model.init(jax.random.key(0), self._params), optimizer, mesh)
        step: Any = make_train_step(model, objective_of(config), optimizer, mesh)
        if not means.donated:
            step = jax.jit(step.__wrapped__)
        self._compiled = step.lower(self._state, self._params, self._batch).compile()
        self.memory = program_memory(self._compiled.memory_analysis())

    def __call__(self) -> tuple[float, float]:
        """Does a step; the seconds of all cores together, and of the clock."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._state, metrics = self._compiled(self._state, self._params, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.process_time() - cpu, time.perf_counter() - wall


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="sizes of the LM; tiny is for tests")
    parser.add_argument("--rows", type=positive, default=8, help="dialogues of the batch")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--means", nargs="+", choices=tuple(MEANS), default=list(MEANS), metavar="NAME")
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys([AS_IT_IS, *options.means]))
    steps = {name: Step(options.shape, options.rows, MEANS[name]) for name in names}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(step())
    found = {
        name: {
            "core_seconds": statistics.median(cores for cores, _ in times),
            "seconds": statistics.median(seconds for _, seconds in times),
            "memory": steps[name].memory,
        }
        for name, times in taken.items()
    }
    base = found[AS_IT_IS]
    print(f"{'':<28} {'cores·s':>9} {'seconds':>9} {'ratio':>7} {'GB':>7}")
    for name, figures in found.items():
        print(
            f"{name:<28} {figures['core_seconds']:>9.3f} {figures['seconds']:>9.3f} "
            f"{figures['seconds'] / base['seconds']:>7.2f} {figures['memory'] / 1e9:>7.3f}"
        )
    facts = {"shape": options.shape, "rows": options.rows, "rounds": options.rounds, "device": jax.default_backend()}
    print(json.dumps({"means": found} | facts | machine()))


if __name__ == "__main__":
    main()
