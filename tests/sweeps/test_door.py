"""launch/sweep.py with the real ``spt-jax train`` on a tiny LM: two workers, a kill, and the results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fast_compilation
import pytest
from short_run import write_short_run
from stand_in_sweep import start_worker, workplace, write_sweep
from test_workers import ended, wait_until

from spt_jax.commands.configuration import load_config
from spt_jax.config import flatten
from spt_jax.exit_codes import STOPPED
from spt_jax.sweeps.storage import open_storage

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SWEEP = """
from optuna.distributions import CategoricalDistribution, FloatDistribution
from spt_jax.sweeps.description import Sweep

def get_sweep():
    return Sweep(
        base="base.py",
        space={
            "optimizer.learning_rate": FloatDistribution(1e-3, 1.0, log=True),
            "objective.fusion_weight": CategoricalDistribution([0.0, 1.0]),
        },
        sampler="tpe",
        num_trials=3,
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    write_short_run(path, steps=4, evaluate_every=2).rename(path / "base.py")
    (path / "sweep.py").write_text(SWEEP)
    return path


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "XLA_FLAGS": fast_compilation.FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(REPOSITORY / "launch" / "sweep.py"), f"--sweep={folder / 'sweep.py'}", *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, *flags: str) -> tuple[int, str, str]:
    process = start(folder, *flags)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.first_python
def test_a_sweep_of_real_trainings_is_stopped_killed_resumed_and_its_best_config_is_the_best_trials(folder):
    out = folder / "out"
    flags = (f"--out={out}", "--jobs=2", "--config.seed=5", "--config.data.batch=2")
    first = start(folder, *flags)
    began = time.monotonic()
    try:
        while first.poll() is None and not list(out.glob("trial_*/seed_0/checkpoints/1")):
            assert time.monotonic() - began < 120
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGTERM)  # its workers and their runs end with it
        _, told = first.communicate(timeout=120)
    assert first.returncode == STOPPED and "stopped, every run is saved" in told
    code, printed, told = run(folder, *flags)
    assert code == 0, told
    assert printed.count("wrote ") == 3 and "best: trial " in printed
    trials = json.loads((out / "trials.json").read_text())
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 3
    assert any("trial 0: running" in line for line in told.splitlines())
    best = min(trials, key=lambda trial: trial["value"])
    assert f"best: trial {best['trial']}, development/perplexity {best['value']:.6g}" in printed
    workdir = out / f"trial_{best['trial']:04d}" / "seed_0"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    perplexities = [row.get("development/perplexity") for row in rows]
    assert best["value"] == min(value for value in perplexities if value is not None)
    trained = json.loads((workdir / "config.json").read_text())["config"]
    assert json.dumps(flatten(trained)) == json.dumps(flatten(load_config(str(out / "best.py")).to_dict()))
    assert (trained["seed"], trained["data"]["batch"]) == (0, 2)
    assert "<svg" in (out / "report.html").read_text()


def test_a_dry_run_prints_the_space_and_the_commands_and_makes_nothing(folder):
    before = sorted(folder.iterdir())
    url = "postgresql://me:s3cret@db/sweeps"
    code, printed, _ = run(folder, "--dry-run", f"--storage={url}", "--launcher=skypilot", "--jobs=2", "--out=/runs/x")
    assert code == 0 and sorted(folder.iterdir()) == before
    assert "3 trials by tpe" in printed and "optimizer.learning_rate: FloatDistribution" in printed
    assert printed.count("sky jobs launch") == 2 and "launch/sweep.py --worker" in printed
    assert "s3cret" not in printed and "postgresql+psycopg://me:***@db/sweeps" in printed


