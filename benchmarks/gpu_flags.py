"""What does each of XLA's flags for GPUs do to a train step, alone?

    python benchmarks/gpu_flags.py --models smollm2-135m:64 opt-125m:64
    python benchmarks/gpu_flags.py --flags "latency hiding" "no command buffers" --rounds=3 --data=train.txt

XLA reads its flags once, so each measurement is a process of `gpu.py`, which says what is timed and takes all options
that are not of this program. The processes take turns, and a figure is the median of the rounds. Flags that are set
already hold for all of them; one that this jaxlib does not know is told. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from arguments import positive

AS_IT_IS = "as it is"
FLAGS = {
    AS_IT_IS: "",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "exhaustive tilings": "--xla_gpu_exhaustive_tiling_search=true",
    "cuBLASLt": "--xla_gpu_enable_cublaslt=true",
    "cuDNN's fused products": "--xla_gpu_cudnn_gemm_fusion_level=2",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "double buffered loops": "--xla_gpu_enable_while_loop_double_buffering=true",
}
"""What is measured, and the flag."""
UNKNOWN = "Unknown flag in XLA_FLAGS"
PROGRAM = Path(__file__).with_name("gpu.py")


def measure(flag: str, options: list[str]) -> dict[str, Any] | None:
    """The line of JSON of `gpu.py` under a flag, or None where jaxlib does not know it.

    Raises:
        SystemExit: The program failed; what it said is printed.
    """
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS", ""), flag)))
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), *options],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    if flag and UNKNOWN in ran.stderr and flag in ran.stderr:
        return None
    if ran.returncode:
        print(ran.stderr, file=sys.stderr, end="")
        sys.exit(ran.returncode if ran.returncode > 0 else 1)
    return json.loads(ran.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--flags", nargs="+", choices=tuple(FLAGS), default=list(FLAGS), metavar="NAME")
    parser.add_argument("--rounds", type=positive, default=2, help="processes for each flag")
    own, options = parser.parse_known_args(arguments)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in dict.fromkeys([AS_IT_IS, *own.flags])}
    for _ in range(own.rounds):
        for name in list(runs):
            found = measure(FLAGS[name], options)
            if found is None:
                print(f"{name}: this jaxlib does not know {FLAGS[name]}", flush=True)
                del runs[name]
            else:
                runs[name].append(found)
    steps = {name: _by_model(found) for name, found in runs.items()}
    print(f"{'flag':<24}{'model':<24}{'s/step':>9}{'ratio':>8}{'GB':>8}{'compile':>9}")
    for name, models in steps.items():
        for model, figures in models.items():
            base = steps[AS_IT_IS].get(model)
            ratio = f"{figures['step_seconds'] / base['step_seconds']:>8.3f}" if base else f"{'':>8}"
            print(
                f"{name:<24}{model:<24}{figures['step_seconds']:>9.4f}{ratio}{figures['gigabytes']:>8.1f}"
                f"{figures['compilation_seconds']:>8.1f}s"
            )
    facts = {name: runs[AS_IT_IS][0][name] for name in ("device", "jax", "machine")}
    print(json.dumps({"flags": {name: FLAGS[name] for name in runs}, "steps": steps, "rounds": own.rounds} | facts))


def _by_model(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the runs for every model that all of them measured (one that does not fit is missing)."""
    found: dict[str, list[dict[str, float]]] = {}
    for measured in (measured for run in runs for measured in run["models"]):
        found.setdefault(f"{measured['model']}:{measured['rows']}:{measured['remat']}", []).append(
            {
                "step_seconds": measured["step_seconds"],
                "turns_per_second": measured["turns_per_second"],
                "gigabytes": measured["temporary_gigabytes"] + measured["argument_gigabytes"],
                "compilation_seconds": measured["compilation_seconds"],
            }
        )
    return {
        model: {name: statistics.median(one[name] for one in figures) for name in figures[0]}
        for model, figures in found.items()
        if len(figures) == len(runs)
    }


if __name__ == "__main__":
    main()
