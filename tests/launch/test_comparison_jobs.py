"""launch/comparison.py with --jobs: so many runs at a time and no more; a failing one is told, the others finish.

A stop ends them all, and none begins.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import wait_for

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# The package's own modules behind a program that trains nothing and notes when it begins and ends.
INIT = "__path__.append({real!r})\n__version__ = '0'\n"
MAIN = """
import json, os, sys, time
from pathlib import Path

door, *flags = sys.argv[1:]
workdir = Path(next(flag for flag in flags if flag.startswith("--workdir=")).partition("=")[2])


def note(what):
    with open({notes!r}, "a") as file:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(json.dumps([time.monotonic(), what, door, str(workdir), gpu]) + "\\n")


note("begins")
# The first ones wait until there are as many as may go at once; one more than that would come while they go on.
deadline = time.monotonic() + 20
while Path({notes!r}).read_text().count("begins") < {jobs} and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.4)
workdir.mkdir(parents=True, exist_ok=True)
failed = door == "train" and {failing!r} in str(workdir)
if door == "train" and not failed:
    perplexity = None if {diverging!r} in str(workdir) else 9.0
    (workdir / "metrics.jsonl").write_text(json.dumps({{"step": 1, "development/perplexity": perplexity}}) + "\\n")
note("fails" if failed else "ends")
print("the reason of the failure" if failed else "done")
sys.exit(3 if failed else 0)
"""

# One that goes on until it is asked to end, and takes its time to save. When all are there that may be, `going` is.
STOPPABLE = """
import os, signal, sys, time
from pathlib import Path

notes, asked = Path({notes!r}), []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: asked.append(1))
with notes.open("a") as file:
    file.write("begins\\n")
if notes.read_text().count("begins") == {jobs}:
    notes.with_name("going").write_text(str(os.getpid()))
deadline = time.monotonic() + 30
while not asked and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
with notes.open("a") as file:
    file.write("saves\\n" if asked else "was not asked\\n")
