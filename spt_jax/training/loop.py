"""The training loop. Its order is sacred: evaluate, save (state and data position together), then the next batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import jax
import numpy as np

from spt_jax.errors import UserError
from spt_jax.parallel.distributed import SharedFlag, is_lead
from spt_jax.progress import ProgressBar
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_record import METRIC
from spt_jax.training.collapse import CollapseAlarm
from spt_jax.training.signals import StopSignal
from spt_jax.training.step import Metrics, TrainState
from spt_jax.training.tracking import Tracker

PERPLEXITY = "development/perplexity"
PENDING = "evaluation_pending"
"""In the JSON values of a checkpoint: whoever asked the run to stop did not wait for the evaluation that was due."""
UNTRACED_STEPS = 2
"""Steps of a start before its trace begins: they compile, and settle."""


class Evaluator(Protocol):
    """Measures a state; the loop knows nothing else of evaluation."""

    def run(self, state: TrainState, between: Callable[[], None]) -> Iterable[tuple[str, float]]:
        """Named figures; ``development/perplexity`` decides which checkpoint is best.

        Args:
            state: What is measured.
            between: Called between two batches, on every process; raises where the run was asked to stop.
        """
        ...


class _StoppedError(Exception):
    """The run was asked to stop in the middle of an evaluation."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When things happen, in steps; see the section ``train`` of the configuration."""

    total_steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    max_bad_steps: int
    profile_steps: int = 0
    profile_dir: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last state and whether every step and evaluation was done (False after a stop signal)."""

    state: TrainState
    finished: bool


def save(checkpoints: Checkpoints, state: TrainState, meta: Mapping[str, Any], perplexity: float | None) -> None:
    """Saves a state under its step."""
    counters = {"step": state.step, "skipped": state.skipped, "bad_in_a_row": state.bad_in_a_row}
    optimizer = {"state": state.optimizer, "counters": counters}
    checkpoints.save(int(state.step), state.trainable, optimizer, dict(meta), perplexity)


def evaluation_pending(checkpoints: Checkpoints, step: int, total_steps: int) -> bool:
    """Whether a saved step lacks an evaluation; every process must ask.

    It was due when the step was saved at a polite stop, or it is the last one: of a run whose steps were lowered, so
    that none remains after this one.

    Args:
        checkpoints: Of the run.
        step: The restored step; one that is not saved lacks nothing.
        total_steps: Of the whole run.
    """
    meta = checkpoints.meta(str(step)) if step in checkpoints.steps() else None
    if meta is None or meta.get(METRIC) is not None:
        return False
    return step >= total_steps or meta.get(PENDING, False)


def train(
    state: TrainState,
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]],
    params: Any,
    batches: Callable[[int, int], Iterator[tuple[int, Mapping[str, np.ndarray]]]],
    place: Callable[[Mapping[str, np.ndarray]], Any],
    *,
    options: LoopOptions,
    checkpoints: Checkpoints,
    trackers: Sequence[Tracker],
    evaluators: Sequence[Evaluator],
    meta: Mapping[str, Any],
    stop: StopSignal,
) -> Outcome:
    """Trains from ``state.step`` to ``options.total_steps``; a state that is there, or further, is evaluated at most.

    Args:
        state: The state, fresh or restored; donated.
        step_fn: See `spt_jax.training.step.make_train_step`.
        params: The frozen tree.
        batches: ``(start, stop) -> (step, host batch)`` pairs; a pure function of the step.
        place: Puts a host batch onto the devices.
        options: When things happen.
        checkpoints: Where states are saved.
        trackers: Where metrics go.
        evaluators: What is measured every ``evaluate_every`` steps, before the first and after the last.
        meta: JSON values kept beside each checkpoint.
        stop: Asked before every step, and between the batches of an evaluation.

    Raises:
        UserError: ``max_bad_steps`` updates in a row were not finite, or a checkpoint could not be written.
    """
    start = int(state.step)
    end = max(start, options.total_steps)  # a run may be shortened to less than it has done
    alarm = CollapseAlarm()
    bar = ProgressBar("training", end, start, shown=is_lead())
    asked = SharedFlag()
    pending = evaluation_pending(checkpoints, start, options.total_steps)
    interrupted = False

    def between() -> None:
        if asked.ask(stop.requested):
            raise _StoppedError

    with bar, _Watch(options, trackers) as watch:
        steps = batches(start, end)
        for step in range(start, end + 1):
            last = step == end
            watch.end_trace(step - start, last)
            perplexity: float | None = None
            stopping = asked.ask(stop.requested) and not last
            # Who asks a run to stop may not wait for an evaluation; the next start makes up for it.
            scheduled = last or step % options.evaluate_every == 0
            due = scheduled and not stopping
            new = step > start or step not in checkpoints.steps()
            if due and (new or pending):
                watch.finish(bar)
                try:
                    perplexity = _evaluate(state, evaluators, trackers, step, bar, alarm, between)
                    stopping = asked.ask(stop.requested)
                except _StoppedError:
                    due, stopping, interrupted = False, True, True
            if new and (due or stopping or step % options.save_every == 0):
                watch.finish(bar)  # a step's metrics must be on disk before its checkpoint
                save(checkpoints, state, {**meta, PENDING: scheduled and not due}, perplexity)
            elif perplexity is not None:
                checkpoints.rate(step, perplexity)
            if last or stopping:
                break
            watch.begin_trace(step - start)
            _, batch = next(steps)
            state, metrics = step_fn(state, params, place(batch))
            watch.submitted(step + 1, metrics, bar)
        watch.finish(bar)
        if options.profile_steps and end - start <= UNTRACED_STEPS:
            left = f"begins after {UNTRACED_STEPS} steps, and {end - start} of the run were left"
            bar.message(f"train.profile_steps: there is no trace; it {left}")
        checkpoints.wait()
    return Outcome(state, finished=int(state.step) == end and not interrupted)


def _evaluate(
    state: TrainState,
    evaluators: Sequence[Evaluator],
    trackers: Sequence[Tracker],
    step: int,
    bar: ProgressBar,
    alarm: CollapseAlarm,
    between: Callable[[], None],
) -> float | None:
    figures = {name: value for evaluator in evaluators for name, value in evaluator.run(state, between)}
    for tracker in trackers:
        tracker.log(step, figures)
    if PERPLEXITY in figures:
        bar.message(f"step {step}: development perplexity {figures[PERPLEXITY]:.3f}")
    # A retriever that has learned nothing yet may well prefer one prompt.
    if step and (sentence := alarm.sentence(figures)):
        bar.message(f"step {step}: {sentence}")
    return figures.get(PERPLEXITY)


class _Watch:
    """Reads each step's metrics one step late, so that the device never waits for the host."""

    def __init__(self, options: LoopOptions, trackers: Sequence[Tracker]) -> None:
        self._options, self._trackers = options, trackers
        self._pending: tuple[int, Metrics] | None = None
        self._clock = time.perf_counter()
        self._tracing = False

    def submitted(self, step: int, metrics: Metrics, bar: ProgressBar) -> None:
        pending, self._pending = self._pending, (step, metrics)
        if pending is not None:
            self._read(pending, bar)

    def finish(self, bar: ProgressBar) -> None:
        """Reads what is pending and leaves the time until the next step (evaluation, saving) out of the rates."""
        if self._pending is not None:
            self._read(self._pending, bar)
            self._pending = None
        self._clock = time.perf_counter()

    def _read(self, pending: tuple[int, Metrics], bar: ProgressBar) -> None:
        step, on_device = pending
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        metrics |= {"tokens_per_second": metrics["tokens"] / seconds, "turns_per_second": metrics["turns"] / seconds}
        if step % self._options.log_every == 0 or step == self._options.total_steps:
            for tracker in self._trackers:
                tracker.log(step, metrics)
        bar.advance(1, f"loss {metrics['loss/total']:.4f} · {metrics['tokens_per_second']:,.0f} tokens/s")
        if metrics["bad_in_a_row"]:
            bar.message(f"step {step}: the loss or its gradient is not finite; the update was skipped")
        if metrics["bad_in_a_row"] >= self._options.max_bad_steps:
            raise UserError(
                f"{self._options.max_bad_steps} steps in a row (up to step {step}) gave a loss or gradient that is not "
                "finite, so the run stopped; every one was skipped and the checkpoints are intact. Lower "
                "optimizer.learning_rate or use model.dtype = float32, in a new workdir"
            )

    def __enter__(self) -> _Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracing:
            self._end_trace()

    def begin_trace(self, done: int) -> None:
        """Begins the trace of this start's steps, before the first one that is traced."""
        if self._options.profile_steps and done == UNTRACED_STEPS:
            Path(self._options.profile_dir).mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._options.profile_dir)
            self._tracing = True

    def end_trace(self, done: int, last: bool) -> None:
        """Ends it behind `profile_steps` steps or the last one, before what follows, such as an evaluation."""
        if self._tracing and (last or done == UNTRACED_STEPS + self._options.profile_steps):
            self._end_trace()

    def _end_trace(self) -> None:
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
        jax.profiler.stop_trace()
        self._tracing = False
