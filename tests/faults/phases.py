"""What a training is doing, told through memory that outlives it: the driver reads it while the run lives, or after."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

PHASES = ("start", "restore", "compile", "step", "evaluation", "save")
"""``start`` is everything before the first step that is not told apart; ``compile`` is the first step of a start."""


class PhaseBoard:
    """The phase that a run is in, how often it has entered each, and for how long it was there.

    Args:
        context: Whose processes share it.
    """

    def __init__(self, context: ForkServerContext) -> None:
        # Without a lock: one who is killed while he holds it would never give it back.
        self._now = context.RawValue(ctypes.c_int, 0)
        self._entered = context.RawArray(ctypes.c_int, len(PHASES))
        self._seconds = context.RawArray(ctypes.c_double, len(PHASES))

    @property
    def now(self) -> str:
        return PHASES[self._now.value]

    def entered(self, phase: str) -> int:
        return self._entered[PHASES.index(phase)]

    def mean_seconds(self, phase: str) -> float:
        """Of an undisturbed run."""
        place = PHASES.index(phase)
        return self._seconds[place] / max(1, self._entered[place])

    def enter(self, phase: str) -> None:
        self._now.value = PHASES.index(phase)
        self._entered[self._now.value] += 1

    def started(self, seconds: float) -> None:
        """How long it took until the first step."""
        self._seconds[PHASES.index("start")] = seconds

    @contextlib.contextmanager
    def within(self, phase: str, then: str | None = None) -> Iterator[None]:
        """A phase, and the one that follows it: by default the one before."""
        before, begun = self.now, time.perf_counter()
        self.enter(phase)
        yield
        self._seconds[PHASES.index(phase)] += time.perf_counter() - begun
        self._now.value = PHASES.index(then or before)


@contextlib.contextmanager
def announced(board: PhaseBoard, on_phase: Callable[[str], None] = lambda phase: None) -> Iterator[None]:
    """While it is open, a training in this process tells `board`, and `on_phase`, of each phase that it enters."""
    from spt_jax.evaluation.likelihood import DevelopmentEvaluator
    from spt_jax.training import run_training
    from spt_jax.training.checkpoint import Checkpoints

    def telling(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **more: Any) -> Any:
            on_phase(phase)
            with board.within(phase):
                return function(*arguments, **more)

        return told

    run, make_train_step, begun = DevelopmentEvaluator.run, run_training.make_train_step, time.perf_counter()

    def make(*arguments: Any, **more: Any) -> Callable[..., Any]:
        step_fn = make_train_step(*arguments, **more)

        def step(*arguments: Any) -> Any:
            phase = "step" if board.entered("compile") else "compile"
            on_phase(phase)
            if phase == "compile":
                board.started(time.perf_counter() - begun)
            with board.within(phase, then="step"):
                return step_fn(*arguments)

        return step

    board.enter("start")
    with (
        mock.patch.object(Checkpoints, "restore", telling("restore", Checkpoints.restore)),
        mock.patch.object(Checkpoints, "save", telling("save", Checkpoints.save)),
        mock.patch.object(DevelopmentEvaluator, "run", telling("evaluation", lambda *a: list(run(*a)))),
        mock.patch.object(run_training, "make_train_step", make),
    ):
        yield