def test_a_dry_run_shows_the_parameters_of_slurm_and_refuses_what_cannot_be_used(folder):
    flags = ("--dry-run", "--storage=postgresql://me@db/sweeps", "--launcher=slurm")
    code, printed, _ = run(folder, *flags, "--slurm=timeout_min=90", "--slurm=slurm_account=0123")
    assert code == 0 and "timeout_min=90, slurm_account='0123'" in printed
    code, _, told = run(folder, *flags, "--slurm=slurm_time=4:00:00")
    assert code == 2 and "give a job's time as whole minutes" in told


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--out=gs://bucket/sweep",), "is a bucket; a sweep's runs and results are written into a folder"),
        (("--out={sweep}",), "sweep.py is a file; a sweep's runs and results are written into a folder"),
        (("--jobs=0",), "--jobs is '0'; allowed"),
        (("--job=2",), "there is no flag --job for sweep. Did you mean '--jobs'?"),
        (("--config.optimizer.learning_rate=1",), "'optimizer.learning_rate' varies in this sweep"),
        (("--config.optimizer.learning_rat=1",), "there is no option 'optimizer.learning_rat'"),
        (("--config.bank.num_prompts=0",), "bank.num_prompts is 0"),
        (("--storage=postgresql://me:p@x:s3cret@db/y", "--dry_run"), "--storage=db/y is not a storage; allowed: "),
        (("--storage=mysql://x/y",), "--storage=mysql://x/y is not a storage; allowed: postgresql://"),
        (("--storage=postgresql://me:s3cret@127.0.0.1:1/x",), "cannot be used: connection failed"),
        (("--launcher=slurm",), "which SQLite cannot serve; give --storage=postgresql://"),
        (("--launcher=slurmm",), "--launcher is 'slurmm'; allowed: local, slurm, skypilot"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_run(folder, flags, sentence, capsys, monkeypatch, tmp_path):
    from spt_jax.sweeps.door import main

    monkeypatch.chdir(tmp_path)
    flags = [flag.format(sweep=folder / "sweep.py") for flag in flags]
    assert main("launch/sweep.py", [f"--sweep={folder / 'sweep.py'}", "--out=out", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sweep: ") and sentence in told and told.count("\n") == 1 and "s3cret" not in told
    assert not list(tmp_path.glob("out/*"))


def slurm_jobs(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *slurm: str) -> tuple[int, list[dict]]:
    """The exit code of a sweep whose workers SLURM shall start, and with which parameters it was asked to."""
    from spt_jax.sweeps import door

    asked: list[dict] = []
    monkeypatch.setattr(door, "open_storage", lambda *_: open_storage(f"sqlite:///{out / 'sweep.db'}"))
    monkeypatch.setattr(door.launchers, "start_slurm", lambda *given: asked.append(given[3]) or [])
    flags = [f"--sweep={folder / 'sweep.py'}", f"--out={out}", "--launcher=slurm", "--storage=postgresql://me@db/x"]
    return door.main("launch/sweep.py", [*flags, *(f"--slurm={text}" for text in slurm)]), asked


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("timeout_min=240", 240),
        ("mem_gb=7.5", 7.5),
        ("slurm_account=0123", "0123"),
        ("slurm_account=1_000", "1_000"),
        ("slurm_qos=off", "off"),
        ("slurm_qos=1.50", "1.50"),
        ("slurm_partition=null", "null"),
        ("slurm_comment=a: b", "a: b"),
        ("slurm_nodelist=node[1-4]", "node[1-4]"),
        ("slurm_comment=", ""),
        ("slurm_use_srun=false", False),
        ("slurm_exclusive=true", True),
        ("slurm_setup=[module load cuda, 'ulimit -c 0']", ["module load cuda", "ulimit -c 0"]),
        ("slurm_srun_args=[-n, 2]", ["-n", "2"]),
        ("slurm_additional_parameters={begin: 4:00:00, spread-job: true}", {"begin": "4:00:00", "spread-job": True}),
        ('slurm_additional_parameters={"mail-type": "END"}', {"mail-type": "END"}),
    ],
)
def test_slurm_is_given_values_as_they_were_typed(folder, text, value, monkeypatch, tmp_path):
    code, asked = slurm_jobs(folder, tmp_path, monkeypatch, text)
    assert code == 0 and asked == [{text.partition("=")[0]: value}]
    assert type(asked[0][text.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slurm_time=4:00:00", "give a job's time as whole minutes, as in --slurm=timeout_min=240"),
        ("slurm_time=04:00:00", "give a job's time as whole minutes, as in --slurm=timeout_min=240"),
        ("time=240", "give a job's time as whole minutes, as in --slurm=timeout_min=240"),
        ("slurm_timeout_min=4:00:00", "give a job's time as whole minutes, as in --slurm=timeout_min=240"),
        ("timeout_min=true", "give a job's time as whole minutes, as in --slurm=timeout_min=240"),
        ("slurm_setup=[a, [b]", "is no list or mapping of YAML"),
        ("timeout_min", "is not NAME=VALUE, as in --slurm=timeout_min=240"),
    ],
)
def test_a_parameter_of_slurm_that_cannot_be_used_is_one_sentence(
    folder, text, sentence, capsys, monkeypatch, tmp_path
):
    assert slurm_jobs(folder, tmp_path, monkeypatch, text) == (2, [])
    told = capsys.readouterr().err
    assert told.startswith(f"sweep: --slurm={text}") and sentence in told and told.count("\n") == 1


@pytest.mark.parametrize(("codes", "ends"), [([75], 75), ([75, 75], 75), ([0], 75), ([75, 1], 1), ([-9], 1)])
def test_workers_that_were_stopped_one_by_one_leave_a_stopped_sweep_and_failed_ones_a_failed(
    folder, codes, ends, capsys, monkeypatch, tmp_path
):
    from spt_jax.sweeps import door

    def started(command: object, count: int, logs: Path) -> list[subprocess.Popen[bytes]]:
        ended = [f"exit {code}" if code >= 0 else f"kill {code} $$" for code in codes]
        return [subprocess.Popen(["sh", "-c", command]) for command in ended]

    monkeypatch.setattr(door.launchers, "start_local", started)
    assert door.main("launch/sweep.py", [f"--sweep={folder / 'sweep.py'}", f"--out={tmp_path / 'out'}"]) == ends
    told = capsys.readouterr().err
    assert ("stopped, every run is saved" in told) == (ends == STOPPED)
    assert ("a worker failed" in told) == (ends == 1)
    assert (tmp_path / "out" / "trials.json").exists() == (ends == 1)


def test_a_worker_that_is_stopped_says_so_by_its_exit_code(folder, monkeypatch, tmp_path):
    from spt_jax.sweeps import door

    monkeypatch.setattr(door.Worker, "work", lambda self: signal.raise_signal(signal.SIGTERM))
    arguments = [f"--sweep={folder / 'sweep.py'}", f"--out={tmp_path / 'out'}", "--worker"]
    assert door.main("launch/sweep.py", arguments) == STOPPED


def without_workers(file: Path, flag: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the program on a sweep of `stand_in_sweep`; it may start no worker."""
    from spt_jax.sweeps import door

    monkeypatch.setattr(door.launchers, "start_local", lambda *_: pytest.fail("a worker was started"))
    out, name = file.parent / "out", file.parent.name
    return door.main("launch/sweep.py", [f"--sweep={file}", f"--out={out}", f"--name={name}", flag])


def test_a_report_tells_what_is_complete_by_now_and_starts_nothing(capsys, monkeypatch, tmp_path):
    file = write_sweep(tmp_path / "sweep.py")
    at = workplace(file)
    assert without_workers(file, "--report", monkeypatch) == 1
    assert "no trial is complete" in capsys.readouterr().err
    worker = start_worker(file, step=0.2)
    with ended([worker]):
        wait_until(lambda: at.trials()[0].state.name == "COMPLETE")
    assert without_workers(file, "--report", monkeypatch) == 0
    assert "best: trial 0, development/perplexity" in capsys.readouterr().out
    states = [trial["state"] for trial in json.loads((tmp_path / "out" / "trials.json").read_text())]
    assert states[0] == "COMPLETE" and "COMPLETE" not in states[1:]
    assert (tmp_path / "out" / "best.py").is_file() and "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_a_watch_shows_what_others_train_until_the_last_trial_and_writes_the_results(capsys, monkeypatch, tmp_path):
    from spt_jax.sweeps import door

    file = write_sweep(tmp_path / "sweep.py")
    worker = start_worker(file)
    # A watch goes on for ever where no worker is left; this one ends with its own.
    whole = door.watch
    monkeypatch.setattr(door, "watch", lambda read, _, *rest: whole(read, lambda: worker.poll() is None, *rest))
    with ended([worker]):
        assert without_workers(file, "--watch", monkeypatch) == 0
    printed, told = capsys.readouterr()
    assert [told.count(f"trial {number}: complete development/perplexity") for number in range(4)] == [1] * 4
    assert "best: trial 3, development/perplexity" in printed
    trials = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert {trial["state"] for trial in trials} == {"COMPLETE"}


def test_the_help_names_every_flag(capsys):
    from spt_jax.sweeps.door import main

    assert main("launch/sweep.py", ["--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("sweep", "out", "name", "storage", "jobs", "launcher", "slurm", "task", "lease_seconds"):
        assert f"\n  --{flag}\n" in printed
    for flag in ("worker", "watch", "report", "dry_run"):
        assert f"\n  --[no]{flag}\n" in printed


def test_without_optuna_the_program_says_which_extra_brings_it(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ImportError('absent')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(REPOSITORY / "launch" / "sweep.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install '.[sweep]'" in done.stderr


def test_a_reader_that_leaves_ends_a_dry_run_in_silence_and_a_full_disk_is_told(folder):
    command = [sys.executable, str(REPOSITORY / "launch" / "sweep.py"), f"--sweep={folder / 'sweep.py'}", "--dry_run"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=folder, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=folder, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "sweep: what is printed cannot be written: No space left on device\n")
