"""Writes a trained run as adapters that PEFT loads, with a model card; see docs/peft.md.

Examples:
  spt-jax convert peft --workdir=runs/quickstart --out=exports/quickstart
  spt-jax convert peft --workdir=runs/quickstart --out=exports/quickstart --push=me/quickstart-spt --private
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from spt_jax.commands.workdirs import local_workdir
from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.step_names import names_a_step

_REQUIRED = {"workdir": "the working directory of a trained run", "out": "a new folder for the adapters"}


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "Working directory of a trained run.", **fv)
    flags.DEFINE_string("checkpoint", "best", "Which checkpoint: best, latest or a step's number.", **fv)
    flags.DEFINE_string("out", None, "New folder for the adapters.", **fv)
    flags.DEFINE_string("push", None, "Also upload the folder to this repository of the Hugging Face hub.", **fv)
    flags.DEFINE_boolean("private", False, "Whether --push makes a private repository.", **fv)


def run(flag_values: flags.FlagValues) -> int:
    """Exports; returns the exit code.

    Raises:
        UserError: A flag is missing, there is no run or no checkpoint, PEFT cannot carry it, or the folder cannot be
            written: nothing is written then. Or the hub refuses: the folder remains.
    """
    given: Any = flag_values.flag_values_dict()
    for name, wanted in _REQUIRED.items():
        if not given[name]:
            raise UserError(f"--{name} is missing; give {wanted}")
    if given["private"] and not given["push"]:
        raise UserError("--private goes with --push=REPO, which is missing")
    from spt_jax.interop.hub_upload import check_upload, upload_folder
    from spt_jax.interop.peft import export_peft
    from spt_jax.interop.whole_folder import check_new_folder

    out = Path(given["out"])
    check_new_folder(out)
    if given["push"]:
        check_upload(given["push"])
    workdir = local_workdir(given["workdir"], given["checkpoint"])
    trained = open_trained(workdir, given["checkpoint"])
    figures = _figures(workdir, trained.step)
    adapters = export_peft(trained, out, figures)
    which = adapters[0] if len(adapters) == 1 else f"{adapters[0]} … {adapters[-1]}"
    print(f"{len(adapters)} PEFT adapter{'s' * (len(adapters) > 1)} ({which}) of step {trained.step} in {out}")
    if given["push"]:
        print(f"pushed to {upload_folder(out, given['push'], private=given['private'])}")
    return 0


def open_trained(workdir: Path, checkpoint: str) -> Any:
    """What a run learned, and its LM without the weights: no accelerator is needed.

    Args:
        workdir: The folder that `spt-jax train` made.
        checkpoint: ``best``, ``latest`` or a step's number.

    Returns:
        A `spt_jax.interop.peft.TrainedRun`.

    Raises:
        UserError: There is no run or no such checkpoint, its LM is not there, or PEFT cannot carry the run.
    """
    import jax

    from spt_jax.interop.model_card import hub_id
    from spt_jax.interop.peft import TrainedRun, refuse_what_peft_cannot
    from spt_jax.models.loading import open_lm
    from spt_jax.parallel.mesh import make_mesh
    from spt_jax.parallel.rules import replicated
    from spt_jax.training.checkpoint import Checkpoints
    from spt_jax.training.checkpoint_arrays import restore_targets
    from spt_jax.training.description import describe
    from spt_jax.training.workdir import CHECKPOINT_FOLDER, read_config

    if checkpoint not in ("best", "latest") and not names_a_step(checkpoint):
        raise UserError(f"the checkpoint is {checkpoint!r}; allowed: best, latest or a step's number")
    config, identity, _ = read_config(workdir)
    source = config.model.source
    opened = open_lm(
        source,
        dtype=config.model.dtype,
        revision=identity.revision if hub_id(source) else "",
        context_length=config.model.context_length,
        quantization=config.model.quantization,
        weights=False,
    )
    mesh = make_mesh(-1, 1, 1)
    model = describe(config, opened.config, mesh)
    refuse_what_peft_cannot(config, opened, model)
    with Checkpoints(workdir / CHECKPOINT_FOLDER, read_only=True) as checkpoints:
        template = jax.eval_shape(lambda: model.init(jax.random.key(0)))
        restored = checkpoints.restore(checkpoint, {"trainable": restore_targets(template, replicated(mesh))})
    if restored is None:
        raise UserError(f"there is no checkpoint in {workdir / CHECKPOINT_FOLDER}; train first")
    return TrainedRun(config, identity, opened, model, restored[1]["trainable"], restored[0])


def _figures(workdir: Path, step: int) -> str:
    """The run's table of results in Markdown; empty where it was not evaluated at this step."""
    from spt_jax.evaluation.table import markdown_table

    try:
        results = json_object(workdir / "results.json")
        if results["step"] != step:
            return ""
        return f"Measured on `{Path(results['data']).name}`, step {step}.\n\n{markdown_table(results['columns'])}"
    except (ValueError, KeyError, TypeError, AttributeError):  # a UserError is a ValueError
        return ""
