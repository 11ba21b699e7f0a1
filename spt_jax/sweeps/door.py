"""Runs many trainings of one configuration with other values of some options, and finds the best.

A sweep file says what varies and who chooses. Any number of workers, on any number of machines, share a sweep through
its storage; the same command goes on where a sweep was stopped. --config.SECTION.NAME=value sets an option for all
trials.

Examples:
  python launch/sweep.py --sweep=configs/sweeps/learning_rates.py --out=runs/rates
  python launch/sweep.py --sweep=configs/sweeps/lambdas.py --out=runs/lambdas --jobs=2 --config.data.train=train.txt
  python launch/sweep.py --sweep=configs/sweeps/lambdas.py --dry_run
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from absl import flags
from optuna.storages import RDBStorage

from spt_jax.commands.flag_reading import door_help, own_flags, read_flags
from spt_jax.commands.joining import define_seconds
from spt_jax.config import Config, flatten
from spt_jax.errors import UserError
from spt_jax.exit_codes import FINISHED, INTERRUPTED, STOPPED
from spt_jax.storage.bucket import is_bucket_url
from spt_jax.sweeps import launchers
from spt_jax.sweeps.description import Sweep, base_config, load_sweep, record
from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.outages import AWAY_SECONDS, STORAGE_ERRORS, reason_of
from spt_jax.sweeps.points import check_space, grid, num_trials
from spt_jax.sweeps.process_identity import this_process
from spt_jax.sweeps.results import results_of, write_results
from spt_jax.sweeps.slurm_parameters import read_parameters
from spt_jax.sweeps.storage import hidden, open_storage, open_study, storage_url
from spt_jax.sweeps.watching import watch
from spt_jax.sweeps.worker import Worker, Workplace
from spt_jax.training.signals import StopSignal
from spt_jax.user_paths import present

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=.*)?", re.DOTALL)


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of the program."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("config", None, "Options for all trials, as --config.SECTION.NAME=value.", **fv)
    flags.DEFINE_string("sweep", None, "A Python file whose get_sweep() describes the sweep.", **fv)
    flags.DEFINE_string("out", None, "Folder of the runs and results; by default runs/sweeps/NAME.", **fv)
    flags.DEFINE_string("name", None, "Name of the sweep in its storage; by default that of the sweep file.", **fv)
    flags.DEFINE_string(
        "storage",
        None,
        "Where the sweep is kept: postgresql://USER@HOST/DATABASE or sqlite:///FILE. By default the environment "
        f"variable {launchers.STORAGE_VARIABLE}, or else sweep.db in --out, which serves the workers of one machine.",
        **fv,
    )
    flags.DEFINE_integer("jobs", 1, "Workers to start, each with one training at a time.", lower_bound=1, **fv)
    flags.DEFINE_enum("launcher", "local", ["local", "slurm", "skypilot"], "What starts the workers.", **fv)
    flags.DEFINE_multi_string("slurm", [], "A parameter of submitit, as --slurm=timeout_min=240; repeatable.", **fv)
    flags.DEFINE_string("task", "launch/skypilot.yaml", "The SkyPilot task whose machines the workers get.", **fv)
    define_seconds(
        "lease_seconds", 60.0, "After how long another worker takes over from one that fell silent.", flag_values
    )
    flags.DEFINE_bool("worker", False, "Be a worker: run trials until none is left.", **fv)
    flags.DEFINE_bool("watch", False, "Start no worker; show the sweep until it ends, then write its results.", **fv)
    flags.DEFINE_bool("report", False, "Start nothing; write the results of what is complete by now.", **fv)
    flags.DEFINE_bool("dry_run", False, "Start nothing; print the trials, or the space, and the commands.", **fv)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the user asked for, read and checked."""

    sweep: Sweep
    base: Config
    trials: int
    folder: Path
    name: str
    url: str
    command: launchers.WorkerCommand
    slurm: dict[str, Any]


