"""Which launcher started a process, from its environment alone."""

from __future__ import annotations

import importlib.util

import pytest

from spt_jax.errors import UserError
from spt_jax.parallel import launchers
from spt_jax.parallel.launchers import Launch, find_launch

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
INDEXED_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture(autouse=True)
def _no_chips(monkeypatch):
    """Whatever the machine that runs the tests has in /dev."""
    monkeypatch.setattr(launchers.glob, "glob", lambda pattern: [])


def test_a_process_that_nobody_launched_is_alone():
    assert find_launch("auto", {}) is None
    assert find_launch("off", SLURM) is None


def test_an_address_with_numbers_is_taken_as_it_is():
    found = find_launch("10.0.0.7:8476,4,2", SLURM)
    assert found == Launch("--distributed", "deactivate", "10.0.0.7:8476", 4, 2)


def test_an_address_alone_takes_the_launchers_numbers():
    found = find_launch("head:8476", OPEN_MPI)
    assert found is not None
    assert (found.method, found.coordinator, found.count, found.index) == ("deactivate", "head:8476", 2, 1)


@pytest.mark.parametrize(
    ("environment", "found", "method", "count", "index"),
    [
        (SLURM, "SLURM", "slurm", 4, 3),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, "Open MPI", "ompi", 2, 1),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            *("JAX_PROCESS_ID", "deactivate", 2, 0),
        ),
        (
            INDEXED_POD | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"},
            *("JAX_PROCESS_ID", "deactivate", 2, 1),
        ),
    ],
)
def test_a_launchers_settings_are_found(environment, found, method, count, index):
    launch = find_launch("auto", environment)
    assert launch is not None
    assert (launch.found, launch.method, launch.count, launch.index) == (found, method, count, index)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "a step of one task"),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, "a shell in an allocation"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "mpirun -n 1"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "a pod of its own"),
    ],
)
def test_one_process_of_a_launcher_is_alone(environment, why):
    assert find_launch("auto", environment) is None, why


@pytest.mark.parametrize(
    ("tasks", "gpus", "devices"), [("1(x2)", "8", tuple(range(8))), ("8(x2)", "8", None), ("1,2", "4", None)]
)
def test_one_slurm_task_a_node_takes_all_its_gpus(tasks, gpus, devices):
    launch = find_launch("auto", SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": gpus})
    assert launch is not None
    assert launch.local_devices == devices


def test_a_tpu_host_asks_jax_unless_another_platform_is_wanted(monkeypatch):
    monkeypatch.setattr(launchers.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert find_launch("auto", {}) == Launch("TPU", None)
    assert find_launch("auto", {"JAX_PLATFORMS": "cpu"}) is None


def test_an_indexed_pod_needs_the_kubernetes_client_or_an_address(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert find_launch("auto", INDEXED_POD) == Launch("Kubernetes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"spt_jax\[k8s\].*JAX_COORDINATOR_ADDRESS.*--distributed=off"):
        find_launch("auto", INDEXED_POD)


@pytest.mark.parametrize(
    ("asked", "environment", "words"),
    [
        ("on", {}, "--distributed=on is not understood; allowed: off, auto, COORDINATOR:PORT"),
        ("head,2,0", {}, "not understood"),
        ("head:65536,2,0", {}, "not understood"),
        ("head:0,2,0", {}, "not understood"),
        ("head:1,2", {}, "not understood"),
        ("head:1,2,2", {}, "PROCESSES and INDEX are 2 and 2"),
        ("head:1,two,0", {}, "PROCESSES and INDEX are two and 0"),
        ("head:1", {}, "no launcher"),
        ("auto", OPEN_MPI, "Open MPI 5 does not tell"),
        ("auto", {"JAX_COORDINATOR_ADDRESS": "a:1"}, "nothing numbers the processes"),
        ("auto", {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not"),
        ("auto", {"JAX_NUM_PROCESSES": "2"}, "neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX"),
        ("auto", SLURM | {"SLURM_NTASKS": "four"}, "SLURM_NTASKS is 'four'"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_sentence(asked, environment, words):
    with pytest.raises(UserError) as told:
        find_launch(asked, environment)
    assert words in str(told.value)
