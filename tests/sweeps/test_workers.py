"""Workers that are killed, stopped and woken lose no trial, run none twice, and end where undisturbed ones end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from optuna.trial import TrialState, create_trial
from stand_in import OVERLAP, STAND_IN_FINISHED
from stand_in_sweep import metrics, outcome, processes, start_worker, work, workplace, write_sweep

from spt_jax.sweeps.locked import holder_here
from spt_jax.sweeps.worker import ERROR, Workplace, trial_folder

pytestmark = pytest.mark.first_python

Seen = TypeVar("Seen")


def wait_until(seen: Callable[[], Seen], seconds: float = 240.0) -> Seen:
    """What is seen, once it is something."""
    began = time.monotonic()
    while not (found := seen()):
        assert time.monotonic() - began < seconds, "it did not come"
        time.sleep(0.02)
    return found


@contextmanager
def ended(workers: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever a test leaves running is killed."""
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def assert_each_point_once(at: Workplace, undisturbed: Workplace) -> None:
    """Every combination is complete once, its metrics are those of an undisturbed run, no two processes met."""
    assert outcome(at) == outcome(undisturbed)
    for trial in range(at.num_trials):
        assert metrics(at, trial) == metrics(undisturbed, trial)
        notes = processes(at, trial)
        assert OVERLAP not in notes
        # A worker may be lost after a run has finished and before it says so: then nothing is trained again.
        end = notes.index(STAND_IN_FINISHED)
        assert all(note.endswith("at step 8") for note in notes[end + 1 :] if note != STAND_IN_FINISHED)


def test_a_grid_is_every_combination_once(undisturbed):
    found = outcome(undisturbed)
    points = [(params["optimizer.learning_rate"], params["bank.num_prompts"]) for _, params, _, _ in found.values()]
    assert points == [(rate, prompts) for rate in (0.01, 0.03) for prompts in (2, 3)]
    assert {state for state, *_ in found.values()} == {"COMPLETE"}
    assert min(found, key=lambda number: found[number][2] or 0) == 3


