"""The order of the loop, and what it does when something goes wrong."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from spt_jax.errors import UserError
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch, replicated
from spt_jax.prompting.objective import Objective
from spt_jax.training import step as step_module
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import restore_targets
from spt_jax.training.loop import LoopOptions, Outcome, evaluation_pending, train
from spt_jax.training.signals import StopSignal
from spt_jax.training.step import TrainState, init_state, make_train_step
from spt_jax.training.tracking import JsonLines


def one_device() -> Any:
    return make_mesh(devices=jax.devices()[:1])


class Run:
    """A loop whose parts write down when they are called; the model is a single number that falls by 1 a step."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        steps: dict[str, int] = {"total_steps": 7, "log_every": 1, "evaluate_every": 3, "save_every": 2}
        self.options = LoopOptions(**{**steps, "max_bad_steps": 3, **changes})
        self.folder = folder
        self.events: list[str] = []
        self.stop = StopSignal()
        self.stop_at: str = ""
        self.bad_steps: set[int] = set()
        self.on_disk: list[int] = []
        self.keep_latest = 99
        self.evaluation_batches = 1
        self.perplexity: Callable[[int], float] = lambda step: 100.0 - step

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self.stop_at:
            self.stop.requested = True

    def run(self, state: Any, between: Callable[[], None]) -> list[tuple[str, float]]:
        step = int(state.step)
        self.note(f"evaluate {step}")
        for batch in range(1, self.evaluation_batches):
            between()
            self.note(f"evaluate {step} further {batch}")
        return [("development/perplexity", self.perplexity(step)), ("development/w", float(state.trainable["w"]))]

    def log(self, step: int, metrics: Any) -> None:
        self.note(f"log {step}" if "loss/total" in metrics else f"log evaluation {step}")
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.note("close")

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        for step in range(start, stop):
            self.note(f"batch {step}")
            yield step, {"x": np.float32(step)}

    def step(self, state: TrainState, params: Any, batch: Any) -> tuple[TrainState, Any]:
        number = int(state.step)
        assert float(batch["x"]) == number
        self.note(f"step {number}")
        bad = number in self.bad_steps
        new = TrainState(
            {"w": state.trainable["w"] - (0 if bad else 1)},
            state.optimizer,
            state.step + 1,
            state.skipped + bad,
            (state.bad_in_a_row + 1) * bad,
        )
        loss = jnp.asarray(math.nan if bad else 1.0)
        counted = {"skipped": new.skipped, "bad_in_a_row": new.bad_in_a_row}
        return new, {"loss/total": loss, "tokens": 10, "turns": 2} | counted

    def go(self, start: TrainState | None = None) -> Outcome:
        self.rows: list[tuple[int, dict[str, float]]] = []
        run = self

        class Noting(Checkpoints):
            def save(self, step: int, *arguments: Any) -> None:
                run.note(f"save {step}")
                super().save(step, *arguments)

        with Noting(self.folder, keep_latest=self.keep_latest) as checkpoints:
            state = start or init_state({"w": jnp.asarray(50.0)}, optax.sgd(0.1), one_device())
            try:
                return train(
                    state,
                    self.step,
                    None,
                    self.batches,
                    lambda batch: batch,
                    options=self.options,
                    checkpoints=checkpoints,
                    trackers=[self],
                    evaluators=[self],
                    meta={"who": "test"},
                    stop=self.stop,
                )
            finally:
                checkpoints.wait()
                self.on_disk = checkpoints.steps()

    def happened(self, *kinds: str) -> list[str]:
        return [event for event in self.events if event.split()[0] in kinds]

    def restored(self) -> TrainState:
        state = init_state({"w": jnp.asarray(0.0)}, optax.sgd(0.1), one_device())
        counters = {"step": state.step, "skipped": state.skipped, "bad_in_a_row": state.bad_in_a_row}
        saved = {"trainable": state.trainable, "optimizer": {"state": state.optimizer, "counters": counters}}
        with Checkpoints(self.folder, read_only=True) as checkpoints:
            found = checkpoints.restore("latest", restore_targets(saved, replicated(one_device())))
        assert found is not None
        trees = found[1]
        return TrainState(trees["trainable"], trees["optimizer"]["state"], **trees["optimizer"]["counters"])


