"""Processes on one machine's GPUs have each its own, as far as there are enough."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spt_jax.parallel.gpu_shares import gpu_shares


@pytest.fixture
def with_gpus(tmp_path: Path):
    """An environment whose nvidia-smi lists so many GPUs as it does with these flags, and refuses others."""

    def make(count: int, **more: str) -> dict[str, str]:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            '#!/bin/sh\n[ "$*" = "--query-gpu=index --format=csv,noheader" ] || exit 6\n'
            + "".join(f"echo {number}\n" for number in range(count))
        )
        program.chmod(0o755)
        return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **more}

    return make


@pytest.mark.parametrize(
    ("processes", "gpus", "shares"),
    [
        (4, 4, ["0", "1", "2", "3"]),
        (2, 8, ["0,1,2,3", "4,5,6,7"]),
        (3, 8, ["0,1", "2,3,4", "5,6,7"]),
    ],
)
def test_every_gpu_is_in_one_share(with_gpus, processes, gpus, shares):
    found = gpu_shares(processes, with_gpus(gpus))
    assert found == [{"CUDA_VISIBLE_DEVICES": share} for share in shares]
    assert ",".join(share["CUDA_VISIBLE_DEVICES"] for share in found) == ",".join(map(str, range(gpus)))


def test_processes_that_have_a_gpu_in_common_take_memory_as_they_need_it(with_gpus):
    found = gpu_shares(3, with_gpus(2))
    assert [share["CUDA_VISIBLE_DEVICES"] for share in found] == ["0", "1", "0"]
    assert {share["XLA_PYTHON_CLIENT_PREALLOCATE"] for share in found} == {"false"}
    told = gpu_shares(3, with_gpus(2, XLA_PYTHON_CLIENT_PREALLOCATE="true"))
    assert {share["XLA_PYTHON_CLIENT_PREALLOCATE"] for share in told} == {"true"}


def test_the_gpus_that_are_visible_are_shared_and_no_others(with_gpus):
    assert gpu_shares(2, with_gpus(8, CUDA_VISIBLE_DEVICES="5, 7")) == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    assert gpu_shares(2, with_gpus(8, CUDA_VISIBLE_DEVICES="")) == [{}, {}]


def test_one_process_and_a_machine_without_gpus_are_left_as_they_are(with_gpus, tmp_path):
    assert gpu_shares(1, with_gpus(8)) == [{}]
    assert gpu_shares(2, {"PATH": str(tmp_path / "nowhere")}) == [{}, {}]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu_shares(2, {"PATH": str(tmp_path)}) == [{}, {}]
