"""How long from the command to the first step, and where does that time go?

    python benchmarks/startup.py                                     the quickstart, cold once and warm three times
    python benchmarks/startup.py --config=configs/convai2_smollm2.py --config.data.train=train.txt
    python benchmarks/startup.py --config.model.dtype=bfloat16       any option of the configuration

``spt-jax --help`` is timed first. Then ``spt-jax train`` runs in processes of its own, each with a new working
directory, until its first step is finished on the devices, where the process ends. The first run finds an empty cache
folder (`XDG_CACHE_HOME`), the others what it left; the files of packages are in the page cache, and Python's bytecode
is compiled, by a run before that is not counted.

Seconds of the breakdown are the main thread's; a phase within another is indented and part of it. CPU seconds are those
of all threads: where other work shares the cores they say more than the clock. The start is everything but the
arithmetic of the first evaluation and the first step, which no cache can save. Of the warm starts the median is shown.
"""

from __future__ import annotations

import argparse
import functools
import importlib.abc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EVALUATION, STEP = "development dialogues", "first step"
PHASES = {
    "spt_jax.commands.train": {"train_run": "train"},
    "spt_jax.training.run_training": {"run_training": "run_training"},
    "spt_jax.training.experiment": {
        "read_splits": "read dialogues",
        "open_experiment": "open the LM",
        "OpenedExperiment.load": "load the LM",
        "pack_dialogues": "rows of tokens",
        "make_loader": "loader",
    },
    "spt_jax.models.loading": {"open_lm": "header, tokenizer"},
    "spt_jax.models.files.file_hash": {"sha256_of_files": "sha256"},
    "spt_jax.models.kept_weights": {"kept_params": "weights"},
    "spt_jax.models.weights": {"load_params": "load_params"},
    "spt_jax.models.files.gguf_file": {"GGUFFile.read": "dequantise"},
    "spt_jax.data.similarity": {"BleuSimilarity.__init__": "BLEU features"},
    "spt_jax.training.initial": {"initial_trainable": "first tree"},
    "spt_jax.training.step": {"init_state": "first state"},
    "spt_jax.training.tracking": {"open_trackers": "trackers"},
    "spt_jax.training.loop": {"train": "loop", "_evaluate": EVALUATION, "save": "checkpoint"},
}
"""Which functions are timed, by module, and under what name."""

COMPILER = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling or reading the cache",
}
"""What JAX tells of its own durations, and under what name."""
COMPILED = tuple(COMPILER.values())


class Stopwatch:
    """Seconds, CPU seconds and calls of nested phases on the main thread, by their path."""

    def __init__(self) -> None:
        self.spent: dict[tuple[str, ...], list[float]] = {}
        self._open: list[tuple[str, float, float]] = []

    def _total(self, *names: str) -> list[float]:
        return self.spent.setdefault((*(name for name, *_ in self._open), *names), [0.0, 0.0, 0])

    def _add(self, total: list[float], seconds: float, cpu: float) -> None:
        total[0], total[1], total[2] = total[0] + seconds, total[1] + cpu, total[2] + 1

    def begin(self, name: str) -> None:
        """Opens a phase within the one that is open."""
        self._open.append((name, time.perf_counter(), time.process_time()))
        self._total()  # phases are told in the order in which they began

    def end(self) -> None:
        """Closes the phase that was opened last."""
        total = self._total()
        _, start, cpu = self._open.pop()
        self._add(total, time.perf_counter() - start, time.process_time() - cpu)

    def end_all(self) -> None:
        """Closes every phase."""
        while self._open:
            self.end()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time counted under `name`."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return wrapper

    def listen(self, event: str, seconds: float, **_: Any) -> None:
        """Takes a duration that JAX reports."""
        if event in COMPILER and threading.current_thread() is threading.main_thread():
            self._add(self._total(COMPILER[event]), seconds, seconds)