def test_evaluate_then_save_then_the_next_batch(tmp_path):
    run = Run(tmp_path)
    outcome = run.go()
    assert outcome.finished
    assert float(outcome.state.trainable["w"]) == 43.0
    assert run.happened("evaluate", "save", "batch", "step") == [
        "evaluate 0",
        "save 0",
        "batch 0",
        "step 0",
        "batch 1",
        "step 1",
        "save 2",
        "batch 2",
        "step 2",
        "evaluate 3",
        "save 3",
        "batch 3",
        "step 3",
        "save 4",
        "batch 4",
        "step 4",
        "batch 5",
        "step 5",
        "evaluate 6",
        "save 6",
        "batch 6",
        "step 6",
        "evaluate 7",
        "save 7",
    ]
    assert run.on_disk == [0, 2, 3, 4, 6, 7]


def test_a_steps_metrics_are_logged_before_its_checkpoint_is_saved(tmp_path):
    run = Run(tmp_path)
    run.go()
    logged = set()
    for event in run.events:
        kind, number = event.split()[0], int(event.split()[-1])
        if kind == "log" and "evaluation" not in event:
            logged.add(number)
        if kind in ("save", "evaluate"):
            assert logged == set(range(1, number + 1)), event


def test_every_row_is_logged_once_and_in_order(tmp_path):
    run = Run(tmp_path, log_every=2)
    run.go()
    training = [step for step, row in run.rows if "loss/total" in row]
    assert training == [2, 4, 6, 7]
    evaluations = {step: row["development/w"] for step, row in run.rows if "development/w" in row}
    assert evaluations == {0: 50.0, 3: 47.0, 6: 44.0, 7: 43.0}
    assert all(row["tokens_per_second"] > 0 and row["turns_per_second"] > 0 for _, row in run.rows if "tokens" in row)


def test_perplexity_goes_to_the_checkpoint_of_its_own_step_alone(tmp_path):
    Run(tmp_path).go()
    found = {p.parent.parent.name: json.loads(p.read_text())["perplexity"] for p in tmp_path.glob("*/metrics/metrics")}
    assert found == {"0": 100.0, "3": 97.0, "6": 94.0, "7": 93.0}


@pytest.mark.parametrize("stop_at", ["step 0", "step 1", "step 2", "step 4", "evaluate 3", "save 2", "log 4"])
def test_a_stop_finishes_the_step_saves_it_and_the_rest_is_as_if_nothing_had_happened(tmp_path, stop_at):
    whole = Run(tmp_path / "whole")
    whole.go()
    run = Run(tmp_path / "stopped")
    run.stop_at = stop_at
    outcome = run.go()
    done = int(outcome.state.step)
    assert not outcome.finished
    assert run.on_disk[-1] == done
    assert len(run.happened("step")) == done < 7
    assert [step for step, row in run.rows if "loss/total" in row] == list(range(1, done + 1))
    assert float(run.restored().trainable["w"]) == 50.0 - done

    again = Run(tmp_path / "stopped")
    ended = again.go(run.restored())
    assert ended.finished
    assert float(ended.state.trainable["w"]) == 43.0
    assert run.happened("step") + again.happened("step") == whole.happened("step")
    assert run.happened("batch") + again.happened("batch") == whole.happened("batch")


def test_a_stop_during_an_evaluation_does_not_take_another_batch(tmp_path):
    run = Run(tmp_path)
    run.stop_at = "evaluate 3"
    run.go()
    assert run.events[-1] == "save 3"
    assert json.loads((tmp_path / "3" / "metrics" / "metrics").read_text()) == {"perplexity": 97.0}


def test_a_stop_does_not_wait_for_an_evaluation(tmp_path):
    run = Run(tmp_path)
    run.stop_at = "step 2"
    run.go()
    assert run.happened("evaluate") == ["evaluate 0"]
    assert run.on_disk[-1] == 3


