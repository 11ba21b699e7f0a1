"""The benchmark of a GPU counts what the method needs, and trains an epoch of the package's own batches."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny

pytestmark = pytest.mark.first_python


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program ``benchmarks/gpu.py``, which finds its parts beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield importlib.import_module("gpu")


def test_needed_arithmetic_is_that_of_real_tokens_forward_and_to_activations(program):
    c = tiny.CONFIG
    rows, prompt_length, prompts = np.array([10, 7]), 4, 3
    batch = {"lengths": rows, "target_mask": np.ones((2, 5))}
    heads = c.num_attention_heads * c.head_dim
    kernels = (
        c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim) + 3 * c.hidden_size * c.intermediate_size
    )
    seen = rows + prompt_length
    forward = 2 * c.num_layers * kernels * seen.sum()
    # Each of the two products sums over half of the square; their four gradients likewise.
    square = 2 * c.num_layers * heads * (seen**2).sum() / 2
    vocabulary = 2 * c.vocab_size * c.hidden_size * 10
    wanted = prompts * (2 * forward + 6 * square + 2 * vocabulary)
    assert program.needed_flops(c, batch, prompts, prompt_length) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nosuch:4", "there is no shape 'nosuch'"),
        ("opt-125m", "'opt-125m' is not NAME:ROWS"),
        ("opt-125m:0", "with 1 row or more"),
        ("opt-125m:4:half", "REMAT of none, dots, full"),
        ("opt-125m:4:full:5", "is not NAME:ROWS"),
    ],
)
def test_a_model_that_is_none_is_refused_before_anything_is_measured(program, capsys, monkeypatch, spec, words):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--models", spec])
    monkeypatch.setattr(program, "ceilings", lambda size: pytest.fail("measured"))
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_model_and_an_epoch_are_measured_and_the_last_line_is_json(program, capsys, monkeypatch, tmp_path):
    data = tmp_path / "six.txt"
    data.write_text(
        "".join(
            f"1 your persona: i have {n} cats .\n2 hi number {n}\thello , i am {n} .\n3 and you ?\tfine {'ha ' * n}\n"
            for n in range(6)
        )
    )
    monkeypatch.setattr(program, "EPOCH", 12)
    model = "pythia-70m?layers=1:4"
    options = ["--steps=1", "--product=64", "--dtype=float32", "--tokenizer=bytes", f"--data={data}"]
    monkeypatch.setattr("sys.argv", ["gpu.py", "--models", model, f"--epoch={model}:full", *options])
    program.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    [measured], epoch = found["models"], found["epoch"]
    assert measured["attention"] == "xla"
    assert measured["turns_per_second"] == pytest.approx(8 / measured["step_seconds"])
    flops = measured["utilisation"] * measured["step_seconds"] * found["ceilings"]["flops_per_second"]
    assert measured["needed_tflops"] == pytest.approx(flops / 1e12)
    assert (epoch["turns"], epoch["steps"]) == (24, 3)
    assert 0 <= epoch["wait_seconds"] < epoch["seconds"]
