"""The train step and generation compile for TPUs that are not here, through the door, in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.aot

REPOSITORY = Path(__file__).resolve().parents[2]

LLAMA2 = "--config=configs/convai2_llama2_7b.py"
GIB = 2**30


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The door, as a user starts it."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler (libtpu) is not installed; launch/test.sh installs it")
    command = [sys.executable, "-m", "spt_jax", "plan", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def plan(*arguments: str) -> dict[str, Any]:
    """The facts of a plan that fits."""
    done = run_plan(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def only_program(facts: dict[str, Any]) -> dict[str, Any]:
    [program] = facts["programs"]
    return program


def the_estimate_is_close(facts: dict[str, Any]) -> bool:
    """Whether arithmetic alone finds the memory that the compiler finds, within a quarter."""
    return abs(sum(facts["memory"].values()) / facts["needed"] - 1) < 0.25


def kinds(program: dict[str, Any]) -> set[str]:
    return {each["kind"] for each in program["traffic"]["collectives"]}


def moves_the_weights_once_a_pass(program: dict[str, Any], matrices: int, tables: int, devices: int) -> bool:
    """Whether gathers and permutations bring a device the layers' matrices twice, and the vocabulary's tables once.

    The two passes are forward and backward: recomputation shares the backward's. Where a product waits for a gather the
    compiler passes the parts around in permutations instead, which bring all but the device's own.
    """
    moved = {each["kind"]: each["bytes"] for each in program["traffic"]["collectives"]}
    found = moved["all-gather"] + moved.get("collective-permute", 0) / (1 - 1 / devices)
    return abs(found / (2 * (2 * matrices + tables)) - 1) < 0.01  # two bytes each


def test_a_train_step_for_four_chips_has_splash_attention_and_gathers_a_layer_at_a_time():
    facts = plan(
        *("--config.model.source=shape:smollm2-135m?layers=4", "--config.model.dtype=bfloat16"),
        *("--config.model.remat=full", "--config.bank.num_prompts=2", "--config.data.batch=4", "--longest=120"),
        *("--config.mesh.fsdp=4", "--config.mesh.data=1", "--topology=v5e:2x2"),
    )
    program = only_program(facts)
    assert facts["fits"] and facts["attention"] == "splash"
    assert any("splash" in kernel for kernel in program["kernels"])
    # 28 million embeddings and 4 blocks of 3.5 million, two bytes each, on four devices.
    weights = 2 * (49_152 * 576 + 4 * 3_539_520) / 4
    # Bank and retriever with two moments, four bytes each, on every device.
    state = 3 * 4 * (2 * 8 * 576 + 576 * 577)
    assert weights + state < program["arguments"] < 1.1 * (weights + state)
    gathered = {each["kind"]: each for each in program["traffic"]["collectives"]}["all-gather"]
    # Seven kernels in each of the passes over the layers, the vocabulary beside them.
    assert gathered["count"] >= 2 * 7 * 3
    assert moves_the_weights_once_a_pass(program, 4 * 3_538_944, 49_152 * 576, 4)
    assert program["peak"] < 0.5 * GIB
    assert the_estimate_is_close(facts)
    assert facts["longest"]["seconds"] > 0 and facts["mean"]["seconds"] <= facts["longest"]["seconds"]


def test_what_a_chip_cannot_hold_is_refused_with_the_shortfall():
    done = run_plan(LLAMA2, "--config.model.source=shape:llama2-7b", "--config.mesh.fsdp=1", "--topology=v5e:1x1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("spt-jax plan: ")]
    assert "GiB more than the 15.75 GiB of v5e" in sentence
    assert "--config." in sentence and "would fit by the estimate" in sentence
    assert "What would need less, by the estimate:" in done.stdout


@pytest.mark.campaign
def test_llama2_7b_fits_one_v5e_with_int8_weights():
    facts = plan(
        *(LLAMA2, "--config.model.source=shape:llama2-7b", "--config.model.quantization=int8"),
        *("--config.mesh.fsdp=1", "--topology=v5e:1x1"),
    )
    program = only_program(facts)
    assert facts["prompts"] == 4 and facts["attention"] == "splash"
    assert program["peak"] < 16 * GIB
    assert the_estimate_is_close(facts)
    assert kinds(program) == set()


@pytest.mark.campaign
def test_llama2_7b_fits_four_v5e_in_bfloat16():
    facts = plan(LLAMA2, "--config.model.source=shape:llama2-7b", "--config.mesh.fsdp=4", "--topology=v5e:2x2")
    assert facts["prompts"] == 4 and facts["quantization"] == "none"
    assert only_program(facts)["peak"] < 16 * GIB
    assert the_estimate_is_close(facts)
    assert kinds(only_program(facts)) == {"all-gather", "all-reduce", "collective-permute"}
    assert moves_the_weights_once_a_pass(only_program(facts), 32 * 202_375_168, 2 * 32_000 * 4096, 4)


@pytest.mark.campaign
def test_llama2_13b_fits_sixteen_v5e():
    facts = plan(
        *(LLAMA2, "--config.model.source=shape:llama2-13b", "--config.data.batch=16"),
        *("--config.mesh.fsdp=16", "--topology=v5e:4x4"),
    )
    assert only_program(facts)["peak"] < 16 * GIB
    assert the_estimate_is_close(facts)


@pytest.mark.campaign
def test_llama3_70b_fits_sixteen_v5p():
    facts = plan(
        *(LLAMA2, "--config.model.source=shape:llama3-70b", "--config.data.batch=16"),
        *("--config.mesh.fsdp=16", "--topology=v5p:2x2x4"),
    )
    program = only_program(facts)
    assert program["peak"] < 95 * GIB
    assert the_estimate_is_close(facts)
    assert any("splash" in kernel for kernel in program["kernels"])


@pytest.mark.campaign
def test_two_slices_sum_what_is_learned_over_their_network():
    facts = plan(
        *("--config.model.source=shape:smollm2-135m?layers=4", "--config.model.dtype=bfloat16"),
        *("--config.model.remat=full", "--topology=v5e:2x2", "--slices=2", "--longest=120"),
    )
    assert facts["mesh"]["data"] == 8 and facts["longest"]["network"] > 0
    assert "all-reduce" in kinds(only_program(facts))


@pytest.mark.campaign
def test_generation_compiles_for_a_tpu():
    facts = plan(
        *("--config.model.source=shape:llama2-7b", "--config.model.dtype=bfloat16", "--config.mesh.fsdp=4"),
        *("--config.mesh.data=1", "--topology=v5e:2x2", "--what=generate"),
    )
    assert [program["name"] for program in facts["programs"]] == ["reading contexts", "further tokens"]
    assert all(0 < program["peak"] < 16 * GIB for program in facts["programs"])