@pytest.mark.parametrize(("step", "saved"), [(0, [0]), (3, [0, 2, 3]), (7, [0, 2, 3, 4, 6, 7])])
def test_a_stop_in_an_evaluation_saves_at_once_and_the_next_start_makes_up_for_it(tmp_path, step, saved):
    run = Run(tmp_path)
    run.evaluation_batches, run.stop_at = 3, f"evaluate {step} further 1"
    outcome = run.go()
    assert not outcome.finished and int(outcome.state.step) == step
    assert run.events[-2:] == [f"evaluate {step} further 1", f"save {step}"]
    assert run.on_disk == saved
    again = Run(tmp_path)
    assert again.go(run.restored()).finished
    assert again.events[0] == f"evaluate {step}"
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.meta(str(step)) or {})["perplexity"] == 100.0 - step


def test_a_stop_in_an_evaluation_that_is_made_up_for_leaves_it_to_come(tmp_path):
    run = Run(tmp_path)
    run.stop_at = "step 2"
    run.go()
    again = Run(tmp_path)
    again.evaluation_batches, again.stop_at = 3, "evaluate 3 further 1"
    assert not again.go(run.restored()).finished
    assert again.happened("save", "step", "log") == []
    last = Run(tmp_path)
    assert last.go(run.restored()).finished
    assert last.happened("evaluate") == ["evaluate 3", "evaluate 6", "evaluate 7"]


def test_the_next_start_makes_up_for_an_evaluation_that_a_stop_did_not_wait_for(tmp_path):
    run = Run(tmp_path)
    run.stop_at = "step 2"
    run.go()
    again = Run(tmp_path)
    again.stop_at = "evaluate 3"
    assert not again.go(run.restored()).finished
    assert again.happened("evaluate", "save", "step") == ["evaluate 3"]
    last = Run(tmp_path)
    assert last.go(run.restored()).finished
    assert last.happened("evaluate") == ["evaluate 6", "evaluate 7"]


def test_a_run_stopped_at_its_best_step_has_the_same_best_as_one_that_was_not(tmp_path):
    kept = {}
    for name in ("whole", "stopped"):
        for stop_at in ("step 2", "") if name == "stopped" else ("",):
            run = Run(tmp_path / name)
            run.keep_latest, run.stop_at = 1, stop_at
            run.perplexity = lambda step: 10.0 + abs(step - 3)
            run.go(run.restored() if run.folder.exists() else None)
        with Checkpoints(run.folder, read_only=True) as checkpoints:
            kept[name] = [(step, (checkpoints.meta(str(step)) or {})["perplexity"]) for step in run.on_disk]
            assert next(checkpoints.candidates("best")) == 3
    assert kept["stopped"] == kept["whole"] == [(3, 10.0), (7, 14.0)]


def test_a_stop_before_the_first_step_leaves_a_run_to_resume(tmp_path):
    run = Run(tmp_path)
    run.stop.requested = True
    assert not run.go().finished
    assert run.events == ["save 0"]


def test_a_run_resumed_at_step_0_does_not_evaluate_and_save_it_again(tmp_path):
    run = Run(tmp_path)
    run.stop_at = "evaluate 0"
    run.go()
    assert run.on_disk == [0]
    again = Run(tmp_path)
    assert again.go(run.restored()).finished
    assert again.events[:2] == ["batch 0", "step 0"]
    assert again.on_disk == [0, 2, 3, 4, 6, 7]


def test_a_stop_at_the_last_step_is_a_finished_run(tmp_path):
    run = Run(tmp_path)
    run.stop_at = "step 6"
    assert run.go().finished
    assert run.happened("evaluate", "save")[-2:] == ["evaluate 7", "save 7"]


def test_a_finished_run_started_again_does_nothing(tmp_path):
    run = Run(tmp_path)
    run.go()
    again = Run(tmp_path)
    assert again.go(run.restored()).finished
    assert again.events == []


def shortened(folder: Path, total_steps: int) -> Run:
    """The start with fewer steps of a run that was stopped at step 5, between two evaluations."""
    run = Run(folder)
    run.stop_at = "step 4"
    run.go()
    again = Run(folder, total_steps=total_steps)
    again.perplexity = lambda step: 10.0
    return again


