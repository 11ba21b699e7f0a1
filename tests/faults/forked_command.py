"""`spt-jax train` in a process that is forked from one with the imports done: a start costs a second less than a few.

The server (`multiprocessing`'s) imports the program and touches no device, so each fork has a JAX of its own; one that
was forked with a backend, or with threads, ends at once.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import fast_compilation
from disturbances import Disturbance, disturbed
from phases import PhaseBoard, announced

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "spt_jax.commands.train",
        "spt_jax.training.run_training",
        "spt_jax.evaluation.likelihood",
        "grain",
        "sacrebleu.tokenizers.tokenizer_13a",
        "scipy.sparse",
        "transformers.configuration_utils",
        "transformers.models.auto.tokenization_auto",
        "transformers.tokenization_utils_tokenizers",
    ]
)
SECONDS = 180
"""After which a run that should have ended is taken for one that hangs."""


@dataclasses.dataclass
class Start:
    """One start of the command, and what it wrote."""

    process: BaseProcess
    board: PhaseBoard
    out_file: Path
    err_file: Path

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"a run hung for {SECONDS} s in the phase {self.board.now}: {self.out}{self.err}")
        return self.process.exitcode

    @property
    def out(self) -> str:
        return self.out_file.read_text() if self.out_file.exists() else ""

    @property
    def err(self) -> str:
        return self.err_file.read_text() if self.err_file.exists() else ""


@dataclasses.dataclass(frozen=True)
class ForkedCommand:
    """`spt-jax train` with one configuration, and the other doors.

    Attributes:
        config: The file.
        caches: What the program keeps between runs: compiled programs, packed rows, weights.
        logs: Where standard output and error go.
    """

    config: Path
    caches: Path
    logs: Path

    def start(self, workdir: Path | str, *flags: str, disturbance: Disturbance | None = None) -> Start:
        """Starts the training in a process of its own."""
        return self.start_door(
            "train", f"--config={self.config}", f"--workdir={workdir}", *flags, disturbance=disturbance
        )

    def start_door(self, *arguments: str, disturbance: Disturbance | None = None) -> Start:
        """Starts any door; `arguments` are those of ``spt-jax``."""
        board = PhaseBoard(CONTEXT)
        self.logs.mkdir(exist_ok=True)
        number = len(list(self.logs.iterdir()))
        out, err = self.logs / f"{number}.out", self.logs / f"{number}.err"
        out.touch()
        process = CONTEXT.Process(target=_run, args=(list(arguments), self.caches, out, err, board, disturbance))
        process.start()
        return Start(process, board, out, err)

    def run(self, workdir: Path | str, *flags: str, disturbance: Disturbance | None = None) -> tuple[int, str, str]:
        """The exit code, standard output and standard error of a start that nobody disturbs from outside."""
        start = self.start(workdir, *flags, disturbance=disturbance)
        return start.wait(), start.out, start.err


def environment(caches: Path) -> dict[str, str]:
    """One device, programs compiled fast, and the caches in a folder of their own."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": fast_compilation.FLAGS,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(caches),
    }


def _run(
    arguments: list[str], caches: Path, out: Path, err: Path, board: PhaseBoard, disturbance: Disturbance | None
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment(caches))
    import jax
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized()
    tasks = Path("/proc/self/task")
    assert not tasks.is_dir() or len(list(tasks.iterdir())) == 1
    from spt_jax.commands.main import main

    # The server has imported JAX, which reads its variables then: what the command sets in them comes too late.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(caches / "spt_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with disturbed(disturbance or Disturbance()) as on_phase, announced(board, on_phase):
        code = main(arguments)
    sys.exit(code)
