"""The working directory of a run: whose it is, and what may change when it is resumed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load, save

import spt_jax
from spt_jax.atomic_file import write_atomically
from spt_jax.config import Config, flatten, from_dict
from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.locked_folder import locked_folder
from spt_jax.models.loading import LMIdentity
from spt_jax.parallel.distributed import is_lead, json_told_by_lead, told_by_lead
from spt_jax.prompting.adapters import Trainable
from spt_jax.user_paths import check_around, present

CONFIG_FILE = "config.json"
CHECKPOINT_FOLDER = "checkpoints"
INITIAL_FILE = "initial.safetensors"

FREE_SECTIONS = ("evaluation.", "generation.", "mesh.", "tracking.")
MAY_CHANGE = (
    "train.log_every",
    "train.evaluate_every",
    "train.save_every",
    "train.keep_latest",
    "train.keep_best",
    "train.max_bad_steps",
    "train.profile_steps",
    "data.prefetch",
    "model.source",
    "model.revision",
    "model.remat",
    "model.attention",
    "model.max_logit_rows",
)
"""Options, beside `FREE_SECTIONS`, that do not change what is learned; an LM is known by its weights, not its name."""

LEARNED_FROM = ("training", "development")
"""The parts of the dialogues that a run follows from: it learns from the one and chooses the best step by the other."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all; UserError when it cannot be written."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _read(workdir: Path) -> dict[str, Any]:
    path = workdir / CONFIG_FILE
    if not present(path, "--workdir"):
        raise UserError(f"{workdir} is not the working directory of a run: it has no {CONFIG_FILE}")
    try:
        record = json_object(path)
    except UserError as error:
        raise UserError(f"{path} cannot be read: it {str(error).removeprefix(f'{path} ')}") from error
    if not {"config", "lm", "tokenizer"} <= set(record):
        raise UserError(f"{path} cannot be read: it lacks 'config', 'lm' or 'tokenizer'")
    if not isinstance(record["config"], dict) or not isinstance(record["tokenizer"], str):
        raise UserError(f"{path} cannot be read: its 'config' is not an object, or its 'tokenizer' no text")
    dialogues = record.get("dialogues", {})  # a run of before these were kept has none
    if not isinstance(dialogues, dict) or not all(isinstance(digest, str) for digest in dialogues.values()):
        raise UserError(f"{path} cannot be read: its 'dialogues' are not digests by name")
    try:
        LMIdentity.from_dict(record["lm"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: its 'lm' does not say which LM it was ({error})") from error
    return record


def read_config(workdir: Path) -> tuple[Config, LMIdentity, str]:
    """The configuration of the run in `workdir`, the LM it was trained on and its tokenizer's fingerprint.

    Of several processes the first reads it, and tells the others; all must ask.

    Raises:
        UserError: There is no run, or its record cannot be read.
    """
    return _parts(json_told_by_lead(_read(workdir) if is_lead() else None))


def _parts(record: dict[str, Any]) -> tuple[Config, LMIdentity, str]:
    return from_dict(record["config"]), LMIdentity.from_dict(record["lm"]), record["tokenizer"]


def write_initial(workdir: Path, trainable: Trainable) -> None:
    """Keeps the trainable tree before the first step, for comparison; not written again by a resumed run.

    Raises:
        UserError: It cannot be written.
    """
    path = workdir / INITIAL_FILE
    if path.exists():
        return
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(jax.device_get(trainable), sep="/").items()}
    write_atomically(path, save(arrays))


def read_initial(workdir: Path) -> Trainable:
    """The tree that `write_initial` kept; UserError when it cannot be read. See `read_config` of several processes."""
    try:
        content = told_by_lead((workdir / INITIAL_FILE).read_bytes() if is_lead() else b"")
        return unflatten_dict(load(content), sep="/")
    except Exception as error:
        raise UserError(f"{workdir / INITIAL_FILE}, the trainable tree before training, cannot be read") from error


def check_workdir(workdir: Path, config: Config) -> None:
    """Refuses a folder that holds another run, or something else, before any weight is loaded.

    Raises:
        UserError: Names the options that differ, with both values; or the folder cannot be looked up, made or written.
    """
    if present(workdir, "--workdir") and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; allowed: a folder, new or of the same run")
    if not workdir.is_dir():
        check_around(workdir, "--workdir")
    elif not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be written: no permission to write in this folder")
    # A start that was killed while it wrote its first file leaves a temporary one behind.
    if not workdir.is_dir() or all(path.name.startswith(f".{CONFIG_FILE}.") for path in workdir.iterdir()):
        return
    if not (workdir / CONFIG_FILE).exists():
        raise UserError(f"{workdir} is not empty and holds no run (no {CONFIG_FILE}); choose another --workdir")
    old, new = flatten(from_dict(_read(workdir)["config"])), flatten(config)
    free = set(MAY_CHANGE)
    # Neither the rates nor the weights of the losses depend on how far the end is.
    if config.optimizer.schedule == "constant" and not config.objective.annealing:
        free |= {"train.steps", "train.epochs"}
    if old["data.test"] and new["data.test"]:  # else the test dialogues are cut from the training dialogues
        free |= {"data.test", "data.test_dialogues"}
    differing = [
        f"{name} ({old[name]!r} there, {new[name]!r} here)"
        for name in new
        if old[name] != new[name] and name not in free and not name.startswith(FREE_SECTIONS)
    ]
    if differing:
        raise UserError(f"{workdir} holds another run: {'; '.join(differing)}; choose another --workdir")


def check_dialogues(
    workdir: Path, config: Config, dialogues: Mapping[str, str], otherwise: str = "choose another --workdir"
) -> None:
    """Refuses dialogues other than those with which the run in `workdir` was started, before any weight is loaded.

    Those count that are used, behind ``data.limit`` and all cuts: whatever else changes in a file changes no batch.
    A record without digests, of an older version or of a converted run, takes any; `claim_workdir` then keeps them.

    Args:
        workdir: New, or of the run.
        config: As it was at that start, see `check_workdir`.
        dialogues: The `spt_jax.data.dialogue.dialogues_digest` of each part that counts, by the part's name.
        otherwise: What one may do beside restoring them.

    Raises:
        UserError: Names the parts that differ and the options that they are from.
    """
    saved = _read(workdir).get("dialogues", {}) if (workdir / CONFIG_FILE).exists() else {}
    d = config.data
    source = {"training": "train", "development": "development" if d.development else "train"}
    differing = [
        f"those for {part} (data.{source[part]} = {d[source[part]]!r})"
        for part in LEARNED_FROM
        if part in dialogues and saved.get(part, dialogues[part]) != dialogues[part]
    ]
    if differing:
        raise UserError(
            f"the dialogues of the run in {workdir} have changed since it was started: {' and '.join(differing)}; "
            f"restore what was there, or {otherwise}"
        )


def locked_workdir(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other trainings out of a folder, which is made when missing, while the context is open.

    Raises:
        UserError: The folder cannot be made, or another process trains in it.
    """
    return locked_folder(workdir, f"another process is training in {workdir}")


def check_unlocked(workdir: Path) -> None:
    """Raises a `UserError` where another process is training in a folder, which need not exist."""
    if workdir.is_dir():
        with locked_workdir(workdir):
            pass


def claim_workdir(workdir: Path, config: Config, lm: LMIdentity, tokenizer: str, dialogues: Mapping[str, str]) -> None:
    """Writes ``config.json``; a run that is there already must have been trained on the same weights.

    Args:
        workdir: Made when missing.
        config: The configuration.
        lm: The LM.
        tokenizer: Its fingerprint.
        dialogues: See `check_dialogues`; empty where none were learned from yet.

    Raises:
        UserError: The LM or the tokenizer is another one; both are named.
    """
    if (workdir / CONFIG_FILE).exists():
        _, old, old_tokenizer = _parts(_read(workdir))
        check_lm(workdir, old, lm, old_tokenizer, tokenizer)
    _make(workdir)
    record = {
        "spt_jax": spt_jax.__version__,
        "lm": lm.to_dict(),
        "tokenizer": tokenizer,
        "dialogues": {part: digest for part, digest in dialogues.items() if part in LEARNED_FROM},
        "config": config.to_dict(),
    }
    write_json(workdir / CONFIG_FILE, record)


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {workdir} cannot be made: {error.strerror}") from error


def check_lm(workdir: Path, saved: LMIdentity, found: LMIdentity, saved_tokenizer: str, found_tokenizer: str) -> None:
    """Refuses an LM other than the one that the run in `workdir` was trained on; UserError names both."""
    if saved.sha256 != found.sha256:
        raise UserError(
            f"the run in {workdir} was trained on {saved.name} (weights sha256 {saved.sha256[:12]}…), but "
            f"model.source now gives {found.name} (sha256 {found.sha256[:12]}…)"
        )
    if saved_tokenizer != found_tokenizer:
        raise UserError(
            f"the run in {workdir} was trained with another tokenizer (fingerprint {saved_tokenizer[:12]}… there, "
            f"{found_tokenizer[:12]}… here) beside the same weights {found.name}"
        )