@pytest.mark.parametrize("total_steps", [5, 4, 1])
def test_a_run_shortened_to_what_it_has_done_is_evaluated_and_rated_once(tmp_path, total_steps):
    run = shortened(tmp_path, total_steps)
    outcome = run.go(run.restored())
    assert outcome.finished and int(outcome.state.step) == 5
    assert run.events == ["evaluate 5", "log evaluation 5"]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert next(checkpoints.candidates("best")) == 5
        assert (checkpoints.meta("best") or {})["perplexity"] == 10.0
    again = Run(tmp_path, total_steps=total_steps)
    assert again.go(run.restored()).finished
    assert again.events == []


@pytest.mark.parametrize("total_steps", [5, 4])
def test_a_stop_in_the_evaluation_of_a_shortened_run_leaves_it_to_come(tmp_path, total_steps):
    run = shortened(tmp_path, total_steps)
    run.evaluation_batches, run.stop_at = 3, "evaluate 5 further 1"
    assert not run.go(run.restored()).finished
    assert run.happened("save", "step", "log") == []
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert evaluation_pending(checkpoints, 5, total_steps)
        assert not evaluation_pending(checkpoints, 5, 7), "nothing is missed where the run goes on"
    last = Run(tmp_path, total_steps=total_steps)
    assert last.go(run.restored()).finished
    assert last.happened("evaluate") == ["evaluate 5"]


def test_bad_steps_in_a_row_stop_the_run_and_leave_the_checkpoint(tmp_path):
    run = Run(tmp_path, total_steps=20, evaluate_every=100, save_every=4)
    run.bad_steps = {1, 3, *range(9, 20)}
    with pytest.raises(UserError) as told:
        run.go()
    assert "3 steps in a row (up to step 12)" in str(told.value)
    assert "not finite" in str(told.value)
    # The report of a step is read while the next one runs.
    assert run.happened("step")[-1] in ("step 11", "step 12")
    assert run.on_disk == [0, 4, 8]
    assert float(run.restored().trainable["w"]) == 50.0 - 6
    assert int(run.restored().skipped) == 2


def test_scattered_bad_steps_do_not_stop_the_run(tmp_path, capsys):
    run = Run(tmp_path)
    run.bad_steps = {0, 1, 3, 4, 6}
    outcome = run.go()
    assert outcome.finished
    assert int(outcome.state.skipped) == 5
    assert capsys.readouterr().err.count("the update was skipped") == 5
    assert [row["skipped"] for _, row in run.rows if "skipped" in row] == [1, 2, 2, 3, 4, 4, 5]


def test_a_trace_is_written_of_the_steps_asked_for(tmp_path):
    run = Run(tmp_path / "c", profile_steps=2, profile_dir=str(tmp_path / "profile"))
    run.go()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(("steps", "traced"), [(1, [2]), (2, [2, 3]), (50, [2, 3, 4, 5, 6])])
