"""A worker: takes one trial after another until the sweep has none left, its own and those that others lost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from spt_jax.atomic_file import write_atomically
from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.sweeps.config_file import config_file
from spt_jax.sweeps.description import Sweep, trial_config
from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.metrics import final_value, logged_values
from spt_jax.sweeps.outages import STORAGE_ERRORS, Patience, is_away
from spt_jax.sweeps.points import suggest
from spt_jax.sweeps.process_identity import machine
from spt_jax.sweeps.run_process import SPT_JAX, LostLease, RunFailed, RunProcess
from spt_jax.training.absolute_paths import absolute_paths
from spt_jax.training.signals import StopSignal

ERROR = "error"
"""User attribute of a trial that failed, once or for good: the sentence."""
MACHINE = "machine"
"""User attribute of a trial that ended well: where; see `spt_jax.sweeps.process_identity.machine`."""
FAILED_ON = "failed_on"
"""User attribute of a trial that failed: where."""
MOST_FAILURES = 3
"""So many trials that fail where none has ended well speak against the machine, and not against them."""
LEFT_SECONDS = 5.0
"""For how long a trial that failed here is left to workers on other machines, after the last sign of one."""
_IDLE_SECONDS = 1.0
_ENDED_WELL = (TrialState.COMPLETE, TrialState.PRUNED)


class _Pruned(Exception):
    """Optuna's pruner gives a trial up."""


class _Stopped(Exception):
    """The worker is asked to end."""


