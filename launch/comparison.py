"""Trains and evaluates Selective Prompt Tuning beside its rivals, and makes the table.

Run it in an environment where spt_jax is installed:

    python launch/comparison.py --train=train.txt --test=valid.txt --out=runs/comparison
    python launch/comparison.py --train=train.txt --test=valid.txt --out=runs/small --dialogues=64 --test_dialogues=50

For every method of `configs/comparison.py` that is asked for, each of its learning rates is tried with the first seed,
and the one with the lowest perplexity on the development dialogues is taken for all seeds; the test dialogues are seen
once, by `evaluate`. Options of SPT beyond the paper (`--options`) take the rate that was chosen for `spt`, so they have
no trials of their own. Runs lie in OUT/METHOD/lr_RATE/seed_SEED; one that is there already is resumed or reused, so the
program may be stopped and started again: on Ctrl-C or SIGTERM, or when its terminal is closed, no further run begins,
those under way save and end, and it exits with 75. What was tried, and what was taken, is in OUT/trials.json.

With --jobs=N, N runs share the machine, each has its share of the GPUs, and what it prints is in OUT/logs. Several on
one GPU share its memory, which must be enough for all; JAX_COMPILATION_CACHE_DIR lets them share what is compiled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError, nearest
from spt_jax.exit_codes import INTERRUPTED, STOPPED
from spt_jax.parallel.gpu_shares import gpu_shares
from spt_jax.training.signals import leave_terminal, stop_signals
from spt_jax.user_paths import expanded

HERE = Path(__file__).resolve().parent.parent
CONFIG = HERE / "configs" / "comparison.py"

_BASELINE = "prompt_tuning"
"""With which the others are compared where it is among them; else the first is."""

# Ways in which a program ends that was asked to, by this one or by somebody else.
_STOPS = (STOPPED, INTERRUPTED, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)


def main() -> None:
    """Runs the comparison."""
    arguments = _arguments()
    described = runpy.run_path(str(CONFIG))
    try:
        _check(arguments, described["METHODS"])
        test = _test_file(arguments)
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    programs = _Programs()
    for number in stop_signals():
        signal.signal(number, programs.stop)
    try:
        code: Any = _compare(arguments, test, described["LEARNING_RATES"], programs)
    except SystemExit as ended:
        code = ended.code
    if programs.stopped:
        print("comparison: stopped; the same command goes on from there", file=sys.stderr)
        code = STOPPED
    sys.exit(code)


def _check(arguments: argparse.Namespace, known: Collection[str]) -> None:
    """Refuses what would be found wrong, or otherwise than it was meant, after trainings."""
    asked = (*arguments.methods, *arguments.options)
    for method in asked:
        if method not in known:
            raise UserError(f"there is no method {method!r}; allowed: {', '.join(known)}.{nearest(method, known)}")
    if arguments.options and "spt" not in arguments.methods:
        raise UserError("--options take the learning rate that is chosen for spt; add spt to --methods")
    if arguments.baseline not in (_BASELINE, *asked):
        raise UserError(
            f"--baseline is {arguments.baseline!r}; allowed: one of the methods that are compared, {', '.join(asked)}."
            f"{nearest(arguments.baseline, asked)}"
        )
    for name in ("train", "test"):
        path = getattr(arguments, name)
        if not path.is_file():
            raise UserError(f"--{name}: there is no file {path}")


def _compare(
    arguments: argparse.Namespace, test: Path, rates: dict[str, tuple[float, ...]], programs: _Programs
) -> int:
    runs = _Comparison(arguments, test, rates, programs).run()
    if arguments.runs_only:
        return 0
    baseline = [f"--baseline={run}" for run in runs if run.parts[-3] == arguments.baseline][:1]
    encoder = [f"--bertscore={arguments.bertscore}"] if arguments.bertscore else []
    table = ["compare", *map(str, runs), *baseline, f"--out={arguments.out / 'table'}", *encoder]
    return programs.run([sys.executable, "-m", "spt_jax", *table], dict(os.environ))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=_path, required=True, help="training dialogues, a ConvAI2 file")
    parser.add_argument("--test", type=_path, required=True, help="test dialogues, a ConvAI2 file")
    parser.add_argument("--out", type=_path, required=True, help="folder of the runs and the table")
    parser.add_argument("--methods", nargs="+", default=["zero_shot", "prompt_tuning", "lora", "spt"])
    parser.add_argument("--options", nargs="*", default=[], help="options of SPT, at the rate chosen for spt")
    parser.add_argument("--baseline", default=_BASELINE, help="method that the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--option_seeds", type=int, nargs="+", help="those of the options; else --seeds")
    parser.add_argument("--dialogues", type=int, default=0, help="training dialogues; 0 for all")
    parser.add_argument("--test_dialogues", type=int, default=0, help="test dialogues; 0 for all")
    parser.add_argument("--bertscore", default="", help="encoder of BERTScore; empty for none")
    parser.add_argument("--runs_only", action="store_true", help="leave the table to spt-jax compare")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("overrides", nargs="*", help="--config.NAME=VALUE, for every run, behind --")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; allowed: 1 or more")
    return arguments


def _path(text: str) -> Path:
    try:
        return expanded(text, "the path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Programs:
    """The programs that are under way. A stop asks all of them to end, and lets no other begin.

    Attributes:
        stopped: Whether there was a stop.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._going: set[subprocess.Popen[bytes]] = set()

    def run(self, command: list[str], environment: dict[str, str], log: Path | None = None) -> int:
        """Waits for a program; returns its exit code.

        Args:
            command: The program and its arguments.
            environment: Its environment.
            log: Takes what it prints; None for where this program prints.

        Raises:
            SystemExit: There was a stop before it began.
        """
        if self.stopped:
            sys.exit(STOPPED)
        errors = None if log is None else subprocess.STDOUT
        with nullcontext() if log is None else log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=errors)
        self._going.add(process)
        # A stop while it began may not have seen it.
        if self.stopped:
            process.terminate()
        code = process.wait()
        self._going.discard(process)
        if code in _STOPS:
            self.stop()
        return code

    def stop(self, number: int | None = None, *_: object) -> None:
        """Also a handler of signals."""
        self.stopped = True
        if number == signal.SIGHUP:
            leave_terminal()
        # A terminal's Ctrl-C has reached them too, and a second one would end a training unsaved; SIGTERM does not.
        for process in list(self._going):
            process.terminate()


