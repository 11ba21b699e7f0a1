"""Trains a bank of soft prompts and a retriever before a frozen LM, or goes on where a run stopped.

Examples:
  spt-jax train --config=configs/quickstart.py --workdir=runs/quickstart
  spt-jax train --config=configs/convai2_smollm2.py --workdir=runs/a --config.data.train=train.txt
  spt-jax train --config=configs/quickstart.py --workdir=runs/b --config.bank.num_prompts=8 --config.seed=1
The same command resumes a run that was stopped or killed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from spt_jax.config import Config, validate
from spt_jax.errors import UserError


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds --config and --workdir."""
    config_flags.DEFINE_config_file("config", None, "A config file, configs/*.py.", flag_values=flag_values)
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; made when missing, resumed when not.", flag_values=flag_values
    )


def run(flag_values: flags.FlagValues) -> int:
    """Trains; returns the exit code."""
    if not flag_values["config"].value:
        raise UserError("--config is missing; give a config file, such as --config=configs/quickstart.py")
    if not flag_values["workdir"].value:
        raise UserError("--workdir is missing; give a folder for the run")
    config: Config = ConfigDict(flag_values["config"].value)
    validate(config)
    return train_run(config, Path(flag_values["workdir"].value))


def train_run(config: Config, workdir: Path) -> int:
    """Starts or resumes the run of `config` in `workdir`."""
    from spt_jax.evaluation.likelihood import DevelopmentEvaluator
    from spt_jax.parallel.rules import place_batch, replicated
    from spt_jax.training import experiment as setup
    from spt_jax.training.checkpoint import Checkpoints, restore_targets
    from spt_jax.training.loop import LoopOptions, train
    from spt_jax.training.optimizer import make_optimizer
    from spt_jax.training.signals import StopSignal
    from spt_jax.training.step import TrainState, init_state, make_train_step
    from spt_jax.training.tracking import open_trackers
    from spt_jax.training.workdir import CHECKPOINT_FOLDER, absolute_paths, check_workdir, claim_workdir

    absolute_paths(config)
    check_workdir(workdir, config)
    splits = setup.read_splits(config)
    for sentence in splits.skipped:
        print(f"skipped {sentence}")
    e = setup.open_experiment(config)
    rows = setup.pack_dialogues(config, splits.train, e.lm.tokenizer)
    development = setup.pack_dialogues(config, splits.development, e.lm.tokenizer)
    loader = setup.make_loader(config, rows, splits.train, e.mesh, e.lm.tokenizer.pad_id)
    total_steps = config.train.steps or config.train.epochs * loader.steps_per_epoch
    optimizer = make_optimizer(config.optimizer, total_steps)
    first = setup.initial_trainable(config, e.model, e.lm.params, e.lm.tokenizer)
    state = init_state(first, optimizer, e.mesh)
    claim_workdir(workdir, config, e.lm.identity, e.lm.tokenizer.fingerprint)
    print(
        f"{e.lm.identity.name} on {jax.device_count()} {jax.devices()[0].platform} device(s); "
        f"{len(splits.train)} dialogues to learn from, {len(splits.development)} for development; "
        f"about {loader.turns_per_step:.0f} turns and {loader.tokens_per_step:,.0f} tokens a step behind each of "
        f"{config.bank.num_prompts} prompts, {loader.padding_share:.1%} padding; {total_steps} steps"
    )

    with (
        StopSignal() as stop,
        Checkpoints(
            workdir / CHECKPOINT_FOLDER, keep_latest=config.train.keep_latest, keep_best=config.train.keep_best
        ) as checkpoints,
    ):
        counters = {"step": state.step, "skipped": state.skipped, "bad_in_a_row": state.bad_in_a_row}
        saved = {"trainable": state.trainable, "optimizer": {"state": state.optimizer, "counters": counters}}
        restored = checkpoints.restore("latest", restore_targets(saved, replicated(e.mesh)))
        if restored is not None:
            step, trees, _ = restored
            state = TrainState(trees["trainable"], trees["optimizer"]["state"], **trees["optimizer"]["counters"])
            print(f"resuming from step {step} of {total_steps}")
        trackers = open_trackers(workdir, int(state.step), **config.tracking.to_dict(), config=config.to_dict())
        evaluator = DevelopmentEvaluator(
            e.model,
            e.lm.params,
            development.rows,
            mesh=e.mesh,
            batch_size=config.evaluation.batch,
            pad_id=e.lm.tokenizer.pad_id,
            max_buckets=config.data.max_buckets,
        )
        try:
            outcome = train(
                state,
                make_train_step(e.model, setup.objective_of(config), optimizer, e.mesh, config.optimizer.micro_batches),
                e.lm.params,
                loader.iterate,
                partial(place_batch, e.mesh),
                options=LoopOptions(
                    total_steps=total_steps,
                    log_every=config.train.log_every,
                    evaluate_every=config.train.evaluate_every,
                    save_every=config.train.save_every,
                    max_bad_steps=config.train.max_bad_steps,
                    profile_steps=config.train.profile_steps,
                    profile_dir=str(workdir / "profile"),
                ),
                checkpoints=checkpoints,
                trackers=trackers,
                evaluators=[evaluator],
                meta={"lm": e.lm.identity.to_dict(), "tokenizer": e.lm.tokenizer.fingerprint},
                stop=stop,
            )
        finally:
            for tracker in trackers:
                tracker.close()
    step = int(outcome.state.step)
    if outcome.finished:
        print(f"finished {step} steps; evaluate with: spt-jax evaluate --workdir={workdir}")
    else:
        print(f"stopped after step {step} of {total_steps}, saved; the same command goes on from there")
    return 0
