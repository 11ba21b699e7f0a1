"""Leases on trials: one owner at a time, told by the database's own clock."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.process_identity import is_dead, machine, start_of, this_process
from spt_jax.sweeps.storage import open_storage, storage_url


@pytest.fixture
def engine(tmp_path):
    storage = open_storage(storage_url("", tmp_path))
    yield storage.engine
    storage.engine.dispose()


def test_a_lease_is_one_owners_until_it_is_released_or_runs_out(engine):
    one, other = Leases(engine, "s", "elsewhere 1 1 a", 3600.0), Leases(engine, "s", "elsewhere 2 2 b", 3600.0)
    assert one.claim(0) and not other.claim(0) and not one.claim(0)
    assert one.read()[0].owner == "elsewhere 1 1 a" and 3590 < one.read()[0].seconds <= 3600
    other.release(0)
    assert not other.claim(0)
    one.release(0)
    assert other.claim(0) and not one.renew(0)
    other.seconds = -1.0
    assert other.renew(0) and one.claim(0) and not other.renew(0)


def test_sweeps_and_trials_have_leases_of_their_own(engine):
    one, other = Leases(engine, "s", "elsewhere 1 1 a", 60.0), Leases(engine, "t", "elsewhere 2 2 b", 60.0)
    assert one.claim(0) and other.claim(0) and one.claim(1)
    assert set(one.read()) == {0, 1} and set(other.read()) == {0}


def test_of_many_who_claim_at_once_one_gets_it(engine):
    for trial in range(5):
        claims, start = [], threading.Barrier(6)

        def claim(name: str, trial: int = trial, claims: list = claims, start: threading.Barrier = start) -> None:
            leases = Leases(engine, "s", f"elsewhere 1 1 {name}", 60.0)
            start.wait()
            claims.append(leases.claim(trial))

        threads = [threading.Thread(target=claim, args=(str(number),)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert claims.count(True) == 1


def test_who_read_a_lease_before_another_took_it_does_not_take_it_too(engine, monkeypatch):
    gone, slow, quick = (Leases(engine, "s", f"elsewhere 1 1 {name}", 60.0) for name in ("gone", "slow", "quick"))
    gone.seconds = -1.0
    assert gone.claim(0)
    update = slow._update

    def late(where, **values):
        assert quick.claim(0)
        return update(where, **values)

    monkeypatch.setattr(slow, "_update", late)
    assert not slow.claim(0)
    assert quick.renew(0)


@pytest.mark.skipif(not machine(), reason="this system does not tell machines and processes apart by /proc")
def test_the_lease_of_a_dead_process_on_this_machine_is_free_at_once(engine):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = f"{machine()} {child.pid} {start_of(child.pid)} x"
    mine = Leases(engine, "s", this_process(), 3600.0)
    assert Leases(engine, "s", owner, 3600.0).claim(0)
    assert not is_dead(owner) and not mine.claim(0)
    child.kill()
    child.wait()
    assert is_dead(owner) and mine.claim(0)


def test_a_process_elsewhere_or_one_that_lives_is_not_known_to_be_dead():
    assert not is_dead(this_process())
    assert not is_dead("elsewhere 1 1 a") and not is_dead("")
    assert is_dead(this_process().replace(f" {start_of(__import__('os').getpid())} ", " 1 ")) is bool(machine())


@pytest.mark.skipif(not machine(), reason="this system does not tell when a process began")
def test_a_process_that_another_account_hides_is_not_dead(monkeypatch):
    from spt_jax.sweeps import process_identity

    owner = this_process()
    monkeypatch.setattr(process_identity, "start_of", lambda pid: "")
    assert is_dead(owner)  # a zombie, or one that is gone
    monkeypatch.setattr(process_identity.os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert not is_dead(owner)
