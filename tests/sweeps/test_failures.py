"""A trial that fails is tried once more, elsewhere if it can be; a machine on which all fail uses no trial up."""

from __future__ import annotations

import errno
import signal
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState
from stand_in_sweep import outcome, processes, start_worker, work, workplace, write_sweep
from test_workers import assert_each_point_once, ended, wait_until

from spt_jax.errors import UserError
from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.locked import holder_here
from spt_jax.sweeps.process_identity import this_process
from spt_jax.sweeps.worker import ERROR, MOST_FAILURES, Worker, Workplace, trial_folder
from spt_jax.training import tracking
from spt_jax.training.signals import StopSignal

pytestmark = pytest.mark.first_python


def test_a_machine_on_which_every_run_fails_uses_no_trial_up(tmp_path, monkeypatch, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    monkeypatch.setenv("STAND_IN_BROKEN", "1")
    with pytest.raises(
        UserError,
        match=r"no trial has ended well on this machine, .* so: .*no accelerator",
    ):
        work(file)
    at = workplace(file)
    states = [(trial.state, ERROR in trial.user_attrs) for trial in at.trials()]
    assert states == [(TrialState.RUNNING, True)] * MOST_FAILURES + [(TrialState.WAITING, False)]
    monkeypatch.delenv("STAND_IN_BROKEN")
    work(file)
    assert_each_point_once(at, undisturbed)


def worker_elsewhere(at: Workplace, monkeypatch: pytest.MonkeyPatch, *, until: str = "") -> list[str]:
    """What a worker in this process says that takes itself for one on another machine; it stops at the line `until`."""
    monkeypatch.setattr("spt_jax.sweeps.worker.machine", lambda: "elsewhere")
    said, stop = [], StopSignal()

    def say(line: str) -> None:
        said.append(line)
        stop.requested = bool(until) and line.startswith(until)

    leases = Leases(at.storage.engine, at.study.study_name, "elsewhere 1 1 x", 60.0)
    Worker(at, leases, stop, say).work()
    return said


def test_a_machine_on_which_nothing_ended_well_leaves_its_trials_to_another(tmp_path, monkeypatch, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    healthy = start_worker(file, step=0.4)
    with ended([healthy]):
        wait_until(lambda: len(processes(at, 0)) == 1)
        monkeypatch.setenv("STAND_IN_BROKEN", "1")
        with pytest.raises(UserError, match="no trial has ended well on this machine"):
            worker_elsewhere(at, monkeypatch)
        assert healthy.wait(60) == 0
    assert_each_point_once(at, undisturbed)


def test_a_machine_that_breaks_uses_no_trial_up_that_a_worker_elsewhere_can_take(tmp_path, monkeypatch, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    worker_elsewhere(at, monkeypatch, until="trial 0: complete")
    monkeypatch.setenv("STAND_IN_BROKEN", "1")
    with monkeypatch.context() as whole:
        whole.delenv("STAND_IN_BROKEN")
        healthy = start_worker(file, step=0.3)
    with ended([healthy]):
        wait_until(lambda: len(processes(at, 1)) == 1)
        said = worker_elsewhere(at, monkeypatch)
        assert healthy.wait(60) == 0
    assert [line[:15] for line in said if "tried once more" in line] == ["trial 2: failed", "trial 3: failed"]
    assert_each_point_once(at, undisturbed)


@pytest.mark.parametrize("well", ["here", "elsewhere"])
def test_many_bad_trials_end_in_one_go_where_others_end_well(tmp_path, monkeypatch, well):
    decays = "[0.1, 0.2, 0.3, 0.4, 0.0]" if well == "elsewhere" else "[0.0, 0.1, 0.2, 0.3, 0.4]"
    fields = f'space={{"optimizer.weight_decay": CategoricalDistribution({decays})}}, sampler="grid"'
    file = write_sweep(tmp_path / "sweep.py", fields, steps=2)
    at = workplace(file)
    if well == "elsewhere":  # bad ones failed there too, before it left
        with monkeypatch.context() as patched, pytest.raises(UserError):
            worker_elsewhere(at, patched)
        with monkeypatch.context() as patched:
            monkeypatch.setenv("STAND_IN_SECONDS", "0.01")
            worker_elsewhere(at, patched, until="trial 4: complete")
    work(file)
    assert sorted(state for state, *_ in outcome(at).values()) == ["COMPLETE", *["FAIL"] * 4]


def test_several_workers_on_a_machine_on_which_every_run_fails_use_no_trial_up(tmp_path, monkeypatch, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    monkeypatch.setenv("STAND_IN_BROKEN", "1")
    for _ in range(2):  # those that are started anew find trials that have failed before
        workers = [start_worker(file) for _ in range(3)]
        with ended(workers):
            assert [worker.wait(60) for worker in workers] == [1, 1, 1]
        assert (tmp_path / "worker.txt").read_text().count("no trial has ended well on this machine") % 3 == 0
        assert TrialState.FAIL not in {trial.state for trial in at.trials()}
    monkeypatch.delenv("STAND_IN_BROKEN")
    work(file)
    assert_each_point_once(at, undisturbed)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_a_sentence(path: Path, _: str) -> None:
    try:
        full()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


@pytest.mark.parametrize(
    ("place", "failing"),
    [("spt_jax.sweeps.worker.write_atomically", full_in_a_sentence), ("spt_jax.sweeps.worker.Path.mkdir", full)],
)
def test_a_full_disk_that_the_worker_itself_meets_uses_no_trial_up(tmp_path, monkeypatch, undisturbed, place, failing):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    leases = Leases(at.storage.engine, at.study.study_name, this_process(), 60.0)
    with monkeypatch.context() as patched:
        patched.setattr(place, failing)
        with pytest.raises(UserError, match=r"no trial has ended well on this machine, .*No space left on device"):
            Worker(at, leases, StopSignal(), print).work()
    assert TrialState.FAIL not in {trial.state for trial in at.trials()}
    work(file)
    assert_each_point_once(at, undisturbed)


def test_metrics_that_cannot_be_read_for_a_moment_end_no_trial(tmp_path, monkeypatch):
    fields = """
        sampler="grid", pruner=ThresholdPruner(upper=1e9),
        space={"bank.num_prompts": CategoricalDistribution([2, 3])},
    """
    file = write_sweep(tmp_path / "sweep.py", fields, steps=4)
    whole, failed = tracking._content, []

    def content(path: Path) -> bytes:
        if path.exists() and not failed:
            failed.append(path)
            error = OSError(errno.ESTALE, "Stale file handle")
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        return whole(path)

    monkeypatch.setattr(tracking, "_content", content)
    at = work(file)
    assert failed and {trial.state for trial in at.trials()} == {TrialState.COMPLETE}
    assert [list(trial.intermediate_values) for trial in at.trials()] == [[0, 1, 2, 3]] * 2


def test_a_worker_alone_tries_what_failed_here_after_all_others_and_then_it_has_failed(tmp_path):
    fields = 'space={"optimizer.weight_decay": CategoricalDistribution([0.1, 0.0, 0.2])}, sampler="grid"'
    at = workplace(write_sweep(tmp_path / "sweep.py", fields, steps=2))
    said: list[str] = []
    leases = Leases(at.storage.engine, at.study.study_name, this_process(), 60.0)
    Worker(at, leases, StopSignal(), said.append).work()
    assert [state for state, *_ in outcome(at).values()] == ["FAIL", "COMPLETE", "FAIL"]
    order = [line.split(":")[0] for line in said if "optimizer.weight_decay=" in line]
    assert order == ["trial 0", "trial 1", "trial 2", "trial 0", "trial 2"]


def test_what_the_configuration_forbids_has_failed_at_once(tmp_path):
    fields = """
        space={"bank.num_prompts": CategoricalDistribution([3])}, sampler="grid",
        objective=Objective("f2", "maximize", file="results.json"),
    """
    at = workplace(write_sweep(tmp_path / "sweep.py", fields, steps=2))
    said: list[str] = []
    leases = Leases(at.storage.engine, at.study.study_name, this_process(), 60.0)
    Worker(at, leases, StopSignal(), said.append).work()
    assert at.trials()[0].state == TrialState.FAIL and not any("once more" in line for line in said)


def test_a_trial_stays_its_workers_while_its_run_takes_long_to_save(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_SAVING", "6")
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    worker = start_worker(file, seconds=2.0, step=0.3)
    with ended([worker]):
        wait_until(lambda: len(processes(at, 0)) == 1)
        worker.send_signal(signal.SIGTERM)
        other = Leases(at.storage.engine, at.study.study_name, "elsewhere 1 1 x", 60.0)
        claims = claims_while_it_lives(trial_folder(at.folder, 0) / "seed_0.lock", other)
        assert worker.wait(10) == 0
    assert claims == [False] * len(claims) and len(claims) > 5
    other.release(0)
    assert other.claim(0)


def claims_while_it_lives(lock: Path, other: Leases) -> list[bool]:
    """Whether another worker could claim trial 0, again and again until its run has ended."""
    claims = []
    while holder_here(lock):
        claimed = other.claim(0)
        if holder_here(lock):
            claims.append(claimed)
        time.sleep(0.5)
    return claims
