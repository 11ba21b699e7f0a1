"""Where does the time of a train step go? Its profile, added up.

    python benchmarks/step_parts.py --shape=small
    python benchmarks/step_parts.py --shape=opt-125m --rows=4 --rounds=2

Some steps run as they are and some under `jax.profiler`, in turns, on one core: a trace tells when an instruction of
the compiled program began and ended, not how many threads helped, so that on one core alone the times add up. An
instruction belongs to the part in whose scope it was written, as the compiled program's text tells; one that the
compiler made belongs to what uses it, or to the loop that it stands in. What was in no instruction is told too, and how
much of its time the step had the core: other work on it would be counted as the step's own. Float32 on the CPU, random
weights, one batch of ConvAI2's proportions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
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
from spt_jax.training.step import init_state, make_train_step

PARTS = {
    "blocks": r"layers|Decoder\)*/(while|broadcast_in_dim)",
    "vocabulary": "vocabulary",
    "embedding, positions, last norm": "embedding|Decoder",
    "retriever": "Retriever",
    "losses over turns": "turn_losses",
    "optimizer, metrics": "optimizer|metrics",
    "bank, targets, weights": "",
}
"""The parts of a step, and by what in a scope's name they are told; the first that fits counts."""
LARGE = ("blocks", "vocabulary")
"""What the arithmetic of a step should be."""
OUTSIDE = "outside instructions"
LEAST_BUSY = 0.98
"""Of a step's time, on the core, for shares that mean something."""

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")


def scopes(text: str) -> dict[str, str]:
    """The scope of every instruction of a compiled program's text, such as ``jit(step)/jvp(vocabulary)/mul``.

    An instruction that has none, since the compiler made it, is of the scope of the last instruction of what it calls,
    such as a fusion; else of what uses it first; else of the one that calls the computation it stands in.
    """
    own: dict[str, str] = {}
    named: dict[str, list[str]] = {}
    home: dict[str, str] = {}
    roots: dict[str, str] = {}
    users: dict[str, str] = {}
    computation = ""
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            computation = begun[1]
        elif found := _INSTRUCTION.match(line):
            root, name = found.groups()
            scope = _SCOPE.search(line)
            own[name], home[name] = scope[1] if scope else "", computation
            named[name] = _NAME.findall(line[found.end() :])
            for other in named[name]:
                users.setdefault(other, name)
            if root:
                roots[computation] = name

    def scope_of(name: str) -> str:
        inside = [own[roots[called]] for called in named[name] if called in roots]
        above = users.get(name) or users.get(home[name])
        return own[name] or next(filter(None, inside), "") or (scope_of(above) if above else "")

    return {name: scope_of(name) for name in own}


def part_of(scope: str) -> str:
    """Which of `PARTS` a scope is of."""
    return next(part for part, names in PARTS.items() if re.search(names, scope))


def self_seconds(events: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, float]]:
    """Names and seconds of one thread's events, without those of the events within them.

    Args:
        events: Name, begin and end, nanoseconds; they hold each other or lie apart.
    """
    open_events: list[list[Any]] = []

    def close(until: float) -> Iterator[tuple[str, float]]:
        while open_events and open_events[-1][1] <= until:
            name, end, begin, within = open_events.pop()
            yield name, (end - begin - within) / 1e9
            if open_events:
                open_events[-1][3] += end - begin

    for name, begin, end in sorted(events, key=lambda event: (event[1], -event[2])):
        yield from close(begin)
        open_events.append([name, end, begin, 0])
    yield from close(float("inf"))


