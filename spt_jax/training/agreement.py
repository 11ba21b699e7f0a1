"""Processes that train as one must have been given the same run: others would wait for one another for ever."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax

import spt_jax
from spt_jax.config import Config, flatten
from spt_jax.errors import UserError
from spt_jax.models.loading import LanguageModel
from spt_jax.parallel.distributed import json_told_by_lead
from spt_jax.prompting.adapters import Trainable
from spt_jax.training.checkpoint_arrays import tree_digest

PLACES = ("model.source", "data.train", "data.development", "data.test", "bank.init_file")
"""Options that name files, which may lie elsewhere on another host; what is in them is compared."""


def check_same_options(config: Config) -> None:
    """Refuses options and versions that differ from those of the first process; every process must ask.

    Raises:
        UserError: Names what differs, with both values.
    """
    if jax.process_count() == 1:
        return
    given = flatten(config).items()
    options = {name: value for name, value in given if name not in PLACES and not name.startswith("tracking.")}
    _check({"the version of spt_jax": spt_jax.__version__, "the version of jax": jax.__version__, **options})


def check_same_content(lm: LanguageModel, dialogues: Mapping[str, str]) -> None:
    """Refuses an LM or dialogues that differ from those of the first process; every process must ask.

    Args:
        lm: The LM with its tokenizer.
        dialogues: The `spt_jax.data.dialogue.dialogues_digest` of each part of the data, by the part's name.

    Raises:
        UserError: Names what differs.
    """
    if jax.process_count() == 1:
        return
    told = {f"the {part} dialogues": digest for part, digest in dialogues.items()}
    _check({"the LM's weights": lm.identity.sha256, "the tokenizer": lm.tokenizer.fingerprint, **told})


def check_same_start(trainable: Trainable) -> None:
    """Refuses first values, of a bank from a file for instance, other than the first process's; every process must ask.

    Args:
        trainable: The tree before the first step, on the host.

    Raises:
        UserError: They differ.
    """
    if jax.process_count() > 1:
        _check({"what is learned, before the first step (bank.init_file)": tree_digest(trainable)})


def _check(mine: Mapping[str, Any]) -> None:
    mine = json.loads(json.dumps(mine))  # as the first process's values arrive
    first = json_told_by_lead(mine)
    names = [name for name in first | mine if first.get(name) != mine.get(name)]
    differing = [f"{name} ({first.get(name)!r} there, {mine.get(name)!r} here)" for name in names]
    if differing:
        raise UserError(
            f"what this process was given differs from what the first was given: {'; '.join(differing)}; start every "
            "one with the same command, and the same files under the names in it"
        )
