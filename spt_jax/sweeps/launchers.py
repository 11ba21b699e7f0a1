"""Ways to start a sweep's workers: processes here, jobs of SLURM, managed jobs of SkyPilot."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from spt_jax.atomic_file import write_atomically
from spt_jax.errors import UserError, nearest
from spt_jax.exit_codes import STOPPED
from spt_jax.parallel.gpu_shares import gpu_shares
from spt_jax.sweeps.slurm_parameters import with_srun_args

STORAGE_VARIABLE = "SPT_JAX_SWEEP_STORAGE"
"""Environment variable with the storage's address: it may hold a password, which a command line would show."""

_SAVING_SECONDS = 60.0
"""How long a worker may take to stop: submitit's warning comes 90 seconds before the end, unless it is told another."""
_POLL_SECONDS = 0.2

_PREPARED = "[ ! -d .venv ] || . .venv/bin/activate\npython -m pip install --quiet --editable '.[sweep]'\n"


@dataclasses.dataclass(frozen=True)
class WorkerCommand:
    """How a worker is started.

    Attributes:
        words: The command.
        storage: The storage's address, for the worker's environment.
        name: The sweep's.
    """

    words: Sequence[str]
    storage: str
    name: str

    def shown(self) -> str:
        """The command as a user would type it."""
        return shlex.join(self.words)


def start_local(command: WorkerCommand, count: int, logs: Path) -> list[subprocess.Popen[bytes]]:
    """Starts `count` workers on this machine, each with its share of the GPUs; what it says goes into `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    workers = []
    for number, share in enumerate(gpu_shares(count)):
        environment = os.environ | share | {STORAGE_VARIABLE: command.storage}
        with (logs / f"worker_{number}.txt").open("a", encoding="utf-8") as output:
            workers.append(
                subprocess.Popen(
                    command.words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            )
    return workers


class SlurmWorker:
    """What a SLURM job does: it is a worker, and when SLURM takes its node away, a job that is put back in the queue.

    Args:
        command: The worker's command.
    """

    def __init__(self, command: WorkerCommand) -> None:
        self.command = command
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Works until the sweep has no trial left.

        A worker that was stopped before is taken for a job preempted, unless the job was cancelled.

        Raises:
            CalledProcessError: The worker failed.
        """
        environment = os.environ | {STORAGE_VARIABLE: self.command.storage}
        if "SLURM_GPUS_ON_NODE" in environment:
            # JAX would go on with the CPU where the node's driver does not serve it.
            environment.setdefault("JAX_PLATFORMS", "cuda,cpu")
        warning = _submitits_warning()
        with _kept_from_children(warning):
            self._worker = worker = subprocess.Popen(self.command.words, env=environment)
        # Not wait(), in the midst of which `checkpoint` could not ask for the same process.
        try:
            while (code := worker.poll()) is None:
                time.sleep(_POLL_SECONDS)
        finally:
            if worker.poll() is None:
                worker.terminate()
        self._worker = None
        if code == STOPPED and callable(signal.getsignal(warning)) and _job_runs():
            signal.raise_signal(warning)
        elif code not in (0, STOPPED):
            raise subprocess.CalledProcessError(code, list(self.command.words))

    def checkpoint(self) -> Any:
        """Called by submitit, in the midst of the work, before the job's time is over; lets the worker save and end."""
        from submitit.helpers import DelayedSubmission

        worker, self._worker = self._worker, None
        if worker is not None:
            worker.terminate()
            end = time.monotonic() + _SAVING_SECONDS
            while worker.poll() is None and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
        return DelayedSubmission(self)


def _job_runs() -> bool:
    """Whether SLURM has this job running, and not cancelled, by squeue; a job that cannot be asked about runs."""
    command = ["squeue", "--noheader", f"--jobs={_slurm_job()}", "--format=%T"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return True
    return said in ("", "RUNNING")


def _slurm_job() -> str:
    """How SLURM's commands are told this job; the number of one job of an array is also that of the whole array."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    array = [os.environ[name] for name in names if name in os.environ]
    return "_".join(array) if len(array) == len(names) else os.environ.get("SLURM_JOB_ID", "")


def _submitits_warning() -> signal.Signals:
    """The signal by which submitit has SLURM announce a job's end; SLURM may send it to all processes of the job."""
    from submitit import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


@contextmanager
def _kept_from_children(number: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, do not hear a signal, which would end them unsaved."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_slurm(
    command: WorkerCommand, count: int, folder: Path, parameters: Mapping[str, Any], cluster: str = "slurm"
) -> list[Any]:
    """Submits `count` jobs through submitit; returns its jobs.

    Args:
        command: The worker's command.
        count: How many.
        folder: Where submitit keeps its files and the jobs' output; on a file system that the nodes share.
        parameters: Of `submitit.AutoExecutor`, such as ``timeout_min``, ``gpus_per_node`` or ``slurm_partition``.
        cluster: ``slurm``; submitit's ``local`` and ``debug`` run the jobs on this machine.

    Raises:
        UserError: submitit is not installed, there is no SLURM here, a parameter is none, or sbatch refuses the jobs.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher=slurm needs submitit; install spt_jax with the extra sweep") from error
    try:
        # submitit writes the storage's address there, which may hold a password.
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name=command.name, **with_srun_args(parameters))
        with executor.batch():  # which submits at its end
            return [executor.submit(SlurmWorker(command)) for _ in range(count)]
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--launcher=slurm: submitit says: {' '.join(str(error).split())[:400]}") from error


def skypilot_task(task: Path, command: WorkerCommand, folder: Path) -> Path:
    """Writes a SkyPilot task that is `task` with a worker in the place of what it runs; returns its path.

    Raises:
        UserError: The task cannot be read.
    """
    if not task.is_file():
        hint = nearest(str(task), [str(path) for path in task.parent.glob("*.yaml")])
        raise UserError(f"--task={task} does not exist; give a SkyPilot task whose machines a worker shall have.{hint}")
    try:
        described = yaml.safe_load(task.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{task} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(described, dict):
        raise UserError(f"{task} is not a SkyPilot task: it holds no mapping with resources, setup and run")
    # A variable without a value must be given at the launch; those of the run that is replaced are nobody's by now.
    variables = {name: value for name, value in (described.get("envs") or {}).items() if value is not None}
    described |= {"name": command.name, "envs": variables | {STORAGE_VARIABLE: None}}
    described["run"] = _PREPARED + command.shown() + "\n"
    path = folder / "skypilot_worker.yaml"
    write_atomically(path, yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
    return path


def skypilot_commands(task: Path, command: WorkerCommand, count: int) -> list[list[str]]:
    """A ``sky jobs launch`` for each worker; the storage's address comes from the environment."""
    launch = ["sky", "jobs", "launch", "--yes", "--detach-run", "--env", STORAGE_VARIABLE]
    return [[*launch, "--name", f"{command.name}-{number}", str(task)] for number in range(count)]


def start_skypilot(commands: Sequence[Sequence[str]], storage: str, say: Callable[[str], None]) -> None:
    """Runs the commands of `skypilot_commands` one after the other.

    Raises:
        UserError: There is no ``sky`` here, or one of the commands fails; those before it have started their workers.
    """
    if shutil.which("sky") is None:
        raise UserError(
            "--launcher=skypilot needs the command sky (pip install skypilot); --dry_run prints what it would run"
        )
    for words in commands:
        say(shlex.join(words))
        code = subprocess.run(words, env=os.environ | {STORAGE_VARIABLE: storage}, check=False).returncode
        if code:
            raise UserError(f"{shlex.join(words)} ended with exit code {code}; the workers before it were started")