@dataclasses.dataclass(frozen=True)
class Workplace:
    """What all workers of a sweep know alike.

    Attributes:
        sweep: What the sweep file says.
        base: The configuration that trials share.
        folder: Where the trials' folders lie.
        num_trials: How many trials there are.
        storage: The database.
        study: The sweep in it.
        program: The command ``spt-jax``.
    """

    sweep: Sweep
    base: Config
    folder: Path
    num_trials: int
    storage: RDBStorage
    study: optuna.Study
    program: Sequence[str] = SPT_JAX

    def trials(self) -> list[FrozenTrial]:
        """The trials that the sweep has, by number; those that were made beyond its number are not its."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.number < self.num_trials]


class Worker:
    """Runs trials of a sweep.

    Args:
        workplace: The sweep.
        leases: This worker's leases.
        stop: Asked all the time; a run that goes on is then asked to save, and its trial is given back.
        say: Takes a line for each event.
    """

    def __init__(self, workplace: Workplace, leases: Leases, stop: StopSignal, say: Callable[[str], None]) -> None:
        self._at, self._leases, self._stop, self._say = workplace, leases, stop, say
        self._renewed = 0.0
        self._failed: set[int] = set()  # since this start: what failed before it may have been mended
        self._left_until = 0.0
        self._kept: int | None = None  # a trial whose lease may be held, though the storage did not say so

    def work(self) -> None:
        """Returns when every trial has ended, or after a stop signal.

        Raises:
            UserError: No trial has ended well on this machine, and runs fail; their trials are left to others.
        """
        patience = Patience(self._say)
        while not self._stop.requested:
            try:
                more, number = self._claimed()
                patience.answered()
                if not more:
                    return
                if number is not None:
                    self._finish(number)
                    continue
            except STORAGE_ERRORS as error:
                # The run in hand is saved by now; whoever claims its trial takes it up.
                if not patience.bears(error):
                    raise
            time.sleep(_IDLE_SECONDS)

    def _claimed(self) -> tuple[bool, int | None]:
        """Whether the sweep has trials left, and which of them is this worker's now.

        One whose lease this worker may still have goes on. Else the lowest first, so that a trial that was lost goes on
        before new ones begin. Those that failed once come last, and those that failed on this machine only when no
        worker elsewhere has taken them for a while.
        """
        unfinished = [trial for trial in self._at.trials() if not trial.state.is_finished()]
        if self._kept is not None and self._leases.renew(self._kept):
            return True, self._kept
        here = {trial.number for trial in unfinished if machine() in trial.user_attrs.get(FAILED_ON, ())}
        if here and self._work_elsewhere():
            self._left_until = time.monotonic() + LEFT_SECONDS
        if time.monotonic() < self._left_until:
            eligible = [trial for trial in unfinished if trial.number not in here]
        else:
            eligible = unfinished
        for trial in sorted(eligible, key=lambda trial: (trial.number in here, ERROR in trial.user_attrs)):
            self._kept = trial.number
            if self._leases.claim(trial.number):
                return True, trial.number
        self._kept = None
        return bool(unfinished), None

    def _work_elsewhere(self) -> bool:
        place = f"{machine()} "
        return any(lease.seconds > 0 and not lease.owner.startswith(place) for lease in self._leases.read().values())

    def _finish(self, number: int) -> None:
        """Runs a trial that was claimed, unless it has ended meanwhile, and gives its lease back."""
        self._renewed, self._kept = time.monotonic(), number
        try:
            if not self._at.trials()[number].state.is_finished():
                self._run(number)
        finally:
            self._leases.release(number)
            self._kept = None

    def _run(self, number: int) -> None:
        trial = self._taken(number)
        try:
            params = suggest(self._at.sweep, self._at.study, trial)
            self._say(f"trial {number}: {', '.join(f'{name}={value}' for name, value in params.items())}")
            self._tell(trial, TrialState.COMPLETE, self._value(trial, params))
        except _Pruned:
            self._tell(trial, TrialState.PRUNED)
        except _Stopped:
            self._say(f"trial {number}: stopped, saved; a worker goes on with it")
        except (LostLease, UpdateFinishedTrialError):
            self._say(f"trial {number}: another worker has it by now")
        except (UserError, OSError) as error:
            if isinstance(error, RunFailed) or _is_the_systems(error):
                self._fail(trial, str(error))
            else:  # what its settings forbid, they forbid everywhere
                self._fail_for_good(trial, str(error))

    def _taken(self, number: int) -> optuna.Trial:
        """The trial as a running one, freshly begun or as an earlier worker left it."""
        storage, study = self._at.storage, self._at.study
        study_id = storage.get_study_id_from_name(study.study_name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        if storage.get_trial(trial_id).state == TrialState.WAITING:
            storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return optuna.Trial(study, trial_id)

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        """Ends a trial whose run failed again, where it is the trial's fault; else it is tried once more.

        It is where others end well on this machine, or where it failed on another one and others end well there.

        Raises:
            UserError: No trial has ended well here, and this one failed here before, or `MOST_FAILURES` have.
        """
        before = list(trial.user_attrs.get(FAILED_ON, ()))
        well = [t.user_attrs.get(MACHINE, machine()) for t in self._at.trials() if t.state in _ENDED_WELL]
        if before and (machine() in well or (well and before != [machine()])):
            self._fail_for_good(trial, reason)
            return
        if self._keep_error(trial, reason):
            trial.set_user_attr(FAILED_ON, sorted({*before, machine()}))
            self._say(f"trial {trial.number}: failed, tried once more when the others are done: {reason}")
        self._failed.add(trial.number)
        self._left_until = time.monotonic() + LEFT_SECONDS
        if machine() not in well and (machine() in before or len(self._failed) >= MOST_FAILURES):
            raise UserError(
                f"no trial has ended well on this machine, and runs fail, the last one so: {reason}. A worker "
                "elsewhere, or the same command once the cause is mended, tries them again"
            )

    def _fail_for_good(self, trial: optuna.Trial, reason: str) -> None:
        self._keep_error(trial, reason)
        self._tell(trial, TrialState.FAIL)

    def _keep_error(self, trial: optuna.Trial, reason: str) -> bool:
        """Whether the trial is still this worker's."""
        held = self._leases.renew(trial.number)
        if held:
            trial.set_user_attr(ERROR, reason[:1000])
        return held

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        """Ends a trial, unless it is another worker's: this one may have been stopped for longer than a lease."""
        try:
            if not self._leases.renew(trial.number):
                raise LostLease
            if state != TrialState.FAIL:
                trial.set_user_attr(MACHINE, machine())
            # It is finished already where the answer to an earlier telling was lost.
            self._at.study.tell(trial, value, state, skip_if_finished=True)
        except (LostLease, UpdateFinishedTrialError):
            self._say(f"trial {trial.number}: another worker has it by now")
            return
        shown = "" if value is None else f", {self._at.sweep.objective.metric} {value:.6g}"
        reason = f": {trial.user_attrs[ERROR]}" if state == TrialState.FAIL else ""
        self._say(f"trial {trial.number}: {state.name.lower()}{shown}{reason}")

    def _value(self, trial: optuna.Trial, params: dict[str, Any]) -> float:
        """Trains, and where the objective needs it evaluates, a run for each seed; the mean of what they are worth."""
        sweep, folder = self._at.sweep, trial_folder(self._at.folder, trial.number)
        config = trial_config(self._at.base, params, sweep.seeds[0])
        absolute_paths(config)
        folder.mkdir(parents=True, exist_ok=True)
        title = f"Trial {trial.number} of the sweep {self._at.study.study_name}."
        write_atomically(folder / "config.py", config_file(config, title))
        return statistics.fmean(self._seed_value(trial, folder, seed) for seed in sweep.seeds)

    def _seed_value(self, trial: optuna.Trial, folder: Path, seed: int) -> float:
        sweep, workdir = self._at.sweep, folder / f"seed_{seed}"
        judged = sweep.pruner is not None and seed == sweep.seeds[0]
        report = _Reports(trial, workdir, sweep).report if judged else lambda: None

        def tick() -> None:
            self._tick(trial.number)
            try:
                report()
            except STORAGE_ERRORS as error:
                self._bear(error)

        lock, log = folder / f"seed_{seed}.lock", folder / f"seed_{seed}.log"
        process = RunProcess(lock, log, tick, lambda: self._renew(trial.number), self._at.program)
        flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}", f"--config.seed={seed}"]
        process.finish(["train", *flags])
        report()  # what a short run wrote before it was looked at counts like what a long one wrote
        if sweep.objective.file == "results.json":
            process.finish(["evaluate", f"--workdir={workdir}", "--nobaselines", "--reuse"])
        return final_value(workdir, sweep.objective)

    def _tick(self, number: int) -> None:
        if self._stop.requested:
            raise _Stopped
        # A quarter of a lease: three renewals may come late before it is lost.
        if time.monotonic() - self._renewed > self._leases.seconds / 4:
            self._renew(number)

    def _renew(self, number: int) -> None:
        try:
            held = self._leases.renew(number)
        except STORAGE_ERRORS as error:
            self._bear(error)
            return
        if not held:
            raise LostLease
        self._renewed = time.monotonic()

    def _bear(self, error: Exception) -> None:
        """A storage that is away for a moment stops no run; for longer than a lease, others may have the trial."""
        if not is_away(error) or time.monotonic() - self._renewed > self._leases.seconds:
            raise error