def places_at_work(at: Workplace, workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Those of the workers whose run has begun its steps and not finished them."""
    places = {str(worker.pid): place for place, worker in enumerate(workers)}
    found = []
    for trial in range(at.num_trials):
        holder, notes = holder_here(trial_folder(at.folder, trial) / "seed_0.lock"), processes(at, trial)
        if STAND_IN_FINISHED not in notes and any(note.startswith(f"process {holder} begins") for note in notes):
            parent = subprocess.run(
                ["ps", "-o", "ppid=", "-p", str(holder)], capture_output=True, text=True, check=False
            )
            found += [place for pid, place in places.items() if pid == parent.stdout.strip()]
    return found


def disturb(file: Path, storage: str, at: Workplace, kills: int, draws: random.Random) -> None:
    """Three workers, killed with -9 one after another and replaced: first one at work, then any at random moments."""
    workers = [start_worker(file, storage, step=0.2) for _ in range(3)]
    with ended(workers):
        for kill in range(kills):
            if kill:
                time.sleep(draws.uniform(0.1, 1.5))
                place = draws.randrange(3)
            else:
                place = wait_until(lambda: places_at_work(at, workers))[0]
            workers[place].kill()
            workers[place].wait()
            workers[place] = start_worker(file, storage, step=0.2)
        for worker in workers:
            assert worker.wait(120) == 0, (file.parent / "worker.txt").read_text()
    begun = [sum("begins at step" in note for note in processes(at, trial)) for trial in range(at.num_trials)]
    assert max(begun) > 1, "no kill met a trial at work"


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.campaign)])
def test_with_workers_killed_at_random_every_combination_is_complete_exactly_once(tmp_path, undisturbed, kills):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    disturb(file, "", at, kills, random.Random(kills))
    assert_each_point_once(at, undisturbed)


def test_a_worker_that_was_stopped_and_wakes_leaves_its_trial_to_who_took_it_over(tmp_path, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    sleeper = start_worker(file, seconds=5.0, step=0.3)
    workers = [sleeper]
    with ended(workers):
        wait_until(lambda: len(processes(at, 0)) == 1)
        sleeper.send_signal(signal.SIGSTOP)
        holder = holder_here(trial_folder(at.folder, 0) / "seed_0.lock")
        assert holder is not None
        os.kill(holder, signal.SIGSTOP)  # its run too: it cannot give up the folder by itself
        workers.append(start_worker(file, seconds=5.0, step=0.05))
        wait_until(lambda: len(processes(at, 0)) == 2)
        sleeper.send_signal(signal.SIGCONT)
        for worker in workers:
            assert worker.wait(60) == 0
    assert "trial 0: another worker has it by now" in (tmp_path / "worker.txt").read_text()
    assert_each_point_once(at, undisturbed)


def test_a_run_whose_worker_was_killed_is_ended_before_it_is_taken_up_again(tmp_path, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    first = start_worker(file, step=0.5)
    with ended([first]):
        wait_until(lambda: len(processes(at, 0)) == 1)
    lock = trial_folder(at.folder, 0) / "seed_0.lock"
    orphan = holder_here(lock)
    assert orphan is not None
    work(file)
    assert holder_here(lock) is None
    assert_each_point_once(at, undisturbed)


@pytest.mark.parametrize(
    ("ending", "told"),
    [(signal.SIGKILL, "was killed by signal 9 3 times"), (signal.SIGTERM, "was stopped 3 times from outside")],
)
def test_a_run_ended_behind_its_workers_back_goes_on_and_one_that_always_ends_speaks_against_the_machine(
    tmp_path, ending, told
):
    at = workplace(
        write_sweep(
            tmp_path / "sweep.py", 'space={"bank.num_prompts": CategoricalDistribution([3])}, sampler="grid"', steps=30
        )
    )
    worker = start_worker(tmp_path / "sweep.py", step=0.1)
    with ended([worker]):
        for begun in range(1, 7):  # two runs, each started three times
            wait_until(lambda begun=begun: len(processes(at, 0)) == begun)
            holder = holder_here(trial_folder(at.folder, 0) / "seed_0.lock")
            with suppress(ProcessLookupError):
                os.kill(holder or 0, ending)
            assert at.trials()[0].state == TrialState.RUNNING
        assert worker.wait(60) == 1
    assert "no trial has ended well on this machine" in (tmp_path / "worker.txt").read_text()
    (trial,) = at.trials()
    assert trial.state == TrialState.RUNNING
    assert told in trial.user_attrs[ERROR]


def test_a_polite_stop_gives_the_trial_back_at_once(tmp_path, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    worker = start_worker(file, seconds=3600.0, step=0.3)
    with ended([worker]):
        wait_until(lambda: len(processes(at, 0)) == 1)
        worker.terminate()
        assert worker.wait(30) == 0
    assert "trial 0: stopped, saved" in (tmp_path / "worker.txt").read_text()
    work(file, seconds=3600.0)
    assert not processes(at, 0)[1].endswith("at step 0")
    assert_each_point_once(at, undisturbed)


def test_a_failing_trial_is_told_and_the_others_finish(tmp_path):
    fields = 'space={"optimizer.weight_decay": CategoricalDistribution([0.1, 0.0])}, sampler="grid", seeds=(0, 1)'
    at = work(write_sweep(tmp_path / "sweep.py", fields, steps=2))
    failed, complete = at.trials()
    assert failed.state == TrialState.FAIL and complete.state == TrialState.COMPLETE
    assert "exit code 2: train: this one cannot be trained" in failed.user_attrs[ERROR]


def test_a_trials_value_is_the_mean_of_its_seeds_best(tmp_path):
    fields = 'space={"bank.num_prompts": CategoricalDistribution([3])}, sampler="grid", seeds=(0, 7)'
    at = work(write_sweep(tmp_path / "sweep.py", fields, steps=3))
    best = [min(row["development/perplexity"] for row in metrics(at, 0, seed)) for seed in (0, 7)]
    assert best[1] - best[0] == pytest.approx(1.0)
    assert at.trials()[0].value == pytest.approx(sum(best) / 2)


def test_an_objective_of_results_json_is_a_figure_of_the_evaluated_run_and_a_wrong_name_is_told(tmp_path):
    for name in ("f1", "f2"):
        (tmp_path / name).mkdir()
        fields = f"""
            space={{"bank.num_prompts": CategoricalDistribution([3])}}, sampler="grid",
            objective=Objective({name!r}, "maximize", file="results.json"),
        """
        at = work(write_sweep(tmp_path / name / "sweep.py", fields, steps=2))
        (trial,) = at.trials()
        if name == "f1":
            assert trial.value == pytest.approx(100 - metrics(at, 0)[-1]["development/perplexity"])
        else:
            assert trial.state == TrialState.FAIL
            assert "has no number under 'f2'. Did you mean 'f1'?" in trial.user_attrs[ERROR]


def test_trials_beyond_the_sweeps_number_are_nobodys(tmp_path):
    """Processes that open a sweep at once may make one too many; numbers tell which."""
    file = write_sweep(tmp_path / "sweep.py", steps=1)
    at = workplace(file)
    at.study.add_trial(create_trial(state=TrialState.WAITING))
    work(file)
    states = [trial.state for trial in at.study.get_trials()]
    assert states == [TrialState.COMPLETE] * 4 + [TrialState.WAITING]
