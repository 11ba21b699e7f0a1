"""Trains and evaluates Selective Prompt Tuning beside its rivals, and makes the table.

Run it in an environment where spt_jax is installed:

    python launch/comparison.py --train=train.txt --test=valid.txt --out=runs/comparison
    python launch/comparison.py --train=train.txt --test=valid.txt --out=runs/small --dialogues=64 --test_dialogues=50

For every method of `configs/comparison.py` that is asked for, each of its learning rates is tried with the first seed,
and the one with the lowest perplexity on the development dialogues is taken for all seeds; the test dialogues are seen
once, by `evaluate`. Runs lie in OUT/METHOD/lr_RATE/seed_SEED; one that is there already is resumed or reused, so the
program may be stopped and started again. What was tried, and what was taken, is in OUT/trials.json.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CONFIG = HERE / "configs" / "comparison.py"


def main() -> None:
    """Runs the comparison."""
    arguments = _arguments()
    described = runpy.run_path(str(CONFIG))
    unknown = [method for method in arguments.methods if method not in described["METHODS"]]
    if unknown:
        sys.exit(f"comparison: there is no method {unknown[0]!r}; allowed: {', '.join(described['METHODS'])}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs: list[Path] = []
    trials: dict[str, dict[str, float]] = {}
    for method in arguments.methods:
        rates = described["LEARNING_RATES"].get("spt" if method.startswith("spt") else method, (None,))
        trials[method] = {str(rate): _trial(arguments, method, rate) for rate in rates}
        (arguments.out / "trials.json").write_text(json.dumps(trials, indent=2) + "\n", encoding="utf-8")
        best = min(rates, key=lambda rate: trials[method][str(rate)])
        # What learns nothing has no seeds.
        for seed in arguments.seeds if best is not None else arguments.seeds[:1]:
            runs.append(_train(arguments, method, best, seed))
            _spt_jax("evaluate", f"--workdir={runs[-1]}", "--nobaselines", "--reuse", *_bertscore(arguments))
    baseline = [f"--baseline={run}" for run in runs if run.parts[-3] == arguments.baseline][:1]
    _spt_jax("compare", *map(str, runs), *baseline, f"--out={arguments.out / 'table'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training dialogues, a ConvAI2 file")
    parser.add_argument("--test", type=Path, required=True, help="test dialogues, a ConvAI2 file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--methods", nargs="+", default=["zero_shot", "prompt_tuning", "lora", "spt"])
    parser.add_argument("--baseline", default="prompt_tuning", help="method that the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dialogues", type=int, default=0, help="training dialogues; 0 for all")
    parser.add_argument("--test_dialogues", type=int, default=0, help="test dialogues; 0 for all")
    parser.add_argument("--bertscore", default="", help="encoder of BERTScore; empty for none")
    parser.add_argument("overrides", nargs="*", help="--config.NAME=VALUE, for every run, behind --")
    return parser.parse_args()


def _bertscore(arguments: argparse.Namespace) -> list[str]:
    return [f"--bertscore={arguments.bertscore}"] if arguments.bertscore else []


def _train(arguments: argparse.Namespace, method: str, rate: float | None, seed: int) -> Path:
    workdir = arguments.out / method / f"lr_{rate}" / f"seed_{seed}"
    options = [
        f"--config.seed={seed}",
        f"--config.data.train={arguments.train.resolve()}",
        f"--config.data.test={_test_file(arguments)}",
        f"--config.data.limit={arguments.dialogues}",
        *([] if rate is None else [f"--config.optimizer.learning_rate={rate}"]),
    ]
    _spt_jax("train", f"--config={CONFIG}:{method}", f"--workdir={workdir}", *options, *arguments.overrides)
    return workdir


def _test_file(arguments: argparse.Namespace) -> Path:
    """The test dialogues, or a file of the first so many: a run's own test is what every method is evaluated on."""
    if not arguments.test_dialogues:
        return arguments.test.resolve()
    path = arguments.out / f"test_{arguments.test_dialogues}.txt"
    if not path.exists():
        lines, begun = [], 0
        for line in arguments.test.read_text(encoding="utf-8").splitlines(keepends=True):
            begun += line.startswith("1 ")
            if begun > arguments.test_dialogues:
                break
            lines.append(line)
        path.write_text("".join(lines), encoding="utf-8")
    return path.resolve()


def _trial(arguments: argparse.Namespace, method: str, rate: float | None) -> float:
    """The development perplexity that a rate ends with, for the first seed."""
    workdir = _train(arguments, method, rate, arguments.seeds[0])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    perplexities = [row["development/perplexity"] for row in rows if "development/perplexity" in row]
    return perplexities[-1] if math.isfinite(perplexities[-1]) else math.inf


def _spt_jax(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "spt_jax", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