class _Comparison:
    """The runs of one comparison; those that need nothing of one another go side by side.

    Args:
        arguments: The program's.
        test: The test dialogues.
        rates: Learning rates to try, by method.
        programs: Trains and evaluates.
    """

    def __init__(
        self, arguments: argparse.Namespace, test: Path, rates: dict[str, tuple[float, ...]], programs: _Programs
    ) -> None:
        self._arguments, self._test, self._rates, self._programs = arguments, test, rates, programs
        self._places: Queue[dict[str, str]] = Queue()
        for share in gpu_shares(arguments.jobs):
            self._places.put(share)
        self._lock = Lock()
        self._trials: dict[str, dict[str, Any]] = {}
        self._begun = time.monotonic()

    def run(self) -> list[Path]:
        """Tries, trains and evaluates everything; returns the evaluated runs in the order of the methods."""
        methods, options = self._arguments.methods, self._arguments.options
        with ThreadPoolExecutor(len(methods) + len(options)) as pool:
            chosen = {method: pool.submit(self._chosen_rate, method) for method in methods}
            tuned = {method: method for method in methods} | dict.fromkeys(options, "spt")
            seeds = dict.fromkeys(methods, self._arguments.seeds)
            seeds |= dict.fromkeys(options, self._arguments.option_seeds or self._arguments.seeds)
            done = {
                name: pool.submit(self._seeds, name, seeds[name], chosen[own].result) for name, own in tuned.items()
            }
            return [run for name in done for run in done[name].result()]

    def _seeds(self, method: str, seeds: list[int], rate_of: Callable[[], float | None]) -> list[Path]:
        rate = rate_of()
        # What learns nothing has no seeds.
        seeds = seeds if rate is not None else seeds[:1]
        with ThreadPoolExecutor(len(seeds)) as pool:
            return list(pool.map(lambda seed: self._evaluated(method, rate, seed), seeds))

    def _chosen_rate(self, method: str) -> float | None:
        """The rate with the lowest development perplexity; None for a method that learns nothing."""
        rates = self._rates.get("spt" if method.startswith("spt") else method)
        if rates is None:
            return None
        with ThreadPoolExecutor(len(rates)) as pool:
            found = dict(zip(rates, pool.map(lambda rate: self._trial(method, rate), rates), strict=True))
        best = min(rates, key=found.__getitem__)
        with self._lock:
            tried = {str(rate): perplexity for rate, perplexity in found.items()}
            self._trials[method] = {"development perplexity": tried, "chosen": best}
            text = json.dumps(self._trials, indent=2) + "\n"
            (self._arguments.out / "trials.json").write_text(text, encoding="utf-8")
        return best

    def _trial(self, method: str, rate: float) -> float:
        """The development perplexity that a rate ends with, for the first seed; infinite where that is no number."""
        with self._place() as environment:
            workdir = self._trained(method, rate, self._arguments.seeds[0], environment)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        perplexities = [row["development/perplexity"] for row in rows if "development/perplexity" in row]
        last = perplexities[-1]
        return last if last is not None and math.isfinite(last) else math.inf

    def _evaluated(self, method: str, rate: float | None, seed: int) -> Path:
        with self._place() as environment:
            workdir = self._trained(method, rate, seed, environment)
            self._spt_jax(environment, "evaluate", f"--workdir={workdir}", "--nobaselines", "--reuse")
        return workdir

    @contextmanager
    def _place(self) -> Iterator[dict[str, str]]:
        """One of the places for runs, when it is free; the environment of what runs there."""
        share = self._places.get()
        try:
            yield os.environ | share
        finally:
            self._places.put(share)

    def _trained(self, method: str, rate: float | None, seed: int, environment: dict[str, str]) -> Path:
        arguments = self._arguments
        workdir = arguments.out / method / f"lr_{rate}" / f"seed_{seed}"
        options = [
            f"--config.seed={seed}",
            f"--config.data.train={arguments.train.resolve()}",
            f"--config.data.test={self._test}",
            f"--config.data.limit={arguments.dialogues}",
            *([] if rate is None else [f"--config.optimizer.learning_rate={rate}"]),
        ]
        flags = [f"--config={CONFIG}:{method}", f"--workdir={workdir}", *options, *arguments.overrides]
        self._spt_jax(environment, "train", *flags)
        return workdir

    def _spt_jax(self, environment: dict[str, str], door: str, *flags: str) -> None:
        command = [sys.executable, "-m", "spt_jax", door, *flags]
        if self._arguments.jobs == 1:
            code = self._programs.run(command, environment)
        else:
            code = self._logged(door, command, environment)
        if code:
            sys.exit(code)

    def _logged(self, door: str, command: list[str], environment: dict[str, str]) -> int:
        workdir = next(Path(flag.split("=", 1)[1]) for flag in command if flag.startswith("--workdir="))
        name = "-".join((*workdir.parts[-3:], door))
        log = self._arguments.out / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        code = self._programs.run(command, environment, log)
        outcome = "done" if code == 0 else "stopped" if code in _STOPS else f"failed, see {log}"
        print(f"{time.monotonic() - self._begun:6.0f} s  {name}: {outcome}", flush=True)
        return code


def _test_file(arguments: argparse.Namespace) -> Path:
    """The test dialogues, or a file of the first so many: a run's own test is what every method is evaluated on."""
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: the folder {arguments.out} cannot be made: {error.strerror}") from error
    if not arguments.test_dialogues:
        return arguments.test.resolve()
    try:
        text = arguments.test.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--test: {arguments.test} cannot be read: {error}") from error
    lines, begun = [], 0
    for line in text.splitlines(keepends=True):
        begun += line.startswith("1 ")
        if begun > arguments.test_dialogues:
            break
        lines.append(line)
    path = arguments.out / f"test_{arguments.test_dialogues}.txt"
    content = "".join(lines)
    if path.exists() and path.read_bytes() != content.encode():
        raise UserError(f"{path} holds other dialogues than --test={arguments.test}; choose another --out")
    write_atomically(path, content)
    return path.resolve()


if __name__ == "__main__":
    main()
