"""Trains a bank of soft prompts and a retriever before a frozen LM, or goes on where a run stopped.

The configuration is a Python file; --config.SECTION.NAME=value changes one of its options. The same command resumes a
run that was stopped or killed. One that is asked to stop (SIGTERM, Ctrl-C) saves and exits with 75; finished, with 0.

Examples:
  spt-jax train --config=configs/quickstart.py --workdir=runs/quickstart
  spt-jax train --config=configs/convai2_smollm2.py --workdir=runs/a --config.data.train=train.txt
  spt-jax train --config=configs/quickstart.py --workdir=runs/b --config.bank.num_prompts=8 --config.seed=1
  spt-jax train --config=configs/quickstart.py --workdir=gs://my-bucket/runs/quickstart
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from spt_jax.commands.joining import define_joining_flags, joined_processes
from spt_jax.commands.workdirs import trained_in
from spt_jax.config import Config, validate
from spt_jax.errors import UserError
from spt_jax.exit_codes import FINISHED, STOPPED


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door; `read_flags` puts the config in the place of the text of --config."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("config", None, "A Python file whose get_config() gives the configuration.", **fv)
    flags.DEFINE_string(
        "workdir", None, "Folder of the run, or a bucket's (gs://…, s3://…); made when missing, resumed when not.", **fv
    )
    define_joining_flags(flag_values)


def run(flag_values: flags.FlagValues) -> int:
    """Trains; returns the exit code."""
    if not flag_values["workdir"].value:
        raise UserError("--workdir is missing; give a folder for the run, such as --workdir=runs/quickstart")
    config: Config = flag_values["config"].value
    validate(config)
    workdir: str = flag_values["workdir"].value
    with joined_processes("spt-jax train", flag_values):
        return trained_in(workdir, partial(print, flush=True), lambda folder: train_run(config, folder, workdir))


def train_run(config: Config, workdir: Path, name: str) -> int:
    """Starts or resumes the run of `config` in `workdir`; returns the exit code.

    Args:
        config: Validated.
        workdir: A folder.
        name: What the user calls it.

    Raises:
        UserError: See `spt_jax.training.run_training.run_training`.
    """
    from spt_jax.data.packing import Row
    from spt_jax.evaluation.likelihood import DevelopmentEvaluator
    from spt_jax.parallel.distributed import is_lead
    from spt_jax.training.experiment import Experiment, pad_id_of
    from spt_jax.training.run_training import run_training

    def evaluators(e: Experiment, development: Sequence[Row]) -> list[DevelopmentEvaluator]:
        return [
            DevelopmentEvaluator(
                e.model,
                e.lm.params,
                development,
                mesh=e.mesh,
                batch_size=config.evaluation.batch,
                pad_id=pad_id_of(config, e.lm.tokenizer),
                max_buckets=config.data.max_buckets,
            )
        ]

    outcome, total_steps = run_training(config, workdir, evaluators, partial(print, flush=True))
    step = int(outcome.state.step)
    if is_lead() and outcome.finished:
        print(f"finished {step} steps; evaluate with: spt-jax evaluate --workdir={shlex.quote(name)}")
    elif is_lead():
        print(f"stopped after step {step} of {total_steps}, saved; the same command goes on from there")
    return FINISHED if outcome.finished else STOPPED
