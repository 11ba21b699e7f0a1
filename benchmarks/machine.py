"""What a benchmark's figures depend on beside the program."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "flax", "numpy", "spt_jax")


def machine(*packages: str) -> dict[str, Any]:
    """For the line of JSON: CPU, cores, the load of the last minute, versions of Python and of packages, and the date.

    Args:
        packages: Those beside `PACKAGES`; one that is absent is None.
    """
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    versions = {name: installed.get(name) for name in (*PACKAGES, *packages)}
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.date.today().isoformat(),
    }
