"""A whole training run: from a configuration and a working directory to the loop, fresh or resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from spt_jax.config import Config
from spt_jax.config_rules import WHOLE_NUMBERS
from spt_jax.data.dialogue import dialogues_digest
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.packing import PackedRows, Row
from spt_jax.errors import UserError
from spt_jax.models.quantized import tree_bytes
from spt_jax.parallel.distributed import barrier, is_lead, json_told_by_lead, one_at_a_time
from spt_jax.parallel.rules import place_batch, replicated
from spt_jax.training import experiment as setup
from spt_jax.training.absolute_paths import absolute_paths
from spt_jax.training.agreement import check_same_content, check_same_options, check_same_start
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import restore_targets
from spt_jax.training.description import TEXTUAL, attention_remark, objective_of
from spt_jax.training.experiment import Experiment
from spt_jax.training.initial import check_initial, initial_trainable
from spt_jax.training.loop import Evaluator, LoopOptions, Outcome, evaluation_pending, train
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.remat import device_memory, fitting_remat, with_remat
from spt_jax.training.signals import StopSignal
from spt_jax.training.step import TrainState, init_state, make_train_step, state_shardings
from spt_jax.training.tracking import open_trackers
from spt_jax.training.workdir import (
    CHECKPOINT_FOLDER,
    check_dialogues,
    check_unlocked,
    check_workdir,
    claim_workdir,
    locked_workdir,
    write_initial,
)

MakeEvaluators = Callable[[Experiment, Sequence[Row]], Sequence[Evaluator]]
"""Makes what measures a state, from the experiment and the rows of the development dialogues."""


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """What a run needs before its first step; nothing of it is on disk yet."""

    experiment: Experiment
    splits: setup.Splits
    digests: dict[str, str]
    rows: PackedRows
    development: PackedRows
    loader: DialogueLoader
    optimizer: optax.GradientTransformation
    state: TrainState
    shardings: TrainState
    total_steps: int


def run_training(
    config: Config, workdir: Path, make_evaluators: MakeEvaluators, say: Callable[[str], None] = print
) -> tuple[Outcome, int]:
    """Starts or resumes the run of `config` in `workdir`.

    The folder is made, and marked as this run's, only when everything that can be wrong with the input has been read.
    Of several processes the first alone says, shows, and reads and writes the folder, which the others need not see.

    Args:
        config: A validated configuration; its paths of files are made absolute.
        workdir: New, empty, or of the same run.
        make_evaluators: See `MakeEvaluators`; called once.
        say: Takes the lines for the user.

    Returns:
        How the loop ended, and the number of steps of the whole run.

    Raises:
        UserError: The folder holds another run, or one of other dialogues, a part of the input cannot be used, or this
            process was given another run than the first of several.
    """
    absolute_paths(config)
    if is_lead():
        check_workdir(workdir, config)
        check_unlocked(workdir)  # before anything is loaded
    check_same_options(config)
    say = say if is_lead() else _say_nothing
    prepared = _prepare(config, workdir, say)
    e = prepared.experiment
    barrier("prepared")  # a folder is claimed when nothing of any process is wrong
    with _undone_unless_begun(workdir):
        if is_lead():
            claim_workdir(workdir, config, e.lm.identity, e.lm.tokenizer.fingerprint, prepared.digests)
            if keeps_initial(config):
                write_initial(workdir, prepared.state.trainable)
        say(_summary(prepared))
        keep = {"keep_latest": config.train.keep_latest, "keep_best": config.train.keep_best}
        with StopSignal() as stop, Checkpoints(workdir / CHECKPOINT_FOLDER, **keep) as checkpoints:
            state, saved_step = _resumed(checkpoints, prepared, say)
            pending = evaluation_pending(checkpoints, saved_step, prepared.total_steps)
            options = config.tracking.to_dict() | {"config": config.to_dict(), "pending": pending}
            trackers = open_trackers(workdir, saved_step, **options) if is_lead() else []
            try:
                outcome = train(
                    state,
                    _step(prepared, state, say),
                    e.lm.params,
                    prepared.loader.iterate,
                    partial(place_batch, e.mesh),
                    options=_loop_options(config, workdir, prepared.total_steps),
                    checkpoints=checkpoints,
                    trackers=trackers,
                    evaluators=make_evaluators(e, prepared.development.rows),
                    meta={"lm": e.lm.identity.to_dict(), "tokenizer": e.lm.tokenizer.fingerprint},
                    stop=stop,
                )
            finally:
                for tracker in trackers:
                    tracker.close()
    return outcome, prepared.total_steps


def _say_nothing(line: str) -> None:
    """What a process says that is not the first of several."""


def _step(prepared: _Preparation, state: TrainState, say: Callable[[str], None]) -> Any:
    """The compiled step, with the rematerialisation that is asked for, or that fits."""
    e, loader, config = prepared.experiment, prepared.loader, prepared.experiment.config

    def step_of(policy: str) -> Any:
        return make_train_step(
            with_remat(e.model, policy),
            objective_of(config),
            prepared.optimizer,
            e.mesh,
            config.optimizer.micro_batches,
            seed=config.seed,
            total_steps=max(1, prepared.total_steps),
            shardings=prepared.shardings,
        )

    if config.train.profile_steps:
        # A kept program names its instructions as the version that compiled it did; a trace needs today's names.
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if remark := attention_remark(e.lm.config, config.model.attention, e.mesh):
        say(remark)
    policy = e.model.decoder.remat
    limit = device_memory(e.mesh.local_devices[0])
    if config.model.remat == "auto" and limit is not None and prepared.total_steps:
        longest = next(step for step in range(loader.steps_per_epoch) if loader.shape(step) == loader.shapes[-1])
        batch = place_batch(e.mesh, loader.batch(longest))
        policy = fitting_remat(step_of, (state, e.lm.params, batch), limit)
        say(f"model.remat = auto: {policy}, in {limit / 1e9:,.1f} GB a device")
    # What fits is asked of a device of each process, and all must run one program.
    return one_at_a_time(step_of(json_told_by_lead(policy)))


@contextlib.contextmanager
def _undone_unless_begun(workdir: Path) -> Iterator[None]:
    """Locks a folder, and leaves one that was new or empty so when a start fails before anything of the run was saved.

    A mended command, with a smaller batch after the memory was too small for instance, may then take the same folder.
    """
    existed = workdir.is_dir()
    with locked_workdir(workdir) if is_lead() else contextlib.nullcontext():
        fresh = is_lead() and not any(workdir.iterdir())
        try:
            yield
        except Exception:
            saved = workdir / CHECKPOINT_FOLDER
            if fresh and not (saved.is_dir() and any(path.name[:1].isdigit() for path in saved.iterdir())):
                shutil.rmtree(workdir, ignore_errors=True)
                if existed:
                    workdir.mkdir(exist_ok=True)
            raise


def _prepare(config: Config, workdir: Path, say: Callable[[str], None]) -> _Preparation:
    splits = setup.read_splits(config)
    for sentence in splits.skipped:
        say(f"skipped {sentence}")
    parts = {"training": splits.train, "development": splits.development, "test": splits.test}
    digests = {part: dialogues_digest(dialogues) for part, dialogues in parts.items()}
    if is_lead():
        check_dialogues(workdir, config, digests)
    opened = setup.open_experiment(config)
    check_initial(config, opened.model)
    tokenizer = opened.lm.tokenizer
    template = setup.template_of(config, tokenizer, splits.train)
    pack = partial(setup.pack_dialogues, config, tokenizer=tokenizer, template=template)
    rows, development = pack(splits.train, learning=True), pack(splits.development)
    # Nothing learns from the test dialogues, but one that does not fit should be told today, not after the training.
    pack(splits.test)
    loader = setup.make_loader(config, rows, splits.train, opened.mesh, setup.pad_id_of(config, tokenizer))
    total_steps = config.train.steps or config.train.epochs * loader.steps_per_epoch
    if config.method.kind in TEXTUAL:
        total_steps = 0
    if total_steps >= WHOLE_NUMBERS:
        raise UserError(
            f"train.epochs is {config.train.epochs}, which makes {total_steps} steps; allowed: below {WHOLE_NUMBERS}"
        )
    e = opened.load()  # last of what can be wrong: it takes the longest
    # Before the first program that all processes run together on what they have read.
    check_same_content(e.lm, digests)
    optimizer = make_optimizer(config.optimizer, total_steps)
    first = initial_trainable(config, e.model, e.lm.params, e.lm.tokenizer, splits.train)
    if config.method.kind == "full":
        own = jax.tree.map(lambda x: x.sharding, first)
    else:
        own = None
        check_same_start(first)
    state = init_state(first, optimizer, e.mesh, own)
    shardings = state_shardings(first, optimizer, e.mesh, own)
    if config.method.kind == "full":
        # The state holds the weights now; the frozen ones would only take memory beside them.
        e = dataclasses.replace(e, lm=dataclasses.replace(e.lm, params={}))
    return _Preparation(e, splits, digests, rows, development, loader, optimizer, state, shardings, total_steps)


def keeps_initial(config: Config) -> bool:
    """Whether the tree before training is something else than the LM alone, worth keeping for comparison."""
    return config.method.kind not in ("lora", "full", *TEXTUAL)


def _summary(prepared: _Preparation) -> str:
    e, loader, splits = prepared.experiment, prepared.loader, prepared.splits
    behind = f" behind each of {e.model.num_prompts} prompts" if e.model.num_prompts > 1 else ""
    skipped = f" ({len(splits.skipped)} malformed lines skipped)" if splits.skipped else ""
    packed = {"to learn from": prepared.rows, "for development": prepared.development}
    remarks = [setup.rows_remark(e.config, what, rows) for what, rows in packed.items()]
    return "\n".join(
        [
            f"{e.lm.identity.name} on {jax.device_count()} {jax.devices()[0].platform} device(s), "
            f"{tree_bytes(e.lm.params) / 1e6:,.0f} MB of frozen weights, "
            f"{e.config.method.kind}: {tree_bytes(prepared.state.trainable) / 1e6:,.1f} MB to learn",
            f"{len(splits.train)} dialogues to learn from, {len(splits.development)} for development{skipped}",
            *filter(None, remarks),
            f"{prepared.total_steps} steps; about {loader.turns_per_step:.0f} turns and {loader.tokens_per_step:,.0f} "
            f"tokens a step{behind}, {loader.padding_share:.1%} padding",
        ]
    )


def _resumed(checkpoints: Checkpoints, prepared: _Preparation, say: Callable[[str], None]) -> tuple[TrainState, int]:
    """The state of the latest checkpoint with its step; where there is none the first state, and -1."""
    state = prepared.state
    counters = {"step": state.step, "skipped": state.skipped, "bad_in_a_row": state.bad_in_a_row}
    saved: dict[str, Any] = {
        "trainable": state.trainable,
        "optimizer": {"state": state.optimizer, "counters": counters},
    }
    same = replicated(prepared.experiment.mesh)
    shardings = {
        "trainable": prepared.shardings.trainable,
        "optimizer": {"state": prepared.shardings.optimizer, "counters": dict.fromkeys(counters, same)},
    }
    targets = restore_targets(saved, shardings)
    if not checkpoints.steps():
        return state, -1
    # A first state of a whole LM would else lie beside the restored one until the end of the run.
    for array in jax.tree.leaves(state):
        array.delete()
    restored = checkpoints.restore("latest", targets)
    assert restored is not None, "a checkpoint that is there is restored, or refused in a sentence"
    step, trees, _ = restored
    left = "" if step < prepared.total_steps else "; no step is left to train"
    say(f"resuming from step {step} of {prepared.total_steps}{left}")
    return TrainState(trees["trainable"], trees["optimizer"]["state"], **trees["optimizer"]["counters"]), step


def _loop_options(config: Config, workdir: Path, total_steps: int) -> LoopOptions:
    t = config.train
    return LoopOptions(
        total_steps=total_steps,
        log_every=t.log_every,
        evaluate_every=t.evaluate_every,
        save_every=t.save_every,
        max_bad_steps=t.max_bad_steps,
        profile_steps=t.profile_steps if is_lead() else 0,
        profile_dir=str(workdir / "profile"),
    )
