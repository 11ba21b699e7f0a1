"""A trained run, opened from its working directory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.config import Config
from spt_jax.data.dialogue import Dialogue
from spt_jax.data.template import encode_context
from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree, embed
from spt_jax.models.loading import LanguageModel
from spt_jax.parallel.rules import replicated
from spt_jax.prompting.retriever import context_means
from spt_jax.prompting.selective_lm import SelectiveLM, Trainable, retriever_scores
from spt_jax.training.checkpoint import Checkpoints, restore_targets
from spt_jax.training.experiment import Experiment, open_experiment, read_source, read_splits
from spt_jax.training.workdir import CHECKPOINT_FOLDER, check_lm, read_config, read_initial


@dataclasses.dataclass(frozen=True)
class Run:
    """A restored run.

    Attributes:
        workdir: Where it lies.
        experiment: Configuration, mesh, LM and model.
        trainable: The bank and the retriever of the restored step.
        step: The restored step.
    """

    workdir: Path
    experiment: Experiment
    trainable: Trainable
    step: int

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
        """The trainable tree before the first step."""
        return read_initial(self.workdir)

    def encode_context(self, persona: Sequence[str], history: Sequence[str]) -> list[int]:
        """Token ids of an inference prompt within the run's limits.

        Args:
            persona: The lines of the one who answers.
            history: Utterances in turn, the partner's last.
        """
        d = self.config.data
        if d.max_turns:
            history = history[-(2 * d.max_turns - 1) :]
        return encode_context(self.lm.tokenizer, persona, history, max_length=d.max_length)

    def score_contexts(self, contexts: Sequence[Sequence[int]]) -> np.ndarray:
        """The retriever's scores of each context: float32 ``[len(contexts), K]``.

        Contexts are padded to a multiple of 64 tokens and scored one by one, so that few shapes are compiled.
        """
        rows = []
        for context in contexts:
            tokens = np.full(-(-len(context) // 64) * 64, self.lm.tokenizer.pad_id, np.int32)
            tokens[: len(context)] = context
            rows.append(_score(self.experiment.model, self.lm.params, self.trainable, tokens, len(context)))
        return np.asarray(jax.device_get(rows), np.float32).reshape(len(contexts), -1)


def _score_context(
    model: SelectiveLM, params: FrozenTree, trainable: Trainable, tokens: jax.Array, length: jax.Array
) -> jax.Array:
    means = context_means(embed(model.decoder, params, tokens)[None], jnp.reshape(length, (1, 1)))
    return retriever_scores(model, trainable, means)[0, 0]


_score = jax.jit(_score_context, static_argnums=0)


def open_run(workdir: str, step: str = "best") -> Run:
    """Opens a working directory.

    Args:
        workdir: The folder that `spt-jax train` made.
        step: ``best``, ``latest`` or a step's number.

    Raises:
        UserError: There is no run or no such checkpoint, or the LM is not the one it was trained on.
    """
    folder = Path(workdir)
    if step not in ("best", "latest") and not step.isdigit():
        raise UserError(f"the checkpoint is {step!r}; allowed: best, latest or a step's number")
    config, identity, fingerprint = read_config(folder)
    _fit_mesh(config, jax.device_count())
    with Checkpoints(folder / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
        experiment = open_experiment(config)
        lm = experiment.lm
        check_lm(folder, identity, lm.identity, fingerprint, lm.tokenizer.fingerprint)
        template = jax.eval_shape(lambda: experiment.model.init(jax.random.key(0)))
        targets = {"trainable": restore_targets(template, replicated(experiment.mesh))}
        restored = checkpoints.restore(step, targets)
    if restored is None:
        raise UserError(f"there is no checkpoint in {folder / CHECKPOINT_FOLDER}; train first")
    return Run(folder, experiment, restored[1]["trainable"], restored[0])


def _fit_mesh(config: Config, devices: int) -> None:
    """A run trained on other hardware is opened with its weights sharded over all the devices that are here."""
    m = config.mesh
    if (devices % (m.fsdp * m.tensor) != 0) if m.data == -1 else (m.data * m.fsdp * m.tensor != devices):
        m.data, m.fsdp, m.tensor = 1, devices, 1


def heldout_dialogues(config: Config, source: str, limit: int = 0) -> tuple[str, list[Dialogue]]:
    """The dialogues that a run is measured on; malformed lines that ``data.on_error`` skips are told on standard error.

    Args:
        config: The run's configuration.
        source: As ``data.test``; empty for the run's own, which may be cut from its training dialogues.
        limit: The first so many; 0 for all.

    Returns:
        The name of the source, and the dialogues.

    Raises:
        UserError: The source cannot be read.
    """
    source = source or config.data.test
    if source:
        found = read_source(config, source, "test")
        dialogues, skipped = list(found.dialogues), found.skipped
    else:
        source = f"{config.data.train} (held out)"
        splits = read_splits(config)
        dialogues, skipped = splits.test, tuple(splits.skipped)
    for sentence in skipped:
        print(f"skipped {sentence}", file=sys.stderr)
    return source, dialogues[: limit or None]
