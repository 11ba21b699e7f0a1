"""A checkpoint folder of the authors' program, its config file and an LM become a working directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.interop.converted_run import check_fits, write_converted_run
from spt_jax.interop.official import BEST, CHECKPOINTS, OfficialTensors, find_model_states, read_official_tensors
from spt_jax.interop.official_config import OfficialRun, read_official_run
from spt_jax.interop.official_tree import official_trainable
from spt_jax.interop.official_yaml import find_config_file
from spt_jax.interop.whole_folder import check_new_folder
from spt_jax.models.loading import OpenedLM, open_lm
from spt_jax.training.experiment import open_experiment


def convert_official(
    place: Path, source: str, workdir: Path, *, config_file: Path | None = None, revision: str = ""
) -> OfficialRun:
    """Converts a checkpoint; everything is checked before anything is written.

    Args:
        place: See `spt_jax.interop.official.find_model_states`.
        source: The LM, as ``model.source``.
        workdir: A new or empty folder, which appears whole or not at all.
        config_file: The YAML file of that training; None takes the only one in the run's folder.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The run as it was written, with the lines that its user should read.

    Raises:
        UserError: The checkpoint, its config file, the LM or the folder cannot be used, or they do not fit together.
    """
    check_new_folder(workdir, "--workdir")
    path = find_model_states(place)
    tensors = read_official_tensors(path)
    yaml_file = config_file or find_config_file(place)
    run = read_official_run(yaml_file, source, tensors.engine, folder_name=_run_folder(path).name)
    config: Config = run.config
    trainable = official_trainable(tensors, config)
    opened = open_lm(source, revision=revision, weights=False)
    _check_lm(tensors, run, source, opened)
    config.model.revision, config.model.dropout = revision, _own_dropout(opened)
    experiment = open_experiment(config).load()
    check_fits(tensors.where, trainable, experiment)
    write_converted_run(workdir, experiment, trainable)
    if run.model_name and Path(run.model_name).name != Path(source).name:
        note = f"the LM is {source}; the config file names {run.model_name}, and nothing in the checkpoint can tell"
        return dataclasses.replace(run, notes=(*run.notes, note))
    return run


def _run_folder(path: Path) -> Path:
    folder = path.absolute().parent
    for inner in (BEST, CHECKPOINTS):
        folder = folder.parent if folder.name == inner else folder
    return folder


def _own_dropout(opened: OpenedLM) -> float:
    """OPT's rate behind attention and MLP, which their training leaves active; Llama has none."""
    value: Any = opened.fields.get("dropout", 0.0) if opened.fields.get("model_type") == "opt" else 0.0
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _check_lm(tensors: OfficialTensors, run: OfficialRun, source: str, opened: OpenedLM) -> None:
    width, found = opened.config.hidden_size, tensors.prompts.shape[-1]
    if found != width:
        trained_on = f" (it was trained on {run.model_name})" if run.model_name else ""
        raise UserError(
            f"the soft prompts of {tensors.where} have width {found}, but {source} has width {width}; give the LM that "
            f"it was trained on{trained_on}"
        )
