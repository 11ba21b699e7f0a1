"""What goes wrong inside a training: a clock that jumps, numbers that are not, a loader that raises, a slow network."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

TEN_YEARS = 10 * 365.25 * 24 * 3600


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What happens to one start of a run.

    Attributes:
        clock_seed: Of the jumps of the wall clock, by up to ten years to either side at each phase; None: no jumps.
        nan_from: The first step (counted from 0) whose frozen LM is not a number, and
        nan_until: the first after it whose LM is one again.
        raise_at: The step whose batch cannot be made, and
        error: with what.
        copy_seconds: How long each file takes on its way into a bucket, which is then looked after all the time.
    """

    clock_seed: int | None = None
    nan_from: int = 0
    nan_until: int = 0
    raise_at: int = -1
    error: type[Exception] = ValueError
    copy_seconds: float = 0.0


class JumpingClock:
    """Stands in for `time.time` and `time.time_ns`; `jump` sets it to another time."""

    def __init__(self, seed: int) -> None:
        self._draws = random.Random(seed)
        self._time, self._time_ns = time.time, time.time_ns
        self._offset = 0

    def jump(self, phase: str) -> None:
        self._offset = int(self._draws.uniform(-TEN_YEARS, TEN_YEARS))

    def time(self) -> float:
        return self._time() + self._offset

    def time_ns(self) -> int:
        return self._time_ns() + self._offset * 10**9


def _sometimes_nan(make_train_step: Callable[..., Any], disturbance: Disturbance) -> Callable[..., Any]:
    import jax

    def make(*arguments: Any, **more: Any) -> Callable[..., Any]:
        step_fn = make_train_step(*arguments, **more)

        def step(state: Any, params: Any, batch: Any) -> Any:
            if disturbance.nan_from <= int(state.step) < disturbance.nan_until:
                params = jax.tree.map(lambda leaf: leaf * math.nan, params)
            return step_fn(state, params, batch)

        return step

    return make


def _raising(batch: Callable[..., Any], disturbance: Disturbance) -> Callable[..., Any]:
    def made(loader: Any, step: int) -> Any:
        if step == disturbance.raise_at:
            raise disturbance.error(f"the batch of step {step} cannot be made")
        return batch(loader, step)

    return made


def _slowly(put: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return put(*arguments)

    return slow


@contextlib.contextmanager
def _slow_network(seconds: float) -> Iterator[None]:
    from spt_jax.storage.background import BackgroundCopies
    from spt_jax.storage.bucket import Bucket

    begin = BackgroundCopies.__init__

    def often(copies: BackgroundCopies, copy: Any, say: Any, kept: str, interval: float) -> None:
        begin(copies, copy, say, kept, min(interval, 0.02))

    with (
        mock.patch.object(BackgroundCopies, "__init__", often),
        mock.patch.object(Bucket, "upload", _slowly(Bucket.upload, seconds)),
        mock.patch.object(Bucket, "write", _slowly(Bucket.write, seconds)),
    ):
        yield


@contextlib.contextmanager
def disturbed(disturbance: Disturbance) -> Iterator[Callable[[str], None]]:
    """While it is open, a training in this process is disturbed; gives what wants to be told of each phase."""
    from spt_jax.data.loader import DialogueLoader
    from spt_jax.training import run_training

    with contextlib.ExitStack() as patches:
        on_phase: Callable[[str], None] = lambda phase: None  # noqa: E731
        if disturbance.clock_seed is not None:
            clock = JumpingClock(disturbance.clock_seed)
            on_phase = clock.jump
            patches.enter_context(mock.patch.object(time, "time", clock.time))
            patches.enter_context(mock.patch.object(time, "time_ns", clock.time_ns))
        if disturbance.nan_until:
            make = _sometimes_nan(run_training.make_train_step, disturbance)
            patches.enter_context(mock.patch.object(run_training, "make_train_step", make))
        if disturbance.raise_at >= 0:
            batch = _raising(DialogueLoader.batch, disturbance)
            patches.enter_context(mock.patch.object(DialogueLoader, "batch", batch))
        if disturbance.copy_seconds:
            patches.enter_context(_slow_network(disturbance.copy_seconds))
        yield on_phase