def main(program: str, arguments: Sequence[str]) -> int:
    """Runs the program.

    Args:
        program: Its path, with which workers are started.
        arguments: As the user typed them.

    Returns:
        The exit code, of `spt_jax.exit_codes`; 1 when a sweep ends without a complete trial, or its workers fail.
    """
    flag_values = flags.FlagValues()
    define_flags(flag_values)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(door_help(__doc__ or "", {"Flags": flag_values}))
        return 0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        arguments = ["--dry_run" if argument == "--dry-run" else argument for argument in arguments]
        read_flags("sweep", flag_values, arguments, config_file_needed=False)
        return _run(program, {name: flag.value for name, flag in own_flags(flag_values).items()}, arguments)
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nsweep: interrupted", file=sys.stderr)
        return INTERRUPTED
    except STORAGE_ERRORS as error:
        told = f"the storage failed ({reason_of(error)}); nothing is lost, the same command goes on"
        print(f"sweep: {told}", file=sys.stderr)
        return STOPPED


def _run(program: str, values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    request = _read(program, values, arguments)
    if values["dry_run"]:
        return _dry_run(request, values)
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {request.folder} cannot be made: {error.strerror}") from error
    with _workplace(request, AWAY_SECONDS if values["worker"] else 0.0) as at:
        return _do(request, at, values)


def _do(request: _Request, at: Workplace, values: Mapping[str, Any]) -> int:
    if values["worker"]:
        return _work(at, values["lease_seconds"])
    if values["report"]:
        return _finish(at)
    leases = Leases(at.storage.engine, request.name, this_process(), values["lease_seconds"])
    if values["watch"]:
        _watch(at, leases, ())
        return _finish(at)
    if values["launcher"] != "local":
        return _submit(request, values)
    return _run_locally(request, at, leases, values["jobs"])


def _read(program: str, values: Mapping[str, Any], arguments: Sequence[str]) -> _Request:
    if not values["sweep"]:
        raise UserError("--sweep is missing; give a sweep file, such as --sweep=configs/sweeps/learning_rates.py")
    path = Path(values["sweep"])
    sweep = load_sweep(path)
    overrides = _overrides(values, arguments)
    base = base_config(sweep, overrides)
    trials = num_trials(sweep)
    check_space(sweep, base)
    name = values["name"] or path.stem
    out = values["out"] or f"runs/sweeps/{name}"
    if is_bucket_url(out):
        raise UserError(f"--out={out} is a bucket; a sweep's runs and results are written into a folder")
    if present(Path(out), "--out") and not Path(out).is_dir():
        raise UserError(f"--out={out} is a file; a sweep's runs and results are written into a folder")
    given = values["storage"] or os.environ.get(launchers.STORAGE_VARIABLE, "")
    launcher = values["launcher"]
    url = storage_url(given, Path(out))
    if launcher != "local" and url.startswith("sqlite"):
        raise UserError(
            f"--launcher={launcher} starts workers on several machines, which SQLite cannot serve; give "
            "--storage=postgresql://USER@HOST/DATABASE"
        )
    # Machines that SkyPilot starts have the project in the folder they begin in; the others share this file system.
    words = ["python", "launch/sweep.py"] if launcher == "skypilot" else [sys.executable, str(Path(program).absolute())]
    words += ["--worker", f"--sweep={path if launcher == 'skypilot' else path.absolute()}", f"--name={name}"]
    words += [f"--out={out if launcher == 'skypilot' else Path(out).absolute()}"]
    words += [f"--lease_seconds={values['lease_seconds']:g}"]
    words += [f"--config.{option}={_typed(value)}" for option, value in overrides.items()]
    command = launchers.WorkerCommand(words, url, name)
    return _Request(sweep, base, trials, Path(out), name, url, command, read_parameters(values["slurm"]))


def _overrides(values: Mapping[str, Any], arguments: Sequence[str]) -> Mapping[str, Any]:
    """The options that --config.NAME=value set, with their values."""
    named = [match.group(1) for argument in arguments if (match := _OVERRIDE.fullmatch(argument))]
    config = flatten(values["config"])
    return {name: config[name] for name in named}


def _typed(value: Any) -> str:
    return str(value) if not isinstance(value, tuple) else repr(value)


@contextmanager
def _workplace(request: _Request, away_seconds: float) -> Iterator[Workplace]:
    storage = open_storage(request.url, away_seconds)
    try:
        yield _opened(request, storage)
    finally:
        storage.engine.dispose()


def _opened(request: _Request, storage: RDBStorage) -> Workplace:
    direction = request.sweep.objective.direction
    study = open_study(storage, request.name, record(request.sweep, request.base), direction, request.trials)
    if request.sweep.pruner is not None:
        study.pruner = request.sweep.pruner
    return Workplace(request.sweep, request.base, request.folder, request.trials, storage, study)


def _work(at: Workplace, lease_seconds: float) -> int:
    leases = Leases(at.storage.engine, at.study.study_name, this_process(), lease_seconds)
    with StopSignal() as stop:
        Worker(at, leases, stop, _say).work()
    return STOPPED if stop.requested else FINISHED


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk that takes no line is no fault of a trial
        print(line, flush=True)


def _run_locally(request: _Request, at: Workplace, leases: Leases, count: int) -> int:
    logs = request.folder / "workers"
    with StopSignal() as stop:
        workers = launchers.start_local(request.command, count, logs)
        try:
            _watch(at, leases, workers, stop)
        except BaseException:
            stop.requested = True
            raise
        finally:
            # A worker that finds nothing left to do ends by itself.
            for worker in workers if stop.requested else ():
                worker.send_signal(signal.SIGTERM)
            codes = [worker.wait() for worker in workers]
    failed = any(code not in (FINISHED, STOPPED) for code in codes)
    unfinished = any(not trial.state.is_finished() for trial in at.trials())
    if stop.requested or (unfinished and not failed):
        told = "" if stop.requested else f" (what its workers said is in {logs})"
        print(f"stopped, every run is saved; the same command goes on from there{told}", file=sys.stderr)
        return STOPPED
    if failed:
        print(f"sweep: a worker failed, see {logs}; the same command goes on", file=sys.stderr)
    return max(_finish(at), int(failed))


def _watch(
    at: Workplace, leases: Leases, workers: Sequence[subprocess.Popen[bytes]], stop: StopSignal | None = None
) -> None:
    def going() -> bool:
        stopped = stop is not None and stop.requested
        return not stopped and (not workers or any(worker.poll() is None for worker in workers))

    watch(lambda: (at.trials(), leases.read()), going, list(at.sweep.space), at.sweep.objective.metric)


def _finish(at: Workplace) -> int:
    best = write_results(at)
    for path in results_of(at.folder):
        print(f"wrote {path}")
    if best is None:
        print("sweep: no trial is complete; trials.json says what became of each", file=sys.stderr)
        return 1
    chosen = ", ".join(f"{name}={value}" for name, value in best.params.items())
    print(f"best: trial {best.number}, {at.sweep.objective.metric} {best.value:.6g} with {chosen}")
    print(f"train it anew with: spt-jax train --config={shlex.quote(str(at.folder / 'best.py'))} --workdir=DIR")
    return 0


def _submit(request: _Request, values: Mapping[str, Any]) -> int:
    count = values["jobs"]
    if values["launcher"] == "slurm":
        parameters = dict(request.slurm)
        cluster = str(parameters.pop("cluster", "slurm"))
        jobs = launchers.start_slurm(request.command, count, request.folder / "slurm", parameters, cluster)
        print(f"submitted {', '.join(job.job_id for job in jobs)}")
    else:
        task = launchers.skypilot_task(Path(values["task"]), request.command, request.folder)
        launchers.start_skypilot(launchers.skypilot_commands(task, request.command, count), request.url, print)
    print("follow it, and write its results at the end, with the same command and --watch")
    return 0


def _dry_run(request: _Request, values: Mapping[str, Any]) -> int:
    sweep = request.sweep
    print(f"{request.trials} trials by {sweep.sampler}, seeds {', '.join(map(str, sweep.seeds))}, base {sweep.base}")
    print(f"{sweep.objective.direction} {sweep.objective.metric} of {sweep.objective.file}")
    if sweep.sampler == "grid":
        for number, point in enumerate(grid(sweep.space)[: request.trials]):
            print(f"  trial {number}: " + ", ".join(f"{name}={value}" for name, value in point.items()))
    else:
        for name, distribution in sweep.space.items():
            print(f"  {name}: {distribution}")
    print(f"storage {hidden(request.url)}, folder {request.folder}")
    count, launcher = values["jobs"], values["launcher"]
    print(f"{count} × {request.command.shown()}")
    if launcher == "slurm":
        print(", ".join(f"{name}={value!r}" for name, value in request.slurm.items()) or "submitit's own parameters")
    if launcher == "skypilot":
        task = request.folder / "skypilot_worker.yaml"
        for words in launchers.skypilot_commands(task, request.command, count):
            print(shlex.join(words))
    return 0