sys.exit(75)
"""


def prepare(folder: Path, program: str, jobs: int) -> tuple[list[str], dict[str, str]]:
    """The command and its environment, in which `program` stands for ``spt-jax``."""
    stand_in = folder / "stand_in" / "spt_jax"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text(INIT.format(real=str(REPOSITORY / "spt_jax")))
    (stand_in / "__main__.py").write_text(program)
    dialogues = folder / "dialogues.txt"
    dialogues.write_text("1 your persona: i sail.\n2 hi\thello\n")
    command = [
        sys.executable,
        str(REPOSITORY / "launch" / "comparison.py"),
        f"--train={dialogues}",
        f"--test={dialogues}",
    ]
    command += [
        f"--out={folder / 'out'}",
        "--methods",
        "lora",
        "spt",
        "--seeds",
        "0",
        "1",
        "--runs_only",
        f"--jobs={jobs}",
    ]
    return command, os.environ | {"PYTHONPATH": str(stand_in.parent), "CUDA_VISIBLE_DEVICES": "4,6"}


def compare(
    folder: Path, jobs: int, failing: str = "nothing", diverging: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[list]]:
    """Runs the program over the stand-in; its notes are ``[time, what, door, workdir, GPUs]``, by time."""
    program = MAIN.format(notes=str(folder / "notes"), jobs=jobs, failing=failing, diverging=diverging)
    command, environment = prepare(folder, program, jobs)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done, sorted(json.loads(line) for line in (folder / "notes").read_text().splitlines())


def most_at_once(notes: list[list]) -> int:
    running = most = 0
    for _, what, *_ in notes:
        running += 1 if what == "begins" else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("jobs", [2, 3])
def test_so_many_runs_go_at_once_and_no_more(tmp_path, jobs):
    done, notes = compare(tmp_path, jobs)
    assert done.returncode == 0, done.stderr
    assert most_at_once(notes) == jobs
    # Three rates for each method, of which the seed 0 of the chosen one is trained again, and so reused.
    assert [note[1:3] for note in notes].count(["ends", "evaluate"]) == 4


def test_runs_side_by_side_have_each_a_gpu(tmp_path):
    _, notes = compare(tmp_path, 2)
    assert {note[4] for note in notes} == {"4", "6"}
    running = set()
    for _, what, _, _, gpu in notes:
        assert (gpu in running) == (what == "ends"), "no two runs have one in common"
        running ^= {gpu}


def test_a_failing_run_is_told_and_the_others_finish(tmp_path):
    done, notes = compare(tmp_path, 2, failing="lora/lr_0.003")
    assert done.returncode == 3
    (told,) = [line for line in done.stdout.splitlines() if "failed, see" in line]
    assert "lora-lr_0.003-seed_0-train" in told
    assert Path(told.rpartition("failed, see ")[2]).read_text().strip() == "the reason of the failure"
    ended = [(door, Path(workdir).parts[-3:]) for _, what, door, workdir, _ in notes if what == "ends"]
    assert {parts[1] for door, parts in ended if parts[0] == "lora" and door == "train"} == {"lr_0.001", "lr_0.01"}
    assert sorted(parts[2] for door, parts in ended if parts[0] == "spt" and door == "evaluate") == ["seed_0", "seed_1"]


def test_a_rate_whose_perplexity_is_no_number_is_not_taken(tmp_path):
    done, _ = compare(tmp_path, 2, diverging="lora/lr_0.001")
    assert done.returncode == 0, done.stderr
    tried = json.loads((tmp_path / "out" / "trials.json").read_text())["lora"]
    assert tried["development perplexity"]["0.001"] == math.inf
    assert tried["chosen"] == 0.003


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    "who",
    ["the program, by SIGTERM", "the program, by SIGINT", "a terminal", "a terminal that closes", "one of the runs"],
)
def test_a_stop_ends_the_runs_that_are_under_way_and_begins_none(tmp_path, jobs, who):
    command, environment = prepare(tmp_path, STOPPABLE.format(notes=str(tmp_path / "notes"), jobs=jobs), jobs)
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            wait_for(tmp_path / "going")
            if who.startswith("a terminal"):
                os.killpg(process.pid, signal.SIGHUP if "closes" in who else signal.SIGINT)
            elif who == "one of the runs":
                os.kill(int((tmp_path / "going").read_text()), signal.SIGTERM)
            else:
                process.send_signal(signal.SIGINT if "SIGINT" in who else signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            # The notes of a run that nobody waited for come later.
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, err
    assert "stopped; the same command goes on" in err
    assert (tmp_path / "notes").read_text().split() == ["begins"] * jobs + ["saves"] * jobs


def mistaken(folder: Path, *flags: str) -> str:
    """What the program says to a mistake, after which nothing was trained."""
    command, environment = prepare(
        folder, MAIN.format(notes=str(folder / "notes"), jobs=1, failing="", diverging=""), 1
    )
    done = subprocess.run(
        [*command, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and not (folder / "notes").exists()
    assert done.stderr.startswith("comparison: ") and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--baseline=promt_tuning"], "--baseline is 'promt_tuning'; allowed: one of the methods that are compared"),
        (["--baseline=zero_shot"], "allowed: one of the methods that are compared, lora, spt."),
        (["--methods", "lorra"], "there is no method 'lorra'; allowed: "),
        (["--methods", "lora", "--options", "spt_balanced"], "add spt to --methods"),
        (["--test=gone.txt"], "--test: there is no file gone.txt"),
        (["--test=bad.txt", "--test_dialogues=1"], "--test: bad.txt cannot be read: 'utf-8' codec"),
        (["--out=bad.txt/out"], "--out: the folder bad.txt/out cannot be made: Not a directory"),
        (["--train=gone.txt"], "--train: there is no file gone.txt"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(tmp_path, flags, sentence):
    (tmp_path / "bad.txt").write_bytes(b"1 your persona: \xff\n")
    assert sentence in mistaken(tmp_path, *flags)


def test_the_first_test_dialogues_are_those_of_the_file_that_is_given(tmp_path):
    def compared(test: str) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(tmp_path / "stand_in", ignore_errors=True)
        program = MAIN.format(notes=str(tmp_path / "notes"), jobs=1, failing="nothing", diverging="nothing")
        command, environment = prepare(tmp_path, program, 1)
        flags = [f"--test={test}", "--test_dialogues=1", "--out=~/out"]
        return subprocess.run(
            [*command, *flags],
            cwd=tmp_path,
            env=environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    (tmp_path / "a.txt").write_text("1 your persona: i sail.\n2 hi\tyo\n1 your persona: i ski.\n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("1 your persona: i row.\n2 hi\tyo\n")
    done = compared("~/a.txt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "test_1.txt").read_text() == "1 your persona: i sail.\n2 hi\tyo\n"
    assert not (tmp_path / "~").exists()
    assert compared("~/a.txt").returncode == 0
    other = compared("~/b.txt")
    assert other.returncode == 2
    assert "test_1.txt holds other dialogues than --test=" in other.stderr
