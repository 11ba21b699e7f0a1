"""A side of `train_step.py` in a process of its own, which waits, without using a core, until it is asked to work.

So the sides can take turns within one run, and the peak of a process's resident set is its side's alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Protocol

SIDES = ("ours", "authors", "strong", "strong_packed")
COMMANDS = ("check", "probe", "warm_up", "run", "product")


class Side(Protocol):
    """What can be asked of a side, in this process or another; see `Ours` and `Rival`."""

    def check(self) -> dict[str, float]: ...
    def probe(self) -> dict[str, float]: ...
    def warm_up(self) -> None: ...
    def run(self, steps: int) -> dict[str, float]: ...
    def product(self) -> float: ...
    def device_memory(self) -> int: ...


class Worker:
    """A `Side` in its own process, on the first `threads` cores that this process may use, or on the GPU.

    Attributes:
        peak_memory: Bytes, the peak of its resident set up to its last answer, imports and compilation included; on a
            GPU the peak of what its arrays took there.

    Raises:
        RuntimeError: The process ended; what it wrote to standard error says why.
    """

    def __init__(
        self, side: str, folder: Path, batch: int, threads: int, checking: bool = False, device: str = "cpu"
    ) -> None:
        command = [sys.executable, __file__, side, str(folder), f"--batch={batch}", f"--threads={threads}"]
        command += [f"--device={device}", *(["--checking"] if checking else [])]
        count = str(threads)
        platform = "cpu" if device == "cpu" else "cuda"
        environment = os.environ | {"JAX_PLATFORMS": platform, "OMP_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        # A round's process finds what that of the round before has compiled.
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        self._side = side
        self.peak_memory = 0
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the side {self._side} ended with {self._process.wait()}")
        answer = json.loads(line)
        self.peak_memory = answer["peak_memory"]
        return answer["result"]

    def _ask(self, command: str, *arguments: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def check(self) -> dict[str, float]:
        return self._ask("check")

    def probe(self) -> dict[str, float]:
        return self._ask("probe")

    def warm_up(self) -> None:
        self._ask("warm_up")

    def run(self, steps: int) -> dict[str, float]:
        return self._ask("run", steps)

    def product(self) -> float:
        return self._ask("product")

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def make_side(side: str, folder: Path, batch: int, checking: bool = False, device: str = "cpu") -> Side:
    """A side in this process; only what it needs is imported."""
    if side == "ours":
        from train_step_ours import Ours

        return Ours(folder, batch, checking, device)
    from torch_rivals import RIVALS

    return RIVALS[side](folder, batch, checking, device)


def peak_memory() -> int:
    """Bytes. Not ``ru_maxrss``, which a child inherits from the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def work() -> None:
    """Answers commands from standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--checking", action="store_true")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    options = parser.parse_args()
    # XLA has as many threads as cores it may use, and asks when it is first imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if options.side != "ours":
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(options.threads)
        disable_progress_bar()
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's use of transformers
    side = make_side(options.side, options.folder, options.batch, options.checking, options.device)
    result: Any = None
    while True:
        peak = side.device_memory() or peak_memory()
        answers.write(json.dumps({"result": result, "peak_memory": peak}) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        command, *arguments = json.loads(line)
        assert command in COMMANDS, command
        result = getattr(side, command)(*arguments)


if __name__ == "__main__":
    work()
