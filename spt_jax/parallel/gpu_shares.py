"""Processes side by side on one machine's GPUs: which of them each may take."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Mapping

_VISIBLE, _PREALLOCATE = "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE"


def gpu_shares(count: int, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Environment variables for `count` processes, so that no two have a GPU in common, or as few as can be.

    JAX takes every GPU that it sees, and most of its memory at once; processes that have one in common take memory as
    they need it. Nothing is changed for a single process, nor on a machine without NVIDIA's GPUs.

    Args:
        count: How many processes.
        environment: What they have beside; ``CUDA_VISIBLE_DEVICES`` names the GPUs to share, else all are.
    """
    gpus = _gpus(environment) if count > 1 else []
    if not gpus:
        return [{} for _ in range(count)]
    if count <= len(gpus):
        bounds = [len(gpus) * process // count for process in range(count + 1)]
        return [{_VISIBLE: ",".join(gpus[a:b])} for a, b in itertools.pairwise(bounds)]
    memory = {_PREALLOCATE: environment.get(_PREALLOCATE, "false")}
    return [{_VISIBLE: gpus[process % len(gpus)], **memory} for process in range(count)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    if _VISIBLE in environment:
        return [gpu.strip() for gpu in environment[_VISIBLE].split(",") if gpu.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=dict(environment))
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()
