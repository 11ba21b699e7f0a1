"""Three workers and one PostgreSQL server: nothing is lost, nothing is run twice."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from postgres_server import Server, postgres
from stand_in_sweep import OPENED, outcome, start_worker, workplace, write_sweep
from test_workers import assert_each_point_once, disturb, ended, places_at_work, wait_until

from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.storage import hidden, open_storage, storage_url

pytestmark = pytest.mark.first_python


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres() as started:
        yield started


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.campaign)])
def test_three_workers_on_postgresql_killed_at_random_complete_every_combination_once(
    tmp_path, server, undisturbed, kills
):
    folder = tmp_path / f"killed_{kills}"
    folder.mkdir()
    file = write_sweep(folder / "sweep.py")
    at = workplace(file, server.url)
    disturb(file, server.url, at, kills, random.Random(kills))
    assert_each_point_once(at, undisturbed)


def test_workers_that_open_an_empty_database_at_once_make_one_sweep(tmp_path, server):
    file = write_sweep(tmp_path / "sweep.py", steps=1)
    workers = [start_worker(file, server.url) for _ in range(3)]
    with ended(workers):
        for worker in workers:
            assert worker.wait(60) == 0, (tmp_path / "worker.txt").read_text()
    assert {state for state, *_ in outcome(workplace(file, server.url)).values()} == {"COMPLETE"}


def test_a_server_that_is_stopped_and_started_again_finds_the_workers_where_they_were(tmp_path, server, undisturbed):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file, server.url)
    workers = [start_worker(file, server.url, seconds=2.0, step=0.5) for _ in range(2)]
    with ended(workers):
        wait_until(lambda: len(places_at_work(at, workers)) == 2)
        server.stop()
        time.sleep(5.0)
        assert [worker.poll() for worker in workers] == [None, None]
        server.start()
        for worker in workers:
            assert worker.wait(120) == 0, (tmp_path / "worker.txt").read_text()
    told = (tmp_path / "worker.txt").read_text()
    assert "the storage does not answer" in told and "the storage answers again" in told
    assert_each_point_once(at, undisturbed)


def test_a_lease_on_postgresql_is_one_owners_until_it_runs_out(server, tmp_path):
    storage = open_storage(storage_url(server.url, tmp_path))
    OPENED.append(storage)
    engine = storage.engine
    one, other = (Leases(engine, "leases", f"elsewhere 1 1 {name}", 3600.0) for name in "ab")
    assert one.claim(0) and not other.claim(0) and not other.renew(0) and one.renew(0)
    other.release(0)
    assert not other.claim(0)
    one.seconds = -1.0
    assert one.renew(0) and other.claim(0) and not one.renew(0)
    assert "s3cret" not in hidden(storage_url(server.url, tmp_path))