def _is_the_systems(error: BaseException | None) -> bool:
    """Whether an error, or one that it tells of, is the operating system's: a full disk, a file that cannot be read."""
    return error is not None and (isinstance(error, OSError) or _is_the_systems(error.__cause__))


class _Reports:
    """Tells Optuna each new value of a run, in the order of its steps, and hears whether to go on.

    What the pruner says at a step does not depend on how far the run has got meanwhile.
    """

    def __init__(self, trial: optuna.Trial, workdir: Path, sweep: Sweep) -> None:
        self._trial, self._workdir, self._objective = trial, workdir, sweep.objective
        self._reported: set[int] | None = None  # read from the storage, and again after it failed

    def report(self) -> None:
        """Reports what is new; raises `_Pruned` when the trial is given up."""
        reported, self._reported = self._reported, None
        if reported is None:
            reported = set(self._trial.study.get_trials(deepcopy=False)[self._trial.number].intermediate_values)
            if reported and self._trial.should_prune():
                raise _Pruned  # the worker before was lost between hearing it and telling it
        for step, value in logged_values(self._workdir, self._objective):
            if step in reported:
                continue
            self._trial.report(value, step)
            reported.add(step)
            if self._trial.should_prune():
                raise _Pruned
        self._reported = reported


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's runs, their logs and its config file lie."""
    return folder / f"trial_{number:04d}"