class Patcher(importlib.abc.MetaPathFinder):
    """Times the functions of `PHASES` from the moment their module is imported, and ends the process with a step."""

    def __init__(self, watch: Stopwatch, finish: Callable[[], None]) -> None:
        self._watch, self._finish = watch, finish

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PHASES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for dotted, phase in PHASES[name].items():
                *outer, last = dotted.split(".")
                owner = functools.reduce(getattr, outer, module)
                if hasattr(owner, last):
                    setattr(owner, last, self._watch.timed(phase, getattr(owner, last)))
            if name == "spt_jax.training.step":
                module.make_train_step = self._ending(module.make_train_step)

        spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec

    def _ending(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            import jax

            step = make(*args, **kwargs)

            def first(*arguments: Any) -> Any:
                self._watch.begin(STEP)
                jax.block_until_ready(step(*arguments))
                self._finish()

            first.lower = step.lower  # what is recomputed is chosen by the programs themselves, where memory is limited
            return first

        return made


def child(arguments: list[str]) -> None:
    """Runs ``spt-jax train`` in this process up to its first step, and prints what it took as a line of JSON."""
    watch = Stopwatch()

    def finish() -> None:
        now, cpu = time.perf_counter(), time.process_time()
        watch.end_all()
        phases = [["/".join(path), *total] for path, total in watch.spent.items()]
        sys.stdout.flush()
        print(json.dumps({"finished": now, "cpu": cpu, "phases": phases}), flush=True)
        os._exit(0)

    sys.meta_path.insert(0, Patcher(watch, finish))
    from spt_jax.commands.main import main

    import_jax(watch)
    sys.exit(main(["train", *arguments]))


def import_jax(watch: Stopwatch) -> None:
    """Asks to be told of JAX's durations when, and only when, something else imports it."""

    class Hook(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            if name == "spt_jax.training.step":  # whatever imports it has imported JAX, or is about to
                sys.meta_path.remove(self)
                import jax

                jax.monitoring.register_event_duration_secs_listener(watch.listen)
            return None

    sys.meta_path.insert(0, Hook())


def run_apart(arguments: Sequence[str], cache: Path) -> dict[str, Any]:
    """One start in a process of its own.

    Raises:
        RuntimeError: It failed; with what it wrote.
    """
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", f"--workdir={folder}/run", *arguments]
        start = time.perf_counter()  # the system's monotonic clock, the same in both processes
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    report = json.loads(done.stdout.splitlines()[-1])
    report["seconds"] = report["finished"] - start
    report["start_seconds"] = report["seconds"] - arithmetic(report["phases"], 1)
    report["start_cpu"] = report["cpu"] - arithmetic(report["phases"], 2)
    return report


def arithmetic(phases: Sequence[Sequence[Any]], column: int) -> float:
    """What the development dialogues and the first step take without tracing, lowering and compiling their programs."""
    total = 0.0
    for path, *_ in (phase for phase in phases if phase[0].endswith((EVALUATION, STEP))):
        inner = (p[column] for p in phases if p[0].startswith(f"{path}/") and p[0].removeprefix(f"{path}/") in COMPILED)
        total += next(p[column] for p in phases if p[0] == path) - sum(inner)
    return total


def help_seconds(rounds: int) -> list[float]:
    """Seconds of ``spt-jax --help``, each in a process of its own."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "spt_jax", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def table(report: dict[str, Any]) -> str:
    """The breakdown of one start as text, in the order of the first calls."""
    lines = [f"{'phase':<58} {'seconds':>8} {'CPU s':>8} {'calls':>6}"]
    for path, seconds, cpu, calls in report["phases"]:
        *outer, name = path.split("/")
        if seconds >= 0.01:
            lines.append(f"{'  ' * len(outer) + name:<58} {seconds:>8.2f} {cpu:>8.2f} {calls:>6}")

    ends = (
        ("from the command to the end of the first step", report["seconds"], report["cpu"]),
        ("… without arithmetic on dialogues: the start", report["start_seconds"], report["start_cpu"]),
    )
    lines += [f"{name:<58} {seconds:>8.2f} {cpu:>8.2f}" for name, seconds, cpu in ends]
    return "\n".join(lines)


def main(options: argparse.Namespace, rest: list[str]) -> None:
    """Times the help and the starts, prints the breakdowns and one line of JSON."""
    from machine import machine  # not in the processes that are timed

    if not any(argument.startswith("--config=") for argument in rest):
        rest = ["--config=configs/quickstart.py", *rest]
    results: dict[str, Any] = {"help": help_seconds(options.rounds + 1)[1:]}
    print(f"spt-jax --help: {statistics.median(results['help']):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_rehearsal:
            run_apart(rest, Path(folder) / "rehearsal")
        cache = Path(folder) / "cache"
        reports = [run_apart(rest, cache) for _ in range(options.rounds + 1)]
        results["cache_mb"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6
    warm = sorted(reports[1:], key=lambda report: report["start_seconds"])
    results["cold"] = reports[0]
    results["warm"] = warm[len(warm) // 2]
    for name in ("cold", "warm"):
        print(f"\n{name} caches, {' '.join(rest)}")
        print(table(results[name]))
    results["warm_start_seconds"] = [round(report["start_seconds"], 2) for report in warm]
    print(json.dumps({"arguments": rest, **machine(), **results}))


def parse() -> tuple[argparse.Namespace, list[str]]:
    from arguments import positive  # not in the processes that are timed

    parser = argparse.ArgumentParser(description="Times the start of a training; other flags go to spt-jax train.")
    parser.add_argument("--rounds", type=positive, default=3, help="starts with warm caches")
    parser.add_argument("--no-rehearsal", action="store_true", help="leave out the first run, which is not counted")
    return parser.parse_known_args()


if __name__ == "__main__":
    if "--child" in sys.argv:
        child([argument for argument in sys.argv[1:] if argument != "--child"])
    else:
        main(*parse())
