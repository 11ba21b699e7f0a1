"""launch/slurm.sbatch: one srun, which hears of a stop, and a job that queues itself again after one."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time

import pytest
from stand_ins import REPOSITORY, StandIns, wait_for

pytestmark = pytest.mark.first_python

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
ARGUMENTS = ("--config=my config.py", "--workdir=/shared/a run")
COMMAND = ["srun", ".venv/bin/spt-jax", "train", "--distributed=auto", *ARGUMENTS]
STATE = ["squeue", "--noheader", "--jobs=17", "--format=%T"]


def directives() -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.M))


def test_the_job_asks_for_one_task_a_node_a_warning_before_its_end_and_may_be_queued_again():
    asked = directives()
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "B:TERM@120"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (2, False), (1, False), (137, False)])
def test_the_job_queues_itself_again_after_a_stop_alone_and_keeps_the_exit_code(stand_ins: StandIns, code, again):
    stand_ins.add("srun", {"": [(code, "")]})
    stand_ins.add("squeue", {"": [(0, "RUNNING\n")]})
    stand_ins.add("scontrol")
    done = stand_ins.run("slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="17")
    assert done.returncode == code, done.stderr
    assert stand_ins.calls() == [COMMAND, *([STATE, ["scontrol", "requeue", "17"]] if again else [])]


# What a real squeue of Slurm 22.05 says of a job while scancel ends it; and where it cannot be asked.
@pytest.mark.parametrize(
    ("said", "again"), [((0, "COMPLETING\n"), False), ((0, "CANCELLED\n"), False), ((1, ""), True)]
)
def test_a_job_that_was_cancelled_does_not_queue_itself_again(stand_ins: StandIns, said, again):
    stand_ins.add("srun", {"": [(75, "")]})
    stand_ins.add("squeue", {"": [said]})
    stand_ins.add("scontrol")
    done = stand_ins.run("slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="17")
    assert done.returncode == 75, done.stderr
    assert (["scontrol", "requeue", "17"] in stand_ins.calls()) == again
    assert ("was cancelled" in done.stdout) == (not again)


def test_evaluate_as_the_first_argument_takes_the_place_of_train(stand_ins: StandIns):
    stand_ins.add("srun")
    done = stand_ins.run("slurm.sbatch", "evaluate", "--workdir=/shared/a run", SLURM_JOB_ID="17")
    assert done.returncode == 0, done.stderr
    assert stand_ins.calls() == [[*COMMAND[:2], "evaluate", "--distributed=auto", "--workdir=/shared/a run"]]


def test_srun_gets_the_cpus_of_the_job(stand_ins: StandIns):
    kept = stand_ins.folder / "cpus"
    stand_ins.program("srun", f'#!/usr/bin/env bash\necho "${{SRUN_CPUS_PER_TASK:-}}" >{shlex.quote(str(kept))}\n')
    done = stand_ins.run("slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0, done.stderr
    assert kept.read_text() == "12\n"


@pytest.mark.parametrize(
    ("environment", "platforms"),
    [
        ({}, ""),
        ({"SLURM_GPUS_ON_NODE": "4"}, "cuda,cpu"),
        ({"SLURM_GPUS_ON_NODE": "4", "JAX_PLATFORMS": "rocm"}, "rocm"),
    ],
)
def test_a_job_that_asked_for_gpus_does_not_go_on_with_the_cpu(stand_ins: StandIns, environment, platforms):
    kept = stand_ins.folder / "platforms"
    stand_ins.program("srun", f'#!/usr/bin/env bash\necho "${{JAX_PLATFORMS:-}}" >{shlex.quote(str(kept))}\n')
    environment = {"JAX_PLATFORMS": "", **environment}
    done = stand_ins.run("slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="17", **environment)
    assert done.returncode == 0, done.stderr
    assert kept.read_text() == f"{platforms}\n"


TASK = """#!/usr/bin/env bash
cd {folder}
trap 'touch asked; stop=1' TERM
touch running
until [ -n "${{stop:-}}" ]; do sleep 0.05; done
sleep 0.5
touch saved
exit 75
"""
# As Slurm's own: SIGTERM to srun kills its tasks.
SRUN = """#!/usr/bin/env bash
cd {folder}
./task &
echo $! >task.pid
trap 'kill -KILL "$(cat task.pid)"' TERM
while kill -0 "$(cat task.pid)" 2>/dev/null; do code=0; wait "$(cat task.pid)" || code=$?; done
exit "$code"
"""
SCANCEL = """#!/usr/bin/env bash
cd {folder}
echo "$*" >>scancel.calls
kill -TERM "$(cat task.pid)"
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_reaches_the_tasks_and_the_job_waits_for_their_saving(stand_ins: StandIns, signals):
    stand_ins.add("squeue", {"": [(0, "RUNNING\n")]})
    stand_ins.add("scontrol")
    folder = stand_ins.folder
    for name, text in {"task": TASK, "srun": SRUN, "scancel": SCANCEL}.items():
        stand_ins.program(name, text.format(folder=shlex.quote(str(folder))))
    with stand_ins.started("slurm.sbatch", *ARGUMENTS, SLURM_JOB_ID="17") as process:
        wait_for(folder / "running")
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            wait_for(folder / "asked")
            time.sleep(0.1)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert (folder / "saved").exists()
    assert (folder / "scancel.calls").read_text().splitlines() == ["--signal=TERM 17"] * signals
    assert "stopped and saved" in out
    assert stand_ins.calls() == [STATE, ["scontrol", "requeue", "17"]]


def test_a_dry_run_prints_the_command_and_runs_nothing(stand_ins: StandIns):
    stand_ins.add("srun")
    done = stand_ins.run("slurm.sbatch", "--dry-run", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == COMMAND
    assert stand_ins.calls() == []


@pytest.mark.parametrize(("arguments", "sentence"), [((), "nothing to train"), (ARGUMENTS, "submit it with sbatch")])
def test_a_wrong_use_is_one_sentence(stand_ins: StandIns, arguments, sentence):
    stand_ins.add("srun")
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in stand_ins.environment().items() if not k.startswith("SLURM")},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("slurm: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert stand_ins.calls() == []