def test_a_trace_holds_its_steps_and_no_evaluation_or_saving_behind_the_last(monkeypatch, tmp_path, steps, traced):
    run = Run(tmp_path / "c", evaluate_every=100, save_every=3, profile_steps=steps, profile_dir=str(tmp_path / "p"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: run.note("trace begins"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: run.note("trace ends"))
    run.go()
    assert [event for event in run.events if event.startswith("trace")] == ["trace begins", "trace ends"]
    within = run.events[run.events.index("trace begins") + 1 : run.events.index("trace ends")]
    assert [event for event in within if event.startswith("step")] == [f"step {number}" for number in traced]
    assert not any(event.startswith("evaluate") for event in within)
    assert ("save 3" in within) == (len(traced) > 1)


def test_a_run_too_short_for_a_trace_says_so(tmp_path, capsys):
    Run(tmp_path / "c", total_steps=2, profile_steps=1, profile_dir=str(tmp_path / "p")).go()
    said = " ".join(capsys.readouterr().err.split())
    assert "train.profile_steps: there is no trace; it begins after 2 steps, and 2 of the run were left" in said
    assert not (tmp_path / "p").exists()


def test_a_trace_longer_than_the_run_is_still_written(tmp_path):
    run = Run(tmp_path / "c", profile_steps=50, profile_dir=str(tmp_path / "profile"))
    run.go()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_cut_short_by_an_error_leaves_the_profiler_free(tmp_path):
    run = Run(tmp_path / "c", profile_steps=50, profile_dir=str(tmp_path / "one"), max_bad_steps=1)
    run.bad_steps = {4}
    with pytest.raises(UserError):
        run.go()
    test_a_trace_is_written_of_the_steps_asked_for(tmp_path / "two")


@pytest.mark.parametrize(("loss", "gradient"), [(1.0, math.inf), (1.0, math.nan), (math.nan, 0.0), (math.inf, 0.0)])
def test_either_a_loss_or_a_gradient_that_is_not_finite_skips_a_step(monkeypatch, loss, gradient):
    real = step_module.losses_and_gradients

    def one_is_not(*arguments: Any) -> Any:
        losses, gradients = real(*arguments)
        return losses._replace(total=jnp.full_like(losses.total, loss)), jax.tree.map(
            lambda x: jnp.full_like(x, gradient), gradients
        )

    monkeypatch.setattr(step_module, "losses_and_gradients", one_is_not)
    mesh, optimizer = one_device(), optax.adam(0.1)
    step = make_train_step(tiny.MODEL, Objective(), optimizer, mesh)
    host = {name: np.asarray(x) for name, x in tiny.packed("dialogue").batch().items()}
    state = init_state(tiny.trainable(), optimizer, mesh)
    before = jax.device_get((state.trainable, state.optimizer))
    after, metrics = step(state, jax.device_put(tiny.params(), replicated(mesh)), place_batch(mesh, host))
    assert (int(after.skipped), int(metrics["bad_in_a_row"])) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((after.trainable, after.optimizer)), before)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(tmp_path):
    """The real step: a frozen LM whose head is NaN at step 1 and from step 3 on."""
    mesh = one_device()
    optimizer = optax.adam(0.1)
    compiled = make_train_step(tiny.MODEL, Objective(), optimizer, mesh)
    good = jax.device_put(tiny.params(), replicated(mesh))
    bad = {**good, "lm_head": good["lm_head"] * math.nan}
    host = {name: np.asarray(x) for name, x in tiny.packed("dialogue").batch().items()}
    seen: list[Any] = []

    def step(state: TrainState, params: Any, batch: Any) -> Any:
        chosen = params[1] if int(state.step) in (1, 3, 4, 5, 6) else params[0]
        seen.append(jax.device_get((state.trainable, state.optimizer)))
        return compiled(state, chosen, batch)

    state = init_state(tiny.trainable(), optimizer, mesh)
    metrics = tmp_path / "metrics.jsonl"
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        contextlib.closing(JsonLines(metrics, -1)) as tracker,
        pytest.raises(UserError, match=r"3 steps in a row"),
    ):
        train(
            state,
            step,
            (good, bad),
            lambda start, stop: zip(range(start, stop), itertools.repeat(host)),
            lambda batch: place_batch(mesh, batch),
            options=LoopOptions(20, 1, 100, 100, max_bad_steps=3),
            checkpoints=checkpoints,
            trackers=[tracker],
            evaluators=[],
            meta={},
            stop=StopSignal(),
        )
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    training = [row for row in rows if "loss/total" in row]
    assert [row["loss/total"] is None for row in training] == [False, True, False, True, True, True]
    assert [row["skipped"] for row in training] == [0, 1, 1, 2, 3, 4]
    assert [row["bad_in_a_row"] for row in training] == [0, 1, 0, 1, 2, 3]
    assert tiny.relative_difference(seen[1], seen[2]) == 0
    assert tiny.relative_difference(seen[3], seen[4]) == 0
    assert tiny.relative_difference(seen[0], seen[1]) > 0
    assert tiny.relative_difference(seen[2], seen[3]) > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(seen))


def test_a_selection_that_collapses_is_told_once_while_the_training_goes_on(tmp_path, capsys):
    run = Run(tmp_path / "run", total_steps=9)
    perplexity = run.run

    def settled(state: Any, between: Callable[[], None]) -> list[tuple[str, float]]:
        share = 0.98 if int(state.step) else 0.5
        usage = [("development/usage/0", 1 - share), ("development/usage/1", share)]
        return perplexity(state, between) + usage

    run.run = settled
    assert run.go().finished
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("answers 98% of the development turns") == 1
    assert "step 3: prompt 1 answers" in told
