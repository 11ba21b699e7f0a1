"""The quickstart for real: SmolLM2 learns, and what it learned is in the bank's tokens and their order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.smollm2, pytest.mark.real_run]


def _program(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _perplexities(workdir: Path, dialogues: int, *overrides: str) -> dict[str, float]:
    config = f"--config={REPOSITORY / 'configs' / 'quickstart.py'}"
    _program("-m", "spt_jax", "train", config, f"--workdir={workdir}", *overrides)
    out = _program(str(Path(__file__).with_name("ablation.py")), str(workdir), str(dialogues))
    perplexities = json.loads(out.splitlines()[-1])
    print(perplexities)
    return perplexities


def _assert_the_bank_carries_it(perplexities: dict[str, float], gain: float) -> None:
    after = perplexities["after"]
    assert after <= (1 - gain) * perplexities["none"]
    assert after <= (1 - gain) * perplexities["before"]
    assert after < perplexities["zeroed"]
    assert after < perplexities["shuffled"]


def test_a_short_training_already_lowers_perplexity_and_needs_its_tokens_in_order(smollm2_source, tmp_path):
    short = ("train.steps=8", "data.batch=2", "optimizer.micro_batches=2", "data.max_buckets=1")
    small = ("data.limit=16", "data.development_dialogues=2")
    overrides = [f"--config.{option}" for option in short + small]
    _assert_the_bank_carries_it(_perplexities(tmp_path / "run", 4, *overrides), gain=0.05)


@pytest.mark.campaign
def test_the_quickstart_lowers_perplexity_by_a_tenth(smollm2_source, tmp_path):
    _assert_the_bank_carries_it(_perplexities(tmp_path / "run", 24), gain=0.10)
