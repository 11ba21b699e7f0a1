"""Joining other processes: what a process alone does, and what becomes of one whose peers do not come."""

from __future__ import annotations

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from several_processes import environment, free_port

from spt_jax.parallel.distributed import SharedFlag, any_process, is_lead, on_host, one_at_a_time, told_by_lead
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch, place_whole_batch, rows_here

JOINING = """
import os, sys
from functools import partial
from spt_jax.parallel.distributed import joined
from spt_jax.parallel.launchers import find_launch
from spt_jax.parallel.peers import end_process

with joined(find_launch(sys.argv[1], {}), silence_seconds=5, end=partial(end_process, "a program"), join_seconds=3):
    print("joined")
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_peers_do_not_come_says_so_and_ends(index):
    flag = f"127.0.0.1:{free_port()},2,{index}"
    done = subprocess.run(
        [sys.executable, "-c", JOINING, flag], capture_output=True, text=True, timeout=60, env=environment(1)
    )
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("a program: ")]
    assert f"within 3 seconds (this is process {index} of 2)" in sentence
    assert "Check failure" not in done.stderr


UNREACHABLE = """
import sys, time
from spt_jax.parallel import distributed

def unreachable(*arguments):
    raise TimeoutError("timed out")

def unanswered(count, publish, join_seconds):
    publish("1 token")
    time.sleep(60)

waits = sys.argv[2] == "waits"
distributed.serve, distributed.connect = unanswered if waits else unreachable, unreachable
"""


@pytest.mark.first_python
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_cannot_reach_the_others_ends_with_1_since_another_start_may_mend_it(lost):
    flag = f"127.0.0.1:{free_port()},2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UNREACHABLE + JOINING, f"{flag},{index}", "ends" if index == lost else "waits"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(1),
        )
        for index in range(2)
    ]
    try:
        out, err = processes[lost].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert (processes[lost].returncode, out) == (1, "")
    assert f"a program: process {lost} of 2 (" in err
    assert "cannot reach the others beside 127.0.0.1" in err
    assert ": timed out; the hosts must accept" in err


def test_a_process_whose_port_is_taken_ends_with_1_since_another_start_may_mend_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flag = f"127.0.0.1:{taken.getsockname()[1]},2,0"
        done = subprocess.run(
            [sys.executable, "-c", JOINING, flag], capture_output=True, text=True, timeout=60, env=environment(1)
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"a program: the port of {flag.partition(',')[0]} is taken (this is process 0 of 2)")
    assert done.stderr.count("\n") == 1


TELLING = """
import sys
from functools import partial
from spt_jax.parallel import distributed
from spt_jax.parallel.launchers import find_launch
from spt_jax.parallel.peers import end_process

distributed.TOLD_AT_ONCE = 5
with distributed.joined(find_launch(sys.argv[1], {}), silence_seconds=20, end=partial(end_process, "a program")):
    for said in (b"", b"one", b"exactly 10", b"more than ten"):
        print("told", distributed.told_by_lead(said if distributed.is_lead() else b"something else"))
"""


@pytest.mark.first_python
def test_what_the_first_process_tells_arrives_whole_whatever_its_length():
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TELLING, f"127.0.0.1:{port},2,{index}"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(2),
        )
        for index in range(2)
    ]
    expected = [f"told {said}" for said in (b"", b"one", b"exactly 10", b"more than ten")]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert [line for line in out.splitlines() if line.startswith("told ")] == expected


def test_a_process_alone_leads_and_answers_for_itself_at_once():
    assert is_lead()
    assert any_process(True) and not any_process(False)
    flag = SharedFlag()
    assert [flag.ask(False), flag.ask(True), flag.ask(False)] == [False, True, False]
    assert one_at_a_time(print) is print
    assert told_by_lead(b"\x00said") == b"\x00said"
    tree = {"a": jax.numpy.arange(3.0)}
    np.testing.assert_array_equal(on_host(tree)["a"], [0, 1, 2])


def test_a_process_alone_has_every_row_and_its_part_is_the_whole_batch():
    mesh = make_mesh(2, 2, 2)
    batch = {"tokens": np.arange(24).reshape(8, 3)}
    np.testing.assert_array_equal(rows_here(mesh, 8), np.arange(8))
    part, whole = place_batch(mesh, batch)["tokens"], place_whole_batch(mesh, batch)["tokens"]
    assert part.sharding == whole.sharding
    np.testing.assert_array_equal(part, whole)
