"""Have the deterministic costs of training drifted from the committed figures?

    python benchmarks/check.py             # exit code 1 and a sentence for each cost that moved
    python benchmarks/check.py --update    # after a change that was meant: writes benchmarks/costs.json

Costs that do not depend on the machine's speed: matrix products of the train step at the size of OPT-125M (no weights
are made), alone and over what the method needs; bytes and temporary memory of the compiled step, a loop's body counted
once as XLA counts it; the padding of the built-in dialogues; and in a run of a few steps on a small decoder the
compilations, the calls that read from the device, the values that the host asks for, and the arrays that batches place
there. The compiler decides about some of them, so figures are kept for each version of jax; for one that has none, they
are printed and nothing is compared. `tests/benchmarks/test_check.py` runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from drawn_batch import draw_batch
from gpu import needed_flops
from jax._src.array import ArrayImpl

from spt_jax.config import default_config
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.sources import read_dialogues
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import random_params
from spt_jax.models.loading import open_lm
from spt_jax.models.random_lm import byte_tokenizer
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch
from spt_jax.planning.arithmetic import product_flops
from spt_jax.planning.programs import frozen_shapes
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.description import describe, objective_of
from spt_jax.training.experiment import make_loader, pack_dialogues
from spt_jax.training.loop import LoopOptions, train
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.signals import StopSignal
from spt_jax.training.step import init_state, make_train_step

FIGURES = Path(__file__).with_name("costs.json")
TOLERANCES = {"step_products": 0.005, "products_over_needed": 0.005, "step_bytes": 0.05, "step_temporary_bytes": 0.05}
"""Relative, upwards and downwards; what is not named here must be equal."""

ROWS = 4
RUN_STEPS = 5
DIALOGUES = 16
SMALL = DecoderConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
)


def host_calls(text: str) -> int:
    """How many instructions of a compiled program's text call Python or feed the host."""
    return len(re.findall(r'custom_call_target="[^"]*python[^"]*callback"|\boutfeed\(', text))


def step_costs() -> dict[str, float]:
    """Of the step at OPT-125M's size, K = 4, P = 8, one batch of ConvAI2's proportions."""
    config, mesh = default_config(), make_mesh(devices=jax.devices()[:1])
    decoder = open_lm("shape:opt-125m").config
    model, optimizer = describe(config, decoder, mesh), make_optimizer(config.optimizer, 100)
    params = frozen_shapes(decoder, mesh)
    state = init_state(jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0))), optimizer, mesh)
    batch = draw_batch(ROWS, decoder.vocab_size)
    traced = make_train_step(model, objective_of(config), optimizer, mesh).trace(state, params, batch)
    compiled = traced.lower().compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert costs is not None and memory is not None
    products = product_flops(traced.jaxpr.jaxpr)
    text = compiled.as_text() or ""
    return {
        "step_products": products,
        "products_over_needed": products / needed_flops(decoder, batch, 4, 8),
        "step_bytes": float(costs["bytes accessed"]),
        "step_temporary_bytes": float(memory.temp_size_in_bytes),
        "host_calls_in_the_step": float(host_calls(text)),
    }


@contextlib.contextmanager
def _counted(module: Any, name: str) -> Iterator[mock.MagicMock]:
    with mock.patch.object(module, name, wraps=getattr(module, name)) as calls:
        yield calls


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA is asked for in the block."""
    found: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def host_reads() -> Iterator[list[tuple[int, ...]]]:
    """Collects the shape of every array whose value is brought to the host in the block.

    Such as by ``float``, ``print``, ``tolist`` or `jax.device_get`; numpy's view of a CPU's own memory is none.
    """
    found: list[tuple[int, ...]] = []
    read = ArrayImpl._value.fget  # pyright: ignore[reportAttributeAccessIssue]

    def noted(array: ArrayImpl) -> np.ndarray:
        if array._npy_value is None:
            found.append(array.shape)
        return read(array)

    with mock.patch.object(ArrayImpl, "_value", property(noted)):
        yield found


def run_costs() -> dict[str, float]:
    """Of a run of `RUN_STEPS` steps over the built-in dialogues as bytes, evaluation and saving left out."""
    config, mesh = default_config(), make_mesh(devices=jax.devices()[:1])
    config.data.batch, config.data.max_length, config.data.max_buckets = 2, 1536, 4
    dialogues = read_dialogues("builtin:train").dialogues[:DIALOGUES]
    loader = _loader(config, dialogues, mesh)
    model, optimizer = describe(config, SMALL, mesh), make_optimizer(config.optimizer, RUN_STEPS)
    params = random_params(SMALL, jax.random.key(0))
    state = init_state(model.init(jax.random.key(1), params), optimizer, mesh)
    step = make_train_step(model, objective_of(config), optimizer, mesh)
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder), keep_latest=1, keep_best=0) as checkpoints,
        _counted(jax, "device_get") as down,
        _counted(jax, "make_array_from_process_local_data") as up,
        compilations() as programs,
        host_reads() as values,
    ):
        train(
            state,
            step,
            params,
            loader.iterate,
            partial(place_batch, mesh),
            options=LoopOptions(RUN_STEPS, 1, 1000, 1000, 3, 0, folder),
            checkpoints=checkpoints,
            trackers=[],
            evaluators=[],
            meta={},
            stop=StopSignal(),
        )
        shapes = len({loader.shape(number) for number in range(RUN_STEPS)})
    return {
        "padding_share": round(loader.padding_share, 6),
        "batch_shapes": float(shapes),
        "compilations_beyond_one_a_shape": float(len(programs) - shapes),
        "reads_per_step": down.call_count / RUN_STEPS,
        "values_read_per_step": len(values) / RUN_STEPS,
        "arrays_placed_per_step": up.call_count / RUN_STEPS,
    }


def _loader(config: Any, dialogues: Any, mesh: Any) -> DialogueLoader:
    tokenizer = byte_tokenizer()
    return make_loader(config, pack_dialogues(config, dialogues, tokenizer), dialogues, mesh, tokenizer.pad_id)


def drift(found: dict[str, float], kept: dict[str, float]) -> list[str]:
    """A sentence for every cost that is not what it was."""
    sentences = [f"{name} is new: {found[name]:g}" for name in found if name not in kept]
    sentences += [f"{name} is no longer measured" for name in kept if name not in found]
    for name in found.keys() & kept.keys():
        allowed = TOLERANCES.get(name, 0.0)
        if not np.isclose(found[name], kept[name], rtol=allowed, atol=1e-9):
            change = found[name] / kept[name] - 1 if kept[name] else float("inf")
            sentences.append(
                f"{name} is {found[name]:g}, was {kept[name]:g} ({change:+.2%}; allowed: {allowed:.1%} either way)"
            )
    return sorted(sentences)


def main() -> int:
    """Compares, or writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the figures of this version of jax")
    arguments = parser.parse_args()
    found = step_costs() | run_costs()
    kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for name, value in found.items():
        print(f"{name:<34}{value:>18,.6g}")
    print(json.dumps({"jax": jax.__version__, "costs": found}))
    if arguments.update:
        text = json.dumps(kept | {jax.__version__: found}, indent=2, sort_keys=True) + "\n"
        FIGURES.write_text(text, encoding="utf-8")
        return 0
    if jax.__version__ not in kept:
        print(f"no figures are kept for jax {jax.__version__} (kept: {', '.join(kept)}); --update keeps these")
        return 0
    sentences = drift(found, kept[jax.__version__])
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
