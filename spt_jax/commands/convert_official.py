"""Turns a checkpoint of the authors' program into a working directory; score, evaluate and chat then work on it.

DIR is the folder that their training leaves (with ds_ckpt/best/mp_rank_00_model_states.pt in it), its ds_ckpt, the best
in there, or that file. The run's configuration comes from the YAML file of that training: --config_file, or the only
one in DIR. Weights alone are read; nothing that a file holds is ever run.

Examples:
  spt-jax convert official their_run --model=facebook/opt-125m --workdir=runs/official
  spt-jax convert official their_run/ds_ckpt --model=models/opt-125m --config_file=opt.yml --workdir=runs/official
  spt-jax score --workdir=runs/official --data=valid.txt --batch=8 --out=scores.jsonl
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags

from spt_jax.commands.workdirs import refuse_bucket
from spt_jax.errors import UserError

ARGUMENTS: dict[str, Any] = {"positional": "dir"}
"""How `spt_jax.commands.flag_reading.read_flags` reads this door's arguments."""

_NEEDED = {
    "dir": "the folder that the authors' training left",
    "model": "the LM that it was trained on: a folder, a hub id or a .gguf file",
    "workdir": "a new folder for the run",
}


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("dir", None, "The folder of their training, which may also stand alone.", **fv)
    flags.DEFINE_string("model", None, "The frozen LM: a folder, a hub id, a .gguf file or package:NAME.", **fv)
    flags.DEFINE_string("revision", "", "Branch, tag or commit of a hub id.", **fv)
    flags.DEFINE_string("config_file", None, "The YAML file of that training; else the only one in DIR.", **fv)
    flags.DEFINE_string("workdir", None, "Folder of the run that is made: new or empty.", **fv)


def run(flag_values: flags.FlagValues) -> int:
    """Converts; returns the exit code.

    Raises:
        UserError: A flag is missing, or the checkpoint, its configuration and the LM cannot be read or do not belong
            together; nothing is written then.
    """
    given: Any = flag_values.flag_values_dict()
    for name, what in _NEEDED.items():
        if not given[name]:
            raise UserError(f"{'DIR' if name == 'dir' else f'--{name}'} is missing; give {what}")
    from spt_jax.interop.official_run import convert_official

    refuse_bucket(given["workdir"], "a converted run is written into a folder")
    workdir = Path(given["workdir"])
    config_file = Path(given["config_file"]) if given["config_file"] else None
    converted = convert_official(
        Path(given["dir"]), given["model"], workdir, config_file=config_file, revision=given["revision"]
    )
    for note in converted.notes:
        print(f"note: {note}", file=sys.stderr)
    bank = converted.config.bank
    print(
        f"{bank.num_prompts} soft prompts of {bank.prompt_length} tokens before {converted.config.model.source} in "
        f"{workdir}; evaluate with: spt-jax evaluate --workdir={shlex.quote(str(workdir))}"
    )
    return 0
