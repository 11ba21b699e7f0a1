"""launch/tpu_vm.sh: what is asked of gcloud, in which order, whatever becomes of the TPU."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence

import pytest
from stand_ins import DONE, WAITS, Answer, StandIns, wait_for

pytestmark = pytest.mark.first_python

URL = "gs://bucket/a run"
TRAIN = ("--", "--config=configs/quickstart.py", "--config.seed=1")


def arguments(stand_ins: StandIns, *options: str, train: Sequence[str] = TRAIN) -> list[str]:
    named = ("--name", "my tpu", "--zone", "us-a", "--type", "v5litepod-8", "--workdir", URL)
    return [*named, "--logs", str(stand_ins.folder / "logs of it"), *options, *train]


def script(stand_ins: StandIns, *options: str, train: Sequence[str] = TRAIN) -> subprocess.CompletedProcess[str]:
    stand_ins.add("tar")
    return stand_ins.run("tpu_vm.sh", *arguments(stand_ins, *options, train=train), POLL_SECONDS="0")


# No terminal is there to be asked: what is not given a zone, or deletes without --quiet, would wait.
NAMED = r"(my tpu|a) --zone \S+"
CHANGES = (
    rf"tpu-vm create {NAMED} --accelerator-type \S+ --version \S+( --spot)?",
    rf"tpu-vm ssh {NAMED} --worker=(all|\d+) --command=.+",
    r"tpu-vm scp .+ --zone \S+ --worker=(all|\d+)",
    rf"tpu-vm delete {NAMED} --quiet",
    rf"queued-resources create {NAMED} --node-id \1 --accelerator-type \S+ --runtime-version \S+( --spot)?",
    rf"queued-resources delete {NAMED} --force --quiet",
)


def gcloud(
    stand_ins: StandIns,
    states: Sequence[Answer],
    codes: Sequence[Answer] = ((0, "0\n"),),
    queue: Sequence[str | Answer] = ("ACTIVE",),
    hosts: int = 1,
    first: Mapping[str, list[Answer]] | None = None,
) -> None:
    """One that knows the changes and questions of the script alone; `first` are rules before the others."""
    rules = {
        rf"tpu-vm describe {NAMED} --format=value\(state\)": list(states),
        rf"tpu-vm describe {NAMED} --format=value\(networkEndpoints\.len\(\)\)": [(0, f"{hosts}\n")],
        rf"queued-resources describe {NAMED} --format=value\(state\.state\)": [
            (0, f"{state}\n") if isinstance(state, str) else state for state in queue
        ],
        rf"tpu-vm ssh {NAMED} --worker=0 --command=cat spt_jax/train\.exit": list(codes),
        **{change: [DONE] for change in CHANGES},
    }
    whole = {f"^compute tpus {pattern}$": answers for pattern, answers in rules.items()}
    stand_ins.add("gcloud", {**(first or {}), **whole})


def calls(stand_ins: StandIns) -> list[list[str]]:
    """Those of gcloud."""
    return [call for call in stand_ins.calls() if call[0] == "gcloud"]


def steps(stand_ins: StandIns) -> list[str]:
    """The calls that change something, each by one word."""
    named = []
    for call in calls(stand_ins):
        text = " ".join(call)
        verb = call[4]
        if verb == "ssh":
            verb = (
                "mount"
                if "mountpoint" in text
                else "install"
                if "launch/environment.sh" in text
                else "train"
                if "spt-jax train" in text
                else "code"
            )
        elif verb == "scp":
            verb = "logs" if "train.log" in text else "send"
        if verb not in ("describe", "code"):
            named.append(verb)
    return named


ABSENT: Answer = (1, "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'my tpu' was not found.\n")
OFFLINE: Answer = (1, "ERROR: gcloud crashed (TransportError): Max retries exceeded\n")
READY: Answer = (0, "READY\n")
PREEMPTED: Answer = (0, "PREEMPTED\n")
ONCE = ["create", "send", "install", "train", "logs", "delete"]


def test_a_tpu_is_made_used_and_deleted_in_this_order(stand_ins):
    gcloud(stand_ins, [ABSENT, READY])
    done = script(stand_ins)
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == ONCE
    create = next(call for call in calls(stand_ins) if call[4] == "create")
    assert create[1:7] == ["compute", "tpus", "tpu-vm", "create", "my tpu", "--zone"]
    assert create[7:] == ["us-a", "--accelerator-type", "v5litepod-8", "--version", "v2-alpha-tpuv5-lite"]


def test_training_runs_on_all_hosts_with_its_arguments_as_they_were_given(stand_ins, tmp_path):
    gcloud(stand_ins, [ABSENT, READY])
    script(stand_ins, train=("--", "--config=my config.py", "--config.data.train=it's $HOME.txt"))
    (call,) = [call for call in calls(stand_ins) if "spt-jax train" in " ".join(call)]
    assert "--worker=all" in call
    command = next(part for part in call if part.startswith("--command=")).removeprefix("--command=")
    # What a host's shell makes of it, with a stand-in for the command.
    home = tmp_path / "host"
    (home / "spt_jax" / ".venv" / "bin").mkdir(parents=True)
    program = home / "spt_jax" / ".venv" / "bin" / "spt-jax"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >arguments\nexit 75\n')
    program.chmod(0o755)
    subprocess.run(["bash", "-c", command], cwd=home, check=True, timeout=30)
    given = (home / "spt_jax" / "arguments").read_text().splitlines()
    assert given == [
        "train",
        "--distributed=auto",
        f"--workdir={URL}",
        "--config=my config.py",
        "--config.data.train=it's $HOME.txt",
    ]
    assert (home / "spt_jax" / "train.exit").read_text() == "75\n"


def test_one_that_is_there_is_used_again_and_kept_on_demand(stand_ins):
    gcloud(stand_ins, [READY])
    done = script(stand_ins, "--keep")
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == ONCE[1:-1]
    assert "kept and costs" in done.stderr


@pytest.mark.parametrize("options", [("--spot",), ("--spot", "--queued")])
def test_a_preempted_tpu_is_deleted_made_again_and_trains_on(stand_ins, options):
    gcloud(stand_ins, [ABSENT, PREEMPTED, PREEMPTED, READY])
    done = script(stand_ins, *options)
    assert done.returncode == 0, done.stderr
    forgotten = ["delete"] if "--queued" in options else []
    assert steps(stand_ins) == [*forgotten, *ONCE[:4], "delete", *ONCE]
    made = [call for call in calls(stand_ins) if call[4] == "create"]
    assert all("--spot" in call for call in made)
    assert {call[3] for call in made} == {"queued-resources" if "--queued" in options else "tpu-vm"}


NO_ROOM: Answer = (7, "ERROR: (gcloud.compute.tpus.tpu-vm.create) There is no more capacity in the zone\n")


@pytest.mark.parametrize("times", [1, 3])
def test_a_preempted_tpu_for_which_there_is_no_room_is_tried_for_again(stand_ins, times):
    states = [ABSENT, PREEMPTED, PREEMPTED, *[ABSENT] * times, READY]
    gcloud(stand_ins, states, first={"tpu-vm create": [DONE, *[NO_ROOM] * times, DONE]})
    done = script(stand_ins, "--spot")
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == [*ONCE[:4], "delete", *["create"] * times, *ONCE]
    assert done.stderr.count("could not be made again") == times


def test_a_queue_that_gives_a_preempted_tpu_up_is_tried_again(stand_ins):
    states = [ABSENT, PREEMPTED, PREEMPTED, ABSENT, READY]
    gcloud(stand_ins, states, queue=["ACTIVE", "FAILED", "ACTIVE"])
    done = script(stand_ins, "--spot", "--queued")
    assert done.returncode == 0, done.stderr
    # A request that is left is forgotten before each new one.
    assert steps(stand_ins) == ["delete", *ONCE[:4], "delete", "create", "delete", *ONCE]


def test_as_often_as_it_may_be_made_again_it_is_tried_for(stand_ins):
    gcloud(stand_ins, [ABSENT, PREEMPTED, PREEMPTED, ABSENT], first={"tpu-vm create": [DONE, NO_ROOM]})
    done = script(stand_ins, "--spot", "--retries", "2")
    assert done.returncode == 75, done.stderr
    assert steps(stand_ins) == [*ONCE[:4], "delete", "create", "create", "delete"]


@pytest.mark.parametrize(
    ("states", "failing", "number"),
    [
        ([ABSENT, PREEMPTED, OFFLINE], "nothing", 4),
        ([ABSENT, OFFLINE], "nothing", 4),
        ([ABSENT, OFFLINE], "launch/environment.sh", 3),
    ],
)
def test_a_gcloud_that_no_longer_answers_ends_it_whatever_is_left_to_be_tried(stand_ins, states, failing, number):
    gcloud(stand_ins, states, first={failing: [(255, "")]})
    done = script(stand_ins, "--spot", "--retries", "2")
    assert done.returncode == 1
    assert done.stderr.count("gcloud does not tell the state of my tpu") == 1
    assert steps(stand_ins) == [*ONCE[:number], "delete"]


SHARED = ("--nfs", "10.0.0.2:/share", "--workdir", "/mnt/runs/a")


@pytest.mark.parametrize(("step", "number"), [("tpu-vm scp", 1), ("launch/environment.sh", 2), ("mountpoint", 3)])
def test_a_tpu_that_is_preempted_while_it_is_set_up_is_made_again(stand_ins, step, number):
    gcloud(stand_ins, [ABSENT, PREEMPTED, PREEMPTED, READY], first={step: [(255, ""), DONE]})
    done = script(stand_ins, "--spot", *SHARED)
    assert done.returncode == 0, done.stderr
    whole = ["create", "send", "install", "mount", "train", "logs", "delete"]
    assert steps(stand_ins) == [*whole[: number + 1], "delete", *whole]
    assert "my tpu was preempted" in done.stderr


@pytest.mark.parametrize(("step", "number"), [("tpu-vm scp", 1), ("launch/environment.sh", 2), ("mountpoint", 3)])
def test_a_set_up_that_fails_on_a_tpu_that_is_there_is_tried_again(stand_ins, step, number):
    gcloud(stand_ins, [ABSENT, READY], first={step: [(255, ""), (255, ""), DONE]})
    done = script(stand_ins, *SHARED)
    assert done.returncode == 0, done.stderr
    tried = ["send", "install", "mount"][:number]
    assert steps(stand_ins) == ["create", *tried, *tried, "send", "install", "mount", "train", "logs", "delete"]


def test_a_spot_tpu_of_the_queue_that_is_gone_is_asked_for_anew(stand_ins):
    gcloud(stand_ins, [ABSENT, ABSENT, ABSENT, READY])
    done = script(stand_ins, "--spot", "--queued")
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == ["delete", *ONCE[:4], "delete", *ONCE]
    assert {call[3] for call in calls(stand_ins) if call[4] == "delete"} == {"queued-resources"}


def test_after_a_lost_connection_the_training_is_waited_for_on_the_same_tpu(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], codes=[(255, ""), (1, ""), (0, "0\n")])
    done = script(stand_ins)
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == [*ONCE[:3], "train", "train", *ONCE[3:]]
    assert done.stderr.count("the connection to my tpu was lost") == 2


@pytest.mark.parametrize("states", [[OFFLINE, READY], [READY, OFFLINE, OFFLINE, READY]])
def test_a_tpu_that_cannot_be_asked_is_neither_made_nor_deleted(stand_ins, states):
    gcloud(stand_ins, states)
    done = script(stand_ins, "--keep")
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == ONCE[1:-1]
    assert "Max retries exceeded" in done.stderr


def test_a_gcloud_that_never_answers_is_told(stand_ins):
    gcloud(stand_ins, [OFFLINE])
    done = script(stand_ins, "--keep", "--retries", "2")
    assert done.returncode == 1
    assert "gcloud does not tell the state of my tpu" in done.stderr
    assert steps(stand_ins) == []


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.get' denied",
        "ERROR: (gcloud) There was a problem refreshing your current auth tokens. Please run: $ gcloud auth login",
    ],
)
def test_what_no_waiting_mends_is_told_at_once(stand_ins, said):
    gcloud(stand_ins, [(1, f"{said}\n")])
    done = script(stand_ins, "--keep")
    assert done.returncode == 1
    assert said in done.stderr
    assert len(calls(stand_ins)) == 1


def test_the_hosts_take_uv_though_their_python_is_managed_by_the_system(stand_ins):
    gcloud(stand_ins, [ABSENT, READY])
    script(stand_ins)
    (call,) = [call for call in calls(stand_ins) if "launch/environment.sh" in " ".join(call)]
    assert "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv" in " ".join(call)


def test_a_stopped_run_goes_on_and_a_mistake_does_not(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], codes=[(0, "75\n"), (0, "2\n")])
    done = script(stand_ins)
    assert done.returncode == 2, done.stderr
    assert steps(stand_ins) == [*ONCE[:5], *ONCE[1:]]


@pytest.mark.parametrize("code", [1, 137, 143])
def test_a_run_whose_host_was_lost_is_tried_again_on_the_same_tpu_a_few_times(stand_ins, code):
    lost = (0, f"{code}\n")
    gcloud(stand_ins, [ABSENT, READY], codes=[lost, lost, (0, "75\n"), lost, lost, lost, (0, "0\n")])
    done = script(stand_ins)
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == [*ONCE[:1], *ONCE[1:5] * 7, "delete"]
    assert f"exit code {code}; it is tried again, 2 of 3 times" in done.stderr


@pytest.mark.parametrize("retries", ["0", "1"])
def test_an_error_of_the_last_attempt_is_told_by_its_code(stand_ins, retries):
    gcloud(stand_ins, [ABSENT, READY], codes=[(0, "1\n")])
    done = script(stand_ins, "--retries", retries)
    assert done.returncode == 1
    assert steps(stand_ins).count("train") == int(retries) + 1


def test_a_run_that_always_ends_with_an_error_ends_the_script(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], codes=[(0, "1\n")])
    done = script(stand_ins)
    assert done.returncode == 1
    assert steps(stand_ins) == [*ONCE[:1], *ONCE[1:5] * 4, "delete"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("options", "end"), [((), ["delete"]), (("--queued",), ["delete"]), (("--keep",), [])])
def test_a_stop_of_the_script_deletes_the_tpu_at_once_unless_it_is_kept(stand_ins, number, options, end):
    gcloud(stand_ins, [READY], first={r"spt-jax train": [WAITS]})
    stand_ins.add("tar")
    with stand_ins.started("tpu_vm.sh", *arguments(stand_ins, *options), POLL_SECONDS="0") as process:
        wait_for(stand_ins.folder / "waiting")
        # A terminal's Ctrl-C goes to the whole group of its foreground, the waiting gcloud among it.
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert steps(stand_ins) == ["send", "install", "train", *end]
    assert ("kept and costs" in err) == ("--keep" in options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_script_alone_is_heard_while_gcloud_runs(stand_ins, number):
    """As docker stop and systemd send it; the ssh of a training runs for hours."""
    gcloud(stand_ins, [READY], first={r"spt-jax train": [WAITS]})
    stand_ins.add("tar")
    with stand_ins.started("tpu_vm.sh", *arguments(stand_ins), POLL_SECONDS="0") as process:
        wait_for(stand_ins.folder / "waiting")
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert steps(stand_ins) == ["send", "install", "train", "delete"]


def test_after_so_many_preemptions_it_ends_with_the_code_of_a_stop(stand_ins):
    gcloud(stand_ins, [ABSENT, PREEMPTED])
    done = script(stand_ins, "--retries", "2")
    assert done.returncode == 75
    assert steps(stand_ins).count("create") == 3
    assert steps(stand_ins)[-1] == "delete"


def test_the_logs_of_every_host_are_brought_even_after_a_failure(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], codes=[(0, "2\n")], hosts=3)
    done = script(stand_ins)
    assert done.returncode == 2
    logs = [call for call in calls(stand_ins) if "train.log" in " ".join(call) and call[4] == "scp"]
    assert [call[5:] for call in logs] == [
        [
            "my tpu:spt_jax/train.log",
            str(stand_ins.folder / "logs of it" / f"worker-{n}.log"),
            "--zone",
            "us-a",
            f"--worker={n}",
        ]
        for n in range(3)
    ]
    assert steps(stand_ins)[-1] == "delete"


def test_a_run_that_left_no_exit_code_is_a_failure(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], codes=[(255, "")])
    done = script(stand_ins, "--retries", "2")
    assert done.returncode == 1
    assert "left no exit code" in done.stderr
    assert steps(stand_ins).count("train") == 3


@pytest.mark.parametrize("failing", ["tpu-vm create", "launch/environment.sh", "tpu-vm scp"])
def test_whatever_fails_the_tpu_is_deleted(stand_ins, failing):
    gcloud(stand_ins, [ABSENT, READY], first={failing: [(3, "")]})
    done = script(stand_ins)
    assert done.returncode == 3, done.stderr
    assert steps(stand_ins)[-1] == "delete"
    assert "train" not in steps(stand_ins)
    assert steps(stand_ins).count("create") == 1


def test_a_share_is_mounted_on_all_hosts_before_training_and_the_run_lies_there(stand_ins):
    gcloud(stand_ins, [ABSENT, READY])
    named = ("--name", "a", "--zone", "z", "--type", "v5litepod-16", "--logs", str(stand_ins.folder / "logs"))
    stand_ins.add("tar")
    done = stand_ins.run("tpu_vm.sh", *named, "--nfs", "10.0.0.2:/my share", "--workdir", "/mnt/runs/a", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == ["create", "send", "install", "mount", "train", "logs", "delete"]
    (call,) = [call for call in calls(stand_ins) if "mountpoint" in " ".join(call)]
    assert "--worker=all" in call
    # A machine that has just come is installing by itself.
    assert "sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common" in call[-1]
    assert "sudo mount -t nfs 10.0.0.2:/my\\ share /mnt/runs" in call[-1]


def test_the_queue_is_waited_for_and_its_refusal_is_told(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], queue=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert script(stand_ins, "--queued").returncode == 0
    assert steps(stand_ins) == ["delete", *ONCE]
    asked = [call for call in calls(stand_ins) if call[3:5] == ["queued-resources", "describe"]]
    assert len(asked) == 3
    delete = calls(stand_ins)[-1]
    assert delete[3:6] == ["queued-resources", "delete", "my tpu"]
    assert "--force" in delete


def test_a_queue_that_gives_up_ends_it(stand_ins):
    gcloud(stand_ins, [ABSENT], queue=["WAITING_FOR_RESOURCES", "FAILED"])
    done = script(stand_ins, "--queued")
    assert done.returncode == 1
    assert "the queue gave my tpu up (FAILED)" in done.stderr
    assert steps(stand_ins) == ["delete", "create", "delete"]


def test_a_queue_that_cannot_be_asked_goes_on_holding_the_place(stand_ins):
    gcloud(stand_ins, [ABSENT, READY], queue=[OFFLINE, "WAITING_FOR_RESOURCES", OFFLINE, OFFLINE, "ACTIVE"])
    done = script(stand_ins, "--queued")
    assert done.returncode == 0, done.stderr
    assert steps(stand_ins) == ["delete", *ONCE]


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [([OFFLINE], "gcloud does not tell the state of my tpu"), ([ABSENT], "the queue gave my tpu up (ABSENT)")],
)
def test_a_queue_that_never_answers_or_has_lost_the_request_ends_it(stand_ins, answers, sentence):
    gcloud(stand_ins, [ABSENT], queue=["WAITING_FOR_RESOURCES", *answers])
    done = script(stand_ins, "--queued", "--retries", "2")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert steps(stand_ins) == ["delete", "create", "delete"]


@pytest.mark.parametrize("answer", [OFFLINE, (0, "\n"), (0, "none\n")])
@pytest.mark.parametrize("code", [0, 2])
def test_the_number_of_hosts_does_not_decide_what_the_run_ended_with(stand_ins, answer, code):
    gcloud(stand_ins, [ABSENT, READY], codes=[(0, f"{code}\n")], first={r"networkEndpoints": [answer]})
    done = script(stand_ins)
    assert done.returncode == code, done.stderr
    assert steps(stand_ins) == ONCE


def test_a_tpu_that_cannot_be_deleted_is_told(stand_ins):
    gcloud(stand_ins, [READY], first={"tpu-vm delete": [(1, "")]})
    done = script(stand_ins)
    assert done.returncode == 0
    assert "could not be deleted" in done.stderr


def test_a_dry_run_prints_every_command_and_runs_none(stand_ins):
    gcloud(stand_ins, [ABSENT])
    done = script(stand_ins, "--dry-run", "--spot")
    assert done.returncode == 0, done.stderr
    assert stand_ins.calls() == []
    assert not (stand_ins.folder / "logs of it").exists()
    commands = [shlex.split(part) for part in done.stdout.replace("$'", "'").splitlines() if part.startswith("gcloud")]
    assert [call[4] for call in commands] == ["create", "scp", "ssh", "ssh", "scp", "delete"]
    assert all("my tpu" in " ".join(call) for call in commands)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--zone", "z"), "--name is missing"),
        (("--name", "a", "--zone", "z", "--type", "t", "--workdir", "runs/a"), "allowed: gs://BUCKET/RUN"),
        (("--name", "a", "--zone", "z", "--type", "t", "--workdir", "/mnt/runs/a"), "/mnt/runs/RUN with --nfs"),
        (("--name", "a", "--zone", "z", "--type", "t", "--nfs", "s:/d", "--workdir", "gs://b/r"), "with --nfs"),
        (("--name",), "--name needs a value"),
        (("--nmae", "a"), "unknown argument '--nmae'"),
        (("--name", "a", "--zone", "z", "--type", "t", "--workdir", "gs://b/r"), "nothing to train"),
        (("--name", "a", "--zone", "z", "--type", "t", "--workdir", "gs://b/r", "--retries", "x"), "a whole number"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_nothing_is_called(stand_ins, arguments, sentence):
    gcloud(stand_ins, [ABSENT])
    done = stand_ins.run("tpu_vm.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("tpu_vm: ")
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert calls(stand_ins) == []
