"""The benchmark of the loader makes what it says it makes, and ends with its line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "loader.py"


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


def test_both_sides_make_batches_and_a_slow_device_does_not_wait():
    quick = ("--rounds=1", "--seconds=0.3", "--dialogues=20", "--batch=4", "--rival_turns=3", "--max_length=2048")
    done = program("--model=shape:pythia-70m", *quick, "--turns_a_second", "100", "100000000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["turns_per_batch"]["on the fly"] == 3
    assert found["ratio"] == pytest.approx(found["turns_per_second"]["ours"] / found["turns_per_second"]["on the fly"])
    assert set(found["stages"]) == {
        "tokenizer",
        "reading",
        "tokenising and packing",
        "the same from the cache",
        "buckets and BLEU features",
    }
    assert 0 <= found["input_wait"]["100"] < found["input_wait"]["100000000"] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--batch=0",), "'0' is not a whole number from 1"), (("--data=nowhere.txt",), "nowhere.txt")],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(arguments, words):
    done = program("--model=shape:pythia-70m", *arguments)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr
