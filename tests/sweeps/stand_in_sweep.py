"""Sweeps of the stand-in: sweep files, workers as processes of their own, and what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage

from spt_jax.sweeps.description import base_config, load_sweep, record
from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.points import num_trials
from spt_jax.sweeps.process_identity import this_process
from spt_jax.sweeps.storage import open_storage, open_study, storage_url
from spt_jax.sweeps.worker import Worker, Workplace, trial_folder
from spt_jax.training.signals import StopSignal

OPENED: list[RDBStorage] = []
"""Storages to close when a test is over."""
STAND_IN = Path(__file__).with_name("stand_in.py")
CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
GRID = """
    sampler="grid",
    space={
        "optimizer.learning_rate": CategoricalDistribution([0.01, 0.03]),
        "bank.num_prompts": CategoricalDistribution([2, 3]),
    },
"""


def write_sweep(path: Path, fields: str = GRID, *, steps: int = 8, base: str = "") -> Path:
    """A sweep file with `fields` of a Sweep behind its base; runs have so many steps."""
    path.write_text(
        f"""from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import MedianPruner, PercentilePruner, ThresholdPruner
from spt_jax.sweeps.description import Objective, Sweep

def get_sweep():
    return Sweep(base={base or str(CONFIGS / "common.py")!r}, fixed={{"train.steps": {steps}}}, {fields.strip()})
""",
        encoding="utf-8",
    )
    return path


def workplace(file: Path, storage: str = "") -> Workplace:
    """The sweep of a file, its runs beside it, in SQLite or in `storage`."""
    sweep = load_sweep(file)
    base = base_config(sweep)
    folder = file.parent / "out"
    folder.mkdir(exist_ok=True)
    database = open_storage(storage_url(storage, folder))
    OPENED.append(database)
    count = num_trials(sweep)
    study = open_study(database, str(file.parent.name), record(sweep, base), sweep.objective.direction, count)
    if sweep.pruner is not None:
        study.pruner = sweep.pruner
    return Workplace(sweep, base, folder, count, database, study, (sys.executable, str(STAND_IN)))


def work(file: Path, storage: str = "", seconds: float = 60.0) -> Workplace:
    """One worker in this process, until nothing is left."""
    at = workplace(file, storage)
    leases = Leases(at.storage.engine, at.study.study_name, this_process(), seconds)
    with StopSignal() as stop:
        Worker(at, leases, stop, partial(print, flush=True)).work()
    return at


def start_worker(
    file: Path, storage: str = "", *, seconds: float = 60.0, step: float = 0.05
) -> subprocess.Popen[bytes]:
    """A worker as a process of its own; what it says is appended to worker.txt beside the file."""
    command = [sys.executable, str(Path(__file__)), str(file), storage, str(seconds)]
    root = str(CONFIGS.parent)
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"STAND_IN_SECONDS": str(step), "PYTHONPATH": paths}
    with (file.parent / "worker.txt").open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def outcome(at: Workplace) -> dict[int, tuple[str, dict[str, Any], float | None, dict[int, float]]]:
    """What a sweep found, by trial: state, values of the options, objective, values on the way."""
    return {
        t.number: (t.state.name, t.params, t.value if t.state.name == "COMPLETE" else None, t.intermediate_values)
        for t in at.trials()
    }


def metrics(at: Workplace, trial: int, seed: int = 0) -> list[dict[str, Any]]:
    path = trial_folder(at.folder, trial) / f"seed_{seed}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes(at: Workplace, trial: int, seed: int = 0) -> list[str]:
    path = trial_folder(at.folder, trial) / f"seed_{seed}" / "processes.txt"
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    work(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
