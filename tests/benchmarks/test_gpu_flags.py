"""Each of XLA's flags is measured alone, by turns, in a process of its own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.first_python

STAND_IN = """
import json, os, sys
import jax
jax.devices()  # XLA reads its flags now
flags, log = os.environ["XLA_FLAGS"], sys.argv[1]
with open(log, "a") as file:
    print(flags, *sys.argv[2:], sep="|", file=file)
round = sum(1 for _ in open(log)) // 3
seconds = (1.0 + round) * (0.5 if "latency" in flags else 1.0)
step = {"step_seconds": seconds, "turns_per_second": 8 / seconds, "temporary_gigabytes": 1.0, "argument_gigabytes": 0.5}
model = step | {"model": "opt-125m", "rows": 4, "remat": "none", "compilation_seconds": 2.0}
models = [model, model | {"model": "opt-2.7b"}] if round == 0 else [model]
print("a table")
print(json.dumps({"models": models, "device": "a GPU", "jax": jax.__version__, "machine": {}}))
"""
"""In the place of `gpu.py`: the second model does not fit in the second round, and a flag halves the step."""


@pytest.fixture
def program(monkeypatch, tmp_path) -> Iterator[ModuleType]:
    """The program ``benchmarks/gpu_flags.py`` over the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        found = importlib.import_module("gpu_flags")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(found, "PROGRAM", tmp_path / "stand_in.py")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    yield found


def test_flags_take_turns_each_alone_beside_those_that_are_set(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(program.FLAGS, "of another jaxlib", "--xla_gpu_no_such_flag=true")
    log = tmp_path / "log"
    program.main([str(log), "--flags", "latency hiding", "of another jaxlib", "--rounds=2", "--steps=3"])
    *table, last = capsys.readouterr().out.splitlines()
    assert "of another jaxlib: this jaxlib does not know --xla_gpu_no_such_flag=true" in table
    ran = [line.split("|") for line in log.read_text().splitlines()]
    kept, hiding = "--xla_cpu_enable_fast_math=false", program.FLAGS["latency hiding"]
    assert [flags for flags, _ in ran] == [kept, f"{kept} {hiding}"] * 2
    assert {options for _, options in ran} == {"--steps=3"}
    found = json.loads(last)
    assert list(found["flags"]) == ["as it is", "latency hiding"]
    steps = {name: models["opt-125m:4:none"]["step_seconds"] for name, models in found["steps"].items()}
    assert steps == {"as it is": 1.5, "latency hiding": 0.75}
    assert all(list(models) == ["opt-125m:4:none"] for models in found["steps"].values()), "one that fits once only"
    assert any(
        line.split() == ["latency", "hiding", "opt-125m:4:none", "0.7500", "0.500", "1.5", "2.0s"] for line in table
    )


def test_every_flag_is_known_to_this_jaxlib(program, monkeypatch, tmp_path):
    together = " ".join(program.FLAGS.values()).split()
    assert len(together) == len(program.FLAGS) - 1
    assert program.measure(" ".join(together), [str(tmp_path / "log")]) is not None


def test_what_the_program_refuses_is_told_with_its_exit_code(program, monkeypatch, capfd, tmp_path):
    (tmp_path / "stand_in.py").write_text("import sys; print('gpu.py: error: no', file=sys.stderr); sys.exit(2)")
    with pytest.raises(SystemExit) as ended:
        program.main(["--steps=x"])
    assert ended.value.code == 2
    assert capfd.readouterr().err == "gpu.py: error: no\n"
