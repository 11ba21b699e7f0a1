"""Whether this process is one of several, and where the first of them is: the flag --distributed, or the launcher's.

Nothing here needs JAX, so that a process can know it before any device is touched.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import re
from collections.abc import Mapping

from spt_jax.errors import UserError

ALLOWED = "off, auto, COORDINATOR:PORT,PROCESSES,INDEX, or COORDINATOR:PORT where a launcher numbers the processes"
LAST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process joins the others; what is None is left to `jax.distributed.initialize`.

    Attributes:
        found: Who said so, such as ``"SLURM"``, for messages.
        method: JAX's name of the launcher whose settings it shall read; ``"deactivate"`` for none.
        coordinator: ``host:port`` of process 0.
        count: Number of processes.
        index: This process, from 0.
        local_devices: The devices that this process takes of its host's; None for JAX's choice.
    """

    found: str
    method: str | None
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_launch(asked: str, environment: Mapping[str, str]) -> Launch | None:
    """What ``--distributed`` means here.

    Args:
        asked: ``off``, ``auto``, ``HOST:PORT,N,I`` or ``HOST:PORT``.
        environment: The process's environment variables.

    Returns:
        How to join; None for a process alone.

    Raises:
        UserError: The value, or what a launcher left in the environment, cannot be used.
    """
    if asked == "off":
        return None
    if asked == "auto":
        return _found(environment)
    coordinator, *numbers = asked.split(",")
    address = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if not address or not 0 < int(address[1]) <= LAST_PORT or len(numbers) not in (0, 2):
        raise UserError(f"--distributed={asked} is not understood; allowed: {ALLOWED}")
    if numbers:
        if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(
                f"--distributed={asked}: PROCESSES and INDEX are {numbers[0]} and {numbers[1]}; allowed: a number of "
                "processes and a number below it, counted from 0"
            )
        return Launch("--distributed", "deactivate", coordinator, int(numbers[0]), int(numbers[1]))
    found = _numbered(environment)
    if found is None:
        raise UserError(
            f"--distributed={asked} names no PROCESSES and INDEX, and no launcher (SLURM, Open MPI, an indexed "
            f"Kubernetes job, or JAX_NUM_PROCESSES and JAX_PROCESS_ID) numbers the processes; allowed: {ALLOWED}"
        )
    return dataclasses.replace(found, method="deactivate", coordinator=coordinator)


def _found(environment: Mapping[str, str]) -> Launch | None:
    """The launcher that started this process as one of several; the most explicit first."""
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    numbered = _numbered(environment)
    if address:
        if numbered is None:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is {address}, but nothing numbers the processes; set JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID too, or give --distributed=off"
            )
        return dataclasses.replace(numbered, method="deactivate", coordinator=address)
    if _on_tpu_hosts(environment):
        return Launch("TPU", None)
    if numbered is None or numbered.count == 1:
        return _kubernetes(environment)
    if numbered.found == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise UserError(
            "Open MPI 5 does not tell its processes an address; give --distributed=HOST:PORT, the host of rank 0 and "
            "a free port there"
        )
    if numbered.found == "JAX_PROCESS_ID":
        raise UserError("JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, but JAX_COORDINATOR_ADDRESS is not")
    return numbered


def _numbered(environment: Mapping[str, str]) -> Launch | None:
    """Number and index of the processes, as one of the launchers has them."""

    def number(name: str) -> int:
        value = environment[name]
        if not value.isdecimal():
            raise UserError(f"the environment variable {name} is {value!r}; a whole number was expected")
        return int(value)

    if "JAX_NUM_PROCESSES" in environment:
        index = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
        if index not in environment:
            raise UserError("JAX_NUM_PROCESSES is set, but neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX is")
        return Launch("JAX_PROCESS_ID", None, count=number("JAX_NUM_PROCESSES"), index=number(index))
    # A shell inside an allocation has SLURM_JOB_ID and SLURM_NTASKS; what `srun` starts has a step and a rank too.
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_NTASKS"} <= set(environment):
        count, index = number("SLURM_NTASKS"), number("SLURM_PROCID")
        return Launch("SLURM", "slurm", count=count, index=index, local_devices=_all_of_the_node(environment))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        count, index = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_RANK")
        return Launch("Open MPI", "ompi", count=count, index=index)
    return None


def _all_of_the_node(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """All GPUs of the node where SLURM runs one task on each; JAX would take the first alone."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    alone = bool(tasks) and all(part.split("(")[0] == "1" for part in tasks.split(","))
    return tuple(range(int(gpus))) if alone and gpus.isdecimal() and int(gpus) else None


def _kubernetes(environment: Mapping[str, str]) -> Launch | None:
    """An indexed job's pod; a pod without an index is one of its own."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "this is a pod of an indexed Kubernetes job, whose settings JAX reads through the package kubernetes: "
            "pip install 'spt_jax[k8s]'; or set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, or give "
            "--distributed=off"
        )
    return Launch("Kubernetes", None)


def _on_tpu_hosts(environment: Mapping[str, str]) -> bool:
    """Whether this is a host with TPU chips, where JAX finds the other hosts of the slice, if any, by itself."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    has_chips = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None
