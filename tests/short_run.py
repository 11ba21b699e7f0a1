"""A training of seconds on a tiny Llama and the package's dialogues, and what two of its runs must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_files import LlamaFiles, random_llama

STEPS = 18
CONFIG = """
from spt_jax.config import default_config

def get_config():
    config = default_config()
    config.model.source = {source!r}
    config.bank.num_prompts, config.bank.prompt_length = 2, 2
    config.data.limit, config.data.batch, config.data.max_length, config.data.max_buckets = 6, 4, 512, 1
    config.data.development_dialogues = config.data.test_dialogues = 1
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-2, "cosine"
    config.train.steps, config.train.save_every, config.train.evaluate_every = {steps}, 1, {evaluate_every}
    config.tracking.tensorboard = False
    return config
"""


def short_llama() -> LlamaFiles:
    """One layer of width 16 over bytes."""
    return random_llama(
        hidden_size=16, intermediate_size=16, head_dim=4, num_hidden_layers=1, max_position_embeddings=546
    )


def write_short_run(folder: Path, steps: int = STEPS, evaluate_every: int = 6) -> Path:
    """Writes the LM into ``folder/lm``, and the config file of a run that saves every step."""
    source = short_llama().write_folder(folder / "lm")
    config = folder / "tiny.py"
    config.write_text(CONFIG.format(source=str(source), steps=steps, evaluate_every=evaluate_every))
    return config


def digests(workdir: Path) -> dict[str, str]:
    """The sha256 of the last step's trees, as its checkpoint tells them."""
    return json.loads((workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())["digests"]


def rows(workdir: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, what does not depend on the clock) of every row."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], {k: v for k, v in row.items() if not k.endswith("_per_second")}) for row in found]


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Bitwise the same parameters and optimizer in the end, and every row of metrics once, with the same numbers."""
    assert digests(workdir) == digests(undisturbed)
    assert rows(workdir) == rows(undisturbed)


def steps_on_disk(workdir: Path) -> list[int]:
    """Steps whose checkpoint is finished, ascending."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def unfinished_saves(workdir: Path) -> set[str]:
    """The folders of saves that have begun and not finished, or never will."""
    return {path.name for path in (workdir / "checkpoints").glob("*tmp*")}
