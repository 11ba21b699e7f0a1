"""A trained run, opened from its working directory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spt_jax.commands.workdirs import local_workdir
from spt_jax.config import Config
from spt_jax.data.collate import inference_contexts
from spt_jax.data.dialogue import Dialogue, dialogues_digest
from spt_jax.data.few_shot import draw_demonstrations
from spt_jax.data.official import official_prompt
from spt_jax.data.template import Template, encode_context
from spt_jax.errors import UserError
from spt_jax.generation.replies import cut_reply_official
from spt_jax.models.loading import LanguageModel, LMIdentity
from spt_jax.parallel.distributed import is_lead
from spt_jax.parallel.mesh import mesh_sizes
from spt_jax.parallel.rules import replicated
from spt_jax.prompting.adapters import Conditions, Trainable, WholeModel
from spt_jax.prompting.selective_lm import batch_scores, inference_conditions
from spt_jax.step_names import names_a_step
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.checkpoint_arrays import restore_targets
from spt_jax.training.description import front_length
from spt_jax.training.experiment import (
    Experiment,
    Splits,
    open_experiment,
    pad_id_of,
    read_source,
    read_splits,
    template_of,
)
from spt_jax.training.run_training import keeps_initial
from spt_jax.training.workdir import CHECKPOINT_FOLDER, check_dialogues, check_lm, read_config, read_initial


@dataclasses.dataclass(frozen=True)
class Run:
    """A restored run.

    Attributes:
        workdir: Where it lies.
        experiment: Configuration, mesh, LM and model.
        trainable: What was learned, of the restored step.
        step: The restored step.
        record: The JSON values beside it, see `spt_jax.training.checkpoint.Checkpoints.restore`.
    """

    workdir: Path
    experiment: Experiment
    trainable: Trainable
    step: int
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.experiment.config

    @property
    def lm(self) -> LanguageModel:
        """The frozen LM."""
        return self.experiment.lm

    @cached_property
    def initial(self) -> Trainable:
        """The trainable tree before the first step; empty where that was the LM alone."""
        return read_initial(self.workdir) if keeps_initial(self.config) else {}

    @cached_property
    def conditions(self) -> Conditions:
        """The LM under what was learned."""
        return inference_conditions(self.experiment.model, self.lm.params, self.trainable)

    @cached_property
    def template(self) -> Template:
        """How the rows of the run are written; few-shot prompting reads the training dialogues for it."""
        few_shot = self.config.method.kind == "few_shot"
        demonstrations = _splits_of_run(self.config, self.workdir, _ANOTHER).train if few_shot else []
        return template_of(self.config, self.lm.tokenizer, demonstrations)

    @property
    def cut(self) -> Callable[[str], str]:
        """The reply in a generated text."""
        return cut_reply_official if self.experiment.model.official else self.template.cut

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a reply."""
        return [*self.lm.tokenizer.stop_ids, self.template.end_id(self.lm.tokenizer)]

    def encode_context(self, persona: Sequence[str], history: Sequence[str], *, room: int = 0) -> list[int]:
        """Token ids of an inference prompt within the run's limits.

        Args:
            persona: The lines of the one who answers.
            history: Utterances in turn, the partner's last.
            room: Tokens that the LM must have left behind soft prompt and context.
        """
        d = self.config.data
        limit = min(d.max_length, self.lm.config.longest_row - front_length(self.config) - room)
        if limit < 1:
            raise UserError(
                f"a reply of {room} tokens leaves no room for a context: {self.lm.identity.name} has "
                f"{self.lm.config.longest_row} positions; lower --max_new_tokens"
            )
        if d.max_turns:
            # A persona is said of whole exchanges; a reply answers the last of the partner's utterances.
            history = history[-(2 * d.max_turns - (0 if self.template.learns_persona else 1)) :]
        tokenizer = self.lm.tokenizer
        if self.experiment.model.official:
            return official_prompt(persona, history, tokenizer, max_length=limit).tolist()
        return encode_context(tokenizer, persona, history, max_length=limit, template=self.template)

    def score_contexts(self, contexts: Sequence[Sequence[int]]) -> np.ndarray:
        """The retriever's scores of each context: float32 ``[len(contexts), K]``.

        In the official mode the contexts are one batch, on which every score depends. Else they are scored one by one,
        padded to a multiple of 64 tokens, so that few shapes are compiled.
        """
        model, pad_id = self.experiment.model, pad_id_of(self.config, self.lm.tokenizer)
        if model.official:
            batch = inference_contexts(contexts, pad_id)
            return np.asarray(jax.device_get(self._scores(batch))[:, 0], np.float32)
        rows = []
        for context in contexts:
            tokens = np.full((1, -(-len(context) // 64) * 64), pad_id, np.int32)
            tokens[0, : len(context)] = context
            rows.append(self._scores({"tokens": tokens, "context_lengths": np.array([[len(context)]], np.int32)}))
        return np.asarray(jax.device_get(rows), np.float32).reshape(len(contexts), -1)

    def _scores(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        return _batch_scores(self.experiment.model, self.lm.params, self.trainable, batch)


_batch_scores = jax.jit(batch_scores, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """A run whose LM and checkpoint are not loaded yet, so that what cannot work is told before.

    Attributes:
        workdir: Where it lies: a folder, of a bucket's run its local copy.
        config: Its configuration.
        step: ``best``, ``latest`` or a step's number; there is such a checkpoint.
        lm: The LM that it was trained on.
        tokenizer: That LM's tokenizer's fingerprint.
    """

    workdir: Path
    config: Config
    step: str
    lm: LMIdentity
    tokenizer: str

    def open(self) -> Run:
        """Loads the LM and restores the checkpoint.

        Raises:
            UserError: The LM is not the one it was trained on, or cannot be loaded; or no checkpoint is whole.
        """
        config = self.config.copy_and_resolve_references()
        _fit_mesh(config, jax.device_count())
        with Checkpoints(self.workdir / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
            experiment = open_experiment(config).load()
            lm = experiment.lm
            check_lm(self.workdir, self.lm, lm.identity, self.tokenizer, lm.tokenizer.fingerprint)
            targets = {"trainable": _targets(experiment)}
            restored = checkpoints.restore(self.step, targets)
        if restored is None:
            raise UserError(f"there is no checkpoint in {self.workdir / CHECKPOINT_FOLDER}; train first")
        return Run(self.workdir, experiment, restored[1]["trainable"], restored[0], restored[2])


def find_run(workdir: str, step: str = "best") -> FoundRun:
    """Finds a run, which is yet to be opened.

    Args:
        workdir: The folder that `spt-jax train` made, or its bucket.
        step: ``best``, ``latest`` or a step's number.

    Raises:
        UserError: There is no run or no such checkpoint.
    """
    if step not in ("best", "latest") and not names_a_step(step):
        raise UserError(f"the checkpoint is {step!r}; allowed: best, latest or a step's number")
    folder = local_workdir(workdir, step)
    config, lm, tokenizer = read_config(folder)
    with Checkpoints(folder / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
        checkpoints.check(step)
    return FoundRun(folder, config, step, lm, tokenizer)


def open_run(workdir: str, step: str = "best") -> Run:
    """Opens a working directory: `find_run`, and `FoundRun.open`.

    Raises:
        UserError: There is no run or no such checkpoint, or the LM is not the one it was trained on.
    """
    return find_run(workdir, step).open()


def _targets(experiment: Experiment) -> Trainable:
    """What a checkpoint's tree looks like: where the whole LM is in it, it lies as the LM does, else everywhere."""
    model = experiment.model
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    if isinstance(model.adapter, WholeModel):
        return restore_targets(tree, {"lm": jax.tree.map(lambda x: x.sharding, experiment.lm.params)})
    return restore_targets(tree, replicated(experiment.mesh))


def _fit_mesh(config: Config, devices: int) -> None:
    """A run trained on other hardware is opened with its weights sharded over all the devices that are here."""
    m = config.mesh
    try:
        data, _, _ = mesh_sizes(m.data, m.fsdp, m.tensor, devices)
    except UserError:
        m.data, m.fsdp, m.tensor, m.slices = 1, devices, 1, 1
    else:
        if data % m.slices:
            m.slices = 1


SPLITS = {"test": "test", "development": "validation", "train": "train"}
"""A run's parts of its data, and what Hugging Face datasets call them."""


_ANOTHER = "start another run"


def _splits_of_run(config: Config, workdir: Path, otherwise: str) -> Splits:
    """The parts of a run's own data, which must be those it learned from: else what is held out may have been learned.

    Args:
        config: The run's configuration.
        workdir: Where the run lies.
        otherwise: See `check_dialogues`.

    Raises:
        UserError: They cannot be read, or have changed since the run was started.
    """
    splits = read_splits(config)
    if is_lead():
        cut = {"training": splits.train} | ({} if config.data.development else {"development": splits.development})
        digests = {part: dialogues_digest(dialogues) for part, dialogues in cut.items()}
        check_dialogues(workdir, config, digests, otherwise)
    return splits


def demonstrations_of(config: Config, workdir: Path) -> tuple[Dialogue, ...]:
    """The training dialogues that a run shows before its contexts; none but for few-shot prompting.

    Raises:
        UserError: They cannot be read, have changed, or are too few to draw from.
    """
    if config.method.kind != "few_shot":
        return ()
    return draw_demonstrations(_splits_of_run(config, workdir, _ANOTHER).train, config.method.shots, config.seed)


def heldout_dialogues(
    config: Config, workdir: Path, source: str, limit: int = 0, split: str = "test"
) -> tuple[str, list[Dialogue]]:
    """The dialogues that a run is measured on; malformed lines that ``data.on_error`` skips are told on standard error.

    Args:
        config: The run's configuration.
        workdir: Where the run lies.
        source: As ``data.test``; empty for the run's own, which may be cut from its training dialogues.
        limit: The first so many; 0 for all.
        split: One of `SPLITS`: which part of the run's data, or of a source that has parts.

    Returns:
        The name of the source, and the dialogues.

    Raises:
        UserError: The source cannot be read; or the run's own data, of which a part is asked for, have changed.
    """
    source = source or {"test": config.data.test, "development": config.data.development, "train": ""}[split]
    if source:
        found = read_source(config, source, SPLITS[split])
        dialogues, skipped = list(found.dialogues), found.skipped
    else:
        part = {"test": "held out", "development": "its development split", "train": "what was learned from"}
        source = f"{config.data.train} ({part[split]})"
        splits = _splits_of_run(config, workdir, "name dialogues to measure on by --data")
        dialogues, skipped = getattr(splits, split), tuple(splits.skipped)
        if not dialogues:
            raise UserError(f"this run has no {split} dialogues; --data names others")
    for sentence in skipped if is_lead() else ():
        print(f"skipped {sentence}", file=sys.stderr)
    return source, dialogues[: limit or None]
