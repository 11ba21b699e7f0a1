"""A storage that is away for a moment stops nothing; for longer, runs are saved and go on when it is back."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from sqlalchemy.exc import IntegrityError, OperationalError
from stand_in_sweep import processes, workplace, write_sweep
from test_workers import assert_each_point_once, wait_until

from spt_jax.errors import UserError
from spt_jax.exit_codes import FAILED, MISTAKE
from spt_jax.sweeps import door, outages, storage, watching
from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.outages import Patience, is_away, reason_of
from spt_jax.sweeps.process_identity import this_process
from spt_jax.sweeps.worker import ERROR, Worker, Workplace
from spt_jax.training.signals import StopSignal

AWAY = OperationalError("SELECT 1", {}, RuntimeError("connection refused"))
REFUSED = OperationalError("", {}, RuntimeError('FATAL: password authentication failed for user "me"'))
WRONG = IntegrityError("INSERT", {}, RuntimeError("no such column"))


@contextmanager
def away(at: Workplace) -> Iterator[threading.Event]:
    """While the event is set, nothing reaches the database."""
    cut = threading.Event()

    def refuse(*_: object) -> None:
        if cut.is_set():
            raise OperationalError("SELECT 1", {}, RuntimeError("connection refused"))

    sqlalchemy.event.listen(at.storage.engine, "before_cursor_execute", refuse)
    yield cut
    sqlalchemy.event.remove(at.storage.engine, "before_cursor_execute", refuse)


def work_while(at: Workplace, disturb: Callable[[], None], seconds: float) -> list[str]:
    """What a worker says that runs the whole sweep beside `disturb`; one that does not get on is stopped."""
    said: list[str] = []
    stop = StopSignal()
    too_long = threading.Timer(90.0, lambda: setattr(stop, "requested", True))
    too_long.start()
    leases = Leases(at.storage.engine, at.study.study_name, this_process(), seconds)
    beside = threading.Thread(target=disturb)
    beside.start()
    try:
        Worker(at, leases, stop, said.append).work()
    finally:
        too_long.cancel()
        beside.join()
    assert not stop.requested, said
    return said


def watched(at: Workplace, trial: int, step: int) -> None:
    """Returns when the run of a trial has come so far, asking the storage nothing."""
    state = at.folder / f"trial_{trial:04d}" / "seed_0" / "metrics.jsonl"
    wait_until(lambda: state.exists() and len(state.read_text().splitlines()) > step, 60)


def test_a_run_goes_on_through_a_moment_without_its_storage_and_the_pruner_hears_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.3")
    fields = (
        'sampler="grid", pruner=ThresholdPruner(upper=1e9), space={"bank.num_prompts": CategoricalDistribution([3])}'
    )
    at = workplace(write_sweep(tmp_path / "sweep.py", fields, steps=8))
    with away(at) as cut:

        def disturb() -> None:
            watched(at, 0, 1)
            cut.set()
            watched(at, 0, 5)
            cut.clear()

        said = work_while(at, disturb, seconds=60.0)
    (trial,) = at.trials()
    assert trial.state == TrialState.COMPLETE and list(trial.intermediate_values) == list(range(8))
    assert len([note for note in processes(at, 0) if "begins" in note]) == 1
    assert not any("storage" in line for line in said)


def test_a_run_whose_storage_is_away_for_longer_than_a_lease_is_saved_and_goes_on(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setenv("STAND_IN_SECONDS", "0.4")
    at = workplace(write_sweep(tmp_path / "sweep.py"))
    with away(at) as cut:

        def disturb() -> None:
            watched(at, 0, 1)
            cut.set()
            time.sleep(4.0)
            cut.clear()
            monkeypatch.setenv("STAND_IN_SECONDS", "0.05")

        said = work_while(at, disturb, seconds=1.0)
    assert any("the storage does not answer (connection refused)" in line for line in said)
    assert "the storage answers again" in said
    begun = [note for note in processes(at, 0) if "begins" in note]
    assert len(begun) == 2 and not begun[1].endswith("at step 0")
    assert_each_point_once(at, undisturbed)


def test_a_worker_whose_storage_stays_away_gives_up_and_loses_nothing(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr("spt_jax.sweeps.worker.Patience", lambda say: Patience(say, 2.0))
    monkeypatch.setenv("STAND_IN_SECONDS", "0.2")
    at = workplace(write_sweep(tmp_path / "sweep.py"))
    with away(at) as cut:

        def disturb() -> None:
            watched(at, 0, 1)
            cut.set()

        with pytest.raises((OperationalError, StorageInternalError)):
            work_while(at, disturb, seconds=1.0)
    work_while(at, lambda: None, seconds=60.0)
    assert_each_point_once(at, undisturbed)


@pytest.mark.parametrize(
    ("error", "passes"), [(AWAY, True), (WRONG, False), (REFUSED, False), (StorageInternalError("An exception"), False)]
)
def test_only_what_may_pass_is_borne(error, passes):
    assert is_away(error) is passes
    said: list[str] = []
    patience = Patience(said.append, 0.3)
    assert patience.bears(error) is passes
    if not passes:
        return
    patience.answered()
    assert patience.bears(error)
    patience.answered()
    assert len(said) == 4 and "connection refused" in said[0]
    assert patience.bears(error)
    time.sleep(0.4)
    assert not patience.bears(error)


def test_what_optuna_wraps_is_told_by_its_cause():
    wrapped = StorageInternalError("An exception is raised during the commit.")
    wrapped.__cause__ = AWAY
    assert is_away(wrapped) and reason_of(wrapped) == "connection refused"


def trial(state: TrialState) -> FrozenTrial:
    return FrozenTrial(
        number=0, state=state, value=None, datetime_start=None, datetime_complete=None, params={}, distributions={},
        user_attrs={}, system_attrs={}, intermediate_values={}, trial_id=0,
    )  # fmt: skip


def test_what_a_run_says_is_no_markup_of_the_live_table():
    failed = trial(TrialState.FAIL)
    failed.user_attrs = {ERROR: "allowed: [/a, /b]; [tf-allocator='']"}
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(watching.table([failed], {}, ["a"], "loss"))
    assert "failed: allowed: [/a, /b]; [tf-allocator='']" in console.export_text()


def test_who_watches_bears_a_storage_that_is_away_and_no_other_error(monkeypatch, capsys):
    monkeypatch.setattr(watching, "_SECONDS", 0.01)
    answers: list[Exception | TrialState] = [TrialState.RUNNING, AWAY, AWAY, TrialState.FAIL]

    def read() -> tuple[list[FrozenTrial], dict]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [trial(answer)], {}

    watching.watch(read, lambda: True, [], "loss")
    told = capsys.readouterr().err
    assert not answers and told.count("does not answer") == 1 and told.count("answers again") == 1
    answers[:] = [WRONG]
    with pytest.raises(IntegrityError):
        watching.watch(read, lambda: True, [], "loss")
    answers[:] = [AWAY]
    with pytest.raises(OperationalError):  # nobody works any more: nothing to wait for
        watching.watch(read, lambda: False, [], "loss")


def test_a_storage_that_is_away_while_a_trial_is_told_finds_its_worker_and_no_other_trial_begins_before(
    tmp_path, monkeypatch, undisturbed
):
    """A lease that could not be given back must not keep its own worker out, however long it holds."""
    at = workplace(write_sweep(tmp_path / "sweep.py"))
    told, tell = [], at.study.tell
    with away(at) as cut:

        def cut_off(*arguments: object, **more: object) -> FrozenTrial:
            if not told:
                told.append("cut")
                cut.set()
                threading.Timer(2.0, cut.clear).start()
            return tell(*arguments, **more)

        monkeypatch.setattr(at.study, "tell", cut_off)
        said = work_while(at, lambda: None, seconds=3600.0)
    begun = [line.split(":")[0] for line in said if "bank.num_prompts=" in line]
    assert begun == ["trial 0", "trial 0", "trial 1", "trial 2", "trial 3"]
    assert_each_point_once(at, undisturbed)


def test_a_worker_whose_storage_never_answers_is_worth_another_start(tmp_path, monkeypatch, capsys):
    file = write_sweep(tmp_path / "sweep.py")
    monkeypatch.setattr(storage, "_opened", lambda _: (_ for _ in ()).throw(AWAY))
    monkeypatch.setattr(door, "AWAY_SECONDS", 1.5)
    flags = [f"--sweep={file}", f"--out={tmp_path / 'out'}"]
    assert door.main("launch/sweep.py", [*flags, "--worker"]) == FAILED
    assert "connection refused" in capsys.readouterr().err
    assert door.main("launch/sweep.py", flags) == MISTAKE


def test_opening_a_sweep_reads_its_trials_once_however_many_there_are(tmp_path, monkeypatch):
    database = storage.open_storage(storage.storage_url("", tmp_path))
    reads, whole = [], optuna.Study.get_trials

    def get_trials(*arguments: object, **more: object) -> list[FrozenTrial]:
        reads.append(arguments)
        return whole(*arguments, **more)

    monkeypatch.setattr(optuna.Study, "get_trials", get_trials)
    storage.open_study(database, "many", {"base": {}}, "minimize", 50)
    assert len(reads) <= 2
    assert len(storage.open_study(database, "many", {"base": {}}, "minimize", 50).get_trials()) == 50
    database.remove_session()
    database.engine.dispose()


def test_a_worker_waits_for_a_storage_that_does_not_answer_yet_and_who_starts_a_sweep_does_not(tmp_path, monkeypatch):
    whole, refused = storage._opened, [AWAY, AWAY]

    def opened(url: str) -> object:
        if refused:
            raise refused.pop()
        return whole(url)

    monkeypatch.setattr(storage, "_opened", opened)
    url = storage.storage_url("", tmp_path)
    with pytest.raises(UserError, match="cannot be used: connection refused"):
        storage.open_storage(url)
    assert len(refused) == 1
    found = storage.open_storage(url, outages.AWAY_SECONDS)
    assert not refused
    found.engine.dispose()


def test_a_server_that_falls_silent_is_noticed_and_the_users_own_limits_stay(monkeypatch):
    given: list[dict] = []
    monkeypatch.setattr(storage, "RDBStorage", lambda url, engine_kwargs: given.append(engine_kwargs["connect_args"]))
    storage._opened("postgresql+psycopg://me@host/base?connect_timeout=3")
    assert given[0]["tcp_user_timeout"] == 30_000 and given[0]["keepalives_idle"] == 10
    assert "connect_timeout" not in given[0]


def test_of_two_sweeps_of_one_name_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    database = storage.open_storage(storage.storage_url("", tmp_path))
    writing, go_on = threading.Event(), threading.Event()
    whole = storage._write_description

    def slowly(study: object, description: dict) -> None:
        writing.set()
        assert go_on.wait(30)
        whole(study, description)

    monkeypatch.setattr(storage, "_write_description", slowly)
    refusals: list[str] = []

    def begin(value: int) -> None:
        try:
            storage.open_study(database, "one", {"base": {}, "x": value}, "minimize", 2)
        except UserError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=begin, args=(value,)) for value in (1, 2)]
    threads[0].start()
    assert writing.wait(30)
    threads[1].start()
    time.sleep(0.5)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(refusals) == 1 and "x (1 there, 2 here)" in refusals[0]
    study = storage.open_study(database, "one", {"base": {}, "x": 1}, "minimize", 2)
    assert len(study.get_trials()) == 2
    database.remove_session()
    database.engine.dispose()