def traced_seconds(run: Callable[[], Any], module: str) -> dict[str, float]:
    """Seconds of every instruction of a compiled module while `run` runs under the profiler.

    Args:
        run: Ends when its work has ended.
        module: The name of the compiled program.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (kept,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(kept))
    seconds: dict[str, float] = collections.defaultdict(float)
    for line in (line for plane in profile.planes for line in plane.lines):
        found = []
        for event in line.events:
            stats = dict(event.stats)
            if stats.get("hlo_module") == module:
                found.append((stats["hlo_op"], event.start_ns, event.end_ns))
        for name, spent in self_seconds(found):
            seconds[name] += spent
    return seconds


class Profile:
    """A train step that runs as it is and under the profiler.

    Args:
        shape: Of `SHAPES`.
        rows: Dialogues of the batch.
    """

    def __init__(self, shape: str, rows: int) -> None:
        fields, config = lm_fields(shape), default_config()
        decoder = family_of_hf(fields, shape).config_from_hf(fields, shape)
        mesh = make_mesh(devices=jax.devices()[:1])
        model, optimizer = describe(config, decoder, mesh), make_optimizer(config.optimizer, 1000)
        self._params = random_params(decoder, jax.random.key(0))
        self._batch = place_batch(mesh, draw_batch(rows, decoder.vocab_size))
        self._state = init_state(model.init(jax.random.key(0), self._params), optimizer, mesh)
        step = make_train_step(model, objective_of(config), optimizer, mesh)
        self._step = step.lower(self._state, self._params, self._batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
        self._scopes = scopes(self._step.as_text())

    def run(self) -> tuple[float, float]:
        """One step: the seconds that it took, and those of them in which this process had a core."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._state, metrics = self._step(self._state, self._params, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - wall, time.process_time() - cpu

    def traced(self) -> tuple[dict[str, float], float]:
        """Seconds of each instruction in one step and those `OUTSIDE`, and those in which this process had a core."""
        took: list[tuple[float, float]] = []
        seconds = traced_seconds(lambda: took.append(self.run()), "jit_step")
        [(wall, cpu)] = took
        return seconds | {OUTSIDE: wall - sum(seconds.values())}, cpu

    def scope(self, instruction: str) -> str:
        """See `scopes`."""
        return self._scopes.get(instruction, "")

    def part(self, instruction: str) -> str:
        """Which of `PARTS` an instruction is of."""
        return OUTSIDE if instruction == OUTSIDE else part_of(self._scopes[instruction])


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="sizes of the LM; tiny is for tests")
    parser.add_argument("--rows", type=positive, default=8, help="dialogues of the batch")
    parser.add_argument("--rounds", type=positive, default=5, help="steps under the profiler, and as many without")
    parser.add_argument("--top", type=int, default=0, help="how many of the costliest instructions are told too")
    options = parser.parse_args(arguments)
    profile = Profile(options.shape, options.rows)
    profile.run()
    untraced, busy, seconds = 0.0, 0.0, collections.defaultdict[str, float](float)
    for _ in range(options.rounds):
        untraced += profile.run()[0] / options.rounds
        found, cpu = profile.traced()
        busy += cpu / options.rounds
        for name, spent in found.items():
            seconds[name] += spent / options.rounds
    parts = dict.fromkeys((*PARTS, OUTSIDE), 0.0)
    for name, spent in seconds.items():
        parts[profile.part(name)] += spent
    traced = sum(parts.values())
    rest = sum(spent for part, spent in parts.items() if part not in LARGE)
    print(f"{'':<34}{'seconds':>14}{'share':>9}")
    for part, spent in (*parts.items(), ("all but blocks and vocabulary", rest)):
        print(f"{part:<34}{spent:>14.4f}{spent / traced:>9.2%}")
    for name, spent in heapq.nlargest(options.top, seconds.items(), key=lambda item: item[1]):
        print(f"{name:<34}{spent:>14.4f}{spent / traced:>9.2%}  {profile.scope(name)}")
    print(f"a step under the profiler: {traced:.3f} s, {busy / traced:.1%} on the core; without it: {untraced:.3f} s")
    if busy < LEAST_BUSY * traced:
        print("other work had the core for a part of the time, so the shares are not to be trusted")
    facts = {"shape": options.shape, "rows": options.rows, "rest_share": rest / traced, "busy": busy / traced}
    print(json.dumps({"seconds": parts, "traced": traced, "untraced": untraced} | facts | machine()))


def stay_on_one_core() -> None:
    """Before the first array, since XLA makes as many threads as there are cores."""
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("step_parts.py needs Linux: on other systems a process cannot keep to one core")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # A kept program would name its instructions as the version did that compiled it.
    jax.config.update("jax_enable_compilation_cache", False)
    # Where libtpu is installed, its profiler would fill the core.
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    stay_on_one_core()
    main()
