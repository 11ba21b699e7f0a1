"""Plans a run on hardware that is not here: compiles its programs for a TPU topology on this CPU, and reads them.

Printed are, for one device, memory against HBM, arithmetic, bytes, collectives, and the least time that the vendor's
peak figures allow. What does not fit ends with exit code 2, after what to change. Only the LM's configuration is read,
never a weight. Topologies are CHIP:SIZES of one slice (v4, v5e, v5p, v6e, tpu7x), or GPUs of one machine (a100:8,
h100:8, h200:8), whose memory is estimated, as no compiler of theirs is used.

Examples:
  spt-jax plan --config=configs/convai2_llama2_7b.py --topology=v5e:2x4
  spt-jax plan --config=configs/convai2_llama2_7b.py --config.model.source=shape:llama2-7b --topology=v5e:4x4 --search
  spt-jax plan --config=configs/convai2_smollm2.py --topology=v6e:2x2 --slices=2 --what=generate
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from absl import flags

ARGUMENTS: dict[str, Any] = {"config_file_needed": False}
"""How `spt_jax.commands.flag_reading.read_flags` reads this door's arguments."""

_NUMBERS = {
    "dialogues": "Rows of an epoch",
    "turns": "Turns to learn from in all of them",
    "mean_length": "Tokens of a row on average",
    "longest": "Tokens of the longest row, at most data.max_length, which decides about memory",
    "mean_targets": "Target tokens of a turn on average",
}


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    from spt_jax.planning.convai2 import CONVAI2

    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("config", None, "Config file; override as --config.name=value, with or without a file.", **fv)
    flags.DEFINE_string("topology", None, "CHIP:SIZES of one slice, such as v5e:4x4, v5p:2x2x4 or h100:8.", **fv)
    flags.DEFINE_integer("slices", 1, "Slices of TPUs, or machines of GPUs.", lower_bound=1, **fv)
    flags.DEFINE_enum("what", "train", ["train", "generate"], "The train step, or replies to a batch.", **fv)
    flags.DEFINE_boolean("search", False, "Try meshes, remat and --rows, and print the fastest that fits.", **fv)
    flags.DEFINE_list("rows", [], "Batch sizes to --search; default: data.batch, its half and its double.", **fv)
    flags.DEFINE_integer("tries", 6, "Choices that --search compiles at most.", lower_bound=1, **fv)
    for name, text in _NUMBERS.items():
        flags.DEFINE_integer(name, CONVAI2[name], f"{text}; ConvAI2's by default.", lower_bound=1, **fv)
    flags.DEFINE_boolean("json", False, "Print one JSON object for programs.", **fv)


def run(flag_values: flags.FlagValues) -> int:
    """Plans, prints, and returns the exit code.

    Raises:
        UserError: The configuration is not valid, there is no such topology, no compiler for it, or it does not fit.
    """
    given: Any = flag_values.flag_values_dict()
    from spt_jax.config import validate
    from spt_jax.errors import UserError

    if not given["topology"]:
        raise UserError("--topology is missing; give CHIP:SIZES, such as --topology=v5e:4x4")
    validate(given["config"])
    _prepare_jax(given["topology"], given["slices"])
    from spt_jax.planning.report import Request, report

    numbers = {name: given[name] for name in _NUMBERS}
    names = ("topology", "slices", "what", "search", "rows", "tries")
    request = Request(given["config"], numbers, **{name: given[name] for name in names})
    say = None if given["json"] else lambda line: print(line, file=sys.stderr, flush=True)
    facts, lines, shortfall = report(request, say)
    print(json.dumps(facts, indent=2) if given["json"] else "\n".join(lines))
    if shortfall:
        raise UserError(shortfall)
    return 0


def _prepare_jax(topology: str, slices: int) -> None:
    """Before JAX starts: it runs on this CPU, and the TPU's compiler neither looks for a TPU nor logs that it has none.

    A program for devices that are not here cannot be read back from the compilation cache, so there is none. GPUs, and
    twice as many of them for advice, have CPU devices in their places.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    nowhere = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
    for name, value in (quiet | nowhere).items():
        os.environ.setdefault(name, value)
    import jax

    from spt_jax.planning.topology import Topology

    parsed = Topology.parse(topology, slices)
    if parsed.chip.kind == "gpu":
        jax.config.update("jax_num_cpu_devices", 2 * parsed.count)
