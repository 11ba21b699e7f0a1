"""Stands in for ``spt-jax`` where a test is about workers: trains nothing, in steps of a moment, but resumes like it.

As a program: ``python stand_in.py train --config=FILE --workdir=DIR [--config.seed=N]``. It keeps its state after every
step, notes each of its processes in ``WORKDIR/processes.txt``, and notes when another process was in the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from spt_jax.commands.configuration import load_config
from spt_jax.exit_codes import FINISHED, STOPPED

OVERLAP = "another process was here"
STAND_IN_FINISHED = "finished"


def development_perplexity(config, step: int) -> float:
    """A figure that depends on every option that the tests vary, and falls with the steps."""
    rate, prompts = config.optimizer.learning_rate, config.bank.num_prompts
    return 10 + abs(rate - 0.03) * 100 + (prompts - 3) ** 2 + config.seed / 7 + 5 / (step + 1)


def main(arguments: list[str]) -> int:
    flags = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments[1:])
    workdir = Path(flags["workdir"])
    if arguments[0] == "evaluate":
        assert {"--nobaselines", "--reuse"} <= set(arguments)
        perplexity = json.loads((workdir / "state.json").read_text())[-1]["development/perplexity"]
        figures = {"f1": 100 - perplexity, "perplexity": perplexity}
        (workdir / "results.json").write_text(json.dumps({"columns": {"after training": figures}}))
        return 0
    if os.environ.get("STAND_IN_BROKEN"):
        print("train: no accelerator answers", file=sys.stderr)
        return 2
    workdir.mkdir(exist_ok=True)
    alone = (workdir / "alone").open("w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _note(workdir, OVERLAP)
    config = load_config(flags["config"])
    config.seed = int(flags.get("config.seed", config.seed))
    if config.optimizer.weight_decay:
        print("train: this one cannot be trained", file=sys.stderr)
        return 2
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    state = workdir / "state.json"
    rows = json.loads(state.read_text()) if state.exists() else []
    _note(workdir, f"process {os.getpid()} begins at step {len(rows)}")
    while len(rows) < config.train.steps and not stopping:
        time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0.05")))
        rows.append({"step": len(rows), "development/perplexity": development_perplexity(config, len(rows))})
        _replace(state, json.dumps(rows))
        _replace(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if len(rows) < config.train.steps:
        time.sleep(float(os.environ.get("STAND_IN_SAVING", "0")))
        print(f"stopped after step {len(rows)} of {config.train.steps}")
        return STOPPED
    _note(workdir, STAND_IN_FINISHED)
    print(f"finished {len(rows)} steps")
    return FINISHED


def _note(workdir: Path, line: str) -> None:
    with (workdir / "processes.txt").open("a") as file:
        file.write(line + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
