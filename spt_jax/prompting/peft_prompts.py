"""A bank of soft prompts from PEFT's prompt-tuning adapters (``bank.init = peft``)."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.models.files.safetensors_file import SAFETENSORS_FILE, SafetensorsFolder
from spt_jax.models.files.torch_file import TORCH_FILE, TorchFolder, float32_copy
from spt_jax.prompting.bank import check_bank_shape
from spt_jax.user_paths import expanded

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_TORCH_WEIGHTS = "adapter_model.bin"
PROMPT_TUNING = "PROMPT_TUNING"
PROMPT_KEY = "prompt_embeddings"
"""The one tensor of a saved prompt-tuning adapter, ``[P, M]``."""

PROMPT_FOLDER = "prompt_{}"
"""The adapter of prompt k in a folder of K of them."""

_OPTION = "bank.init_file"


def from_peft(source: str, shape: tuple[int, int, int], base: str = "") -> jax.Array:
    """Reads a bank from folders as PEFT's ``save_pretrained`` writes them, one adapter a prompt.

    Args:
        source: A folder that holds ``prompt_0`` … ``prompt_{K-1}`` (what ``spt-jax convert peft`` writes), one
            adapter's folder for all K prompts, or K adapters' folders with commas between them.
        shape: ``(K, P, M)``.
        base: The run's ``model.source``, compared with what each adapter was trained for; see `same_base`.

    Returns:
        float32 ``[K, P, M]``.

    Raises:
        UserError: There is no such folder, the number of adapters is neither 1 nor K, or one of them cannot be read,
            is of another kind than prompt tuning, of another base model, of another size, or not finite.
    """
    num_prompts, prompt_length, width = shape
    folders = adapter_folders(source)
    if len(folders) not in (1, num_prompts):
        raise UserError(
            f"{_OPTION}: {source} gives {len(folders)} adapters; allowed: 1, or one for each of {num_prompts} prompts"
        )
    prompts = []
    for folder in folders:
        prompt = read_prompt(folder, base)
        check_bank_shape(prompt[None], (1, prompt_length, width), str(folder))
        prompts.append(prompt)
    return jnp.asarray(np.stack(prompts * (num_prompts if len(prompts) == 1 else 1)))


def adapter_folders(source: str) -> list[Path]:
    """The adapters' folders that `source` names, in the order of the prompts; see `from_peft`.

    Raises:
        UserError: A folder is not there or holds no adapter, or the numbers of ``prompt_*`` have a gap.
    """
    parts = _parts(source)
    for part in parts:
        if not part.is_dir():
            raise UserError(f"{_OPTION}: there is no folder {part}")
    if len(parts) > 1 or (parts[0] / ADAPTER_CONFIG).is_file():
        return parts
    numbers = {_number(path.name) for path in parts[0].iterdir() if path.is_dir()} - {None}
    count = 0
    while count in numbers:
        count += 1
    beyond = [number for number in numbers if number is not None and number > count]
    if beyond:
        raise UserError(
            f"{_OPTION}: {parts[0]} holds {PROMPT_FOLDER.format(min(beyond))} but no {PROMPT_FOLDER.format(count)}"
        )
    if not count:
        raise UserError(
            f"{_OPTION}: {parts[0]} is no PEFT adapter; expected {ADAPTER_CONFIG} in it, or folders "
            f"{PROMPT_FOLDER.format(0)}, {PROMPT_FOLDER.format(1)}, … that have one each"
        )
    return [parts[0] / PROMPT_FOLDER.format(k) for k in range(count)]


def absolute_source(source: str) -> str:
    """`source` as it is understood from any folder: every path in it absolute."""
    return ",".join(str(part.absolute()) for part in _parts(source))


def _parts(source: str) -> list[Path]:
    with contextlib.suppress(UserError):  # several folders together may be too long for one name
        if (whole := expanded(source, _OPTION)).is_dir():
            return [whole]
    return [expanded(part.strip(), _OPTION) for part in source.split(",")]


def _number(name: str) -> int | None:
    """The k of ``prompt_k``, written as `PROMPT_FOLDER` writes it; None for another name."""
    digits = name.removeprefix(PROMPT_FOLDER.format(""))
    return int(digits) if digits.isdecimal() and name == PROMPT_FOLDER.format(int(digits)) else None


def read_prompt(folder: Path, base: str = "") -> np.ndarray:
    """The soft prompt of one adapter, float32 ``[P, M]``.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.
        base: The run's ``model.source``; empty for any.

    Raises:
        UserError: As `from_peft`, but for the size.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} is no PEFT adapter: it has no {ADAPTER_CONFIG}")
    fields = json_object(folder / ADAPTER_CONFIG)
    kind = fields.get("peft_type")
    if kind != PROMPT_TUNING:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: the adapter's peft_type is {kind!r}; a soft prompt comes from {PROMPT_TUNING}"
        )
    theirs = fields.get("base_model_name_or_path")
    if base and isinstance(theirs, str) and theirs and not same_base(theirs, base):
        raise UserError(
            f"{folder} was trained for the base model {theirs!r}, but model.source is {base!r}; if they are the same "
            f"weights, set base_model_name_or_path in its {ADAPTER_CONFIG} to null"
        )
    shapes, prompt = _read_weights(folder)
    where = _weights(folder)
    if set(shapes) != {PROMPT_KEY}:
        names = ", ".join(repr(name) for name in sorted(shapes)[:4]) or "no tensor"
        more = f" and {len(shapes) - 4} more" if len(shapes) > 4 else ""
        raise UserError(f"{where} holds {names}{more}; expected {PROMPT_KEY!r} alone")
    if prompt is None or prompt.ndim != 2:
        raise UserError(f"{where}: {PROMPT_KEY!r} has shape {tuple(shapes[PROMPT_KEY])}; expected [P, M]")
    return prompt


def _weights(folder: Path) -> Path:
    """The adapter's weight file; safetensors where there are both kinds, as PEFT chooses."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_TORCH_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds neither {ADAPTER_WEIGHTS} nor {ADAPTER_TORCH_WEIGHTS}")


def _read_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], np.ndarray | None]:
    """Shapes of all tensors, and the prompt where it is the only one."""
    file = _weights(folder)
    kind, name = (TorchFolder, TORCH_FILE) if file.suffix == ".bin" else (SafetensorsFolder, SAFETENSORS_FILE)
    # The readers of models take folders; this one holds the adapter's file alone, under a model's name.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / name).symlink_to(file.resolve())
        try:
            tensors = kind(Path(alone))
            shapes = {tensor: tuple(shape) for tensor, shape in tensors.shapes.items()}
            alone_there = set(shapes) == {PROMPT_KEY}
            found = float32_copy(tensors.read(PROMPT_KEY), file, PROMPT_KEY) if alone_there else None
        except UserError as error:
            raise UserError(str(error).replace(str(Path(alone) / name), str(file))) from error
    return shapes, found


def same_base(theirs: str, ours: str) -> bool:
    """Whether an adapter's ``base_model_name_or_path`` may mean the model that `ours` names.

    Names alone are compared: hub ids and folders by their last part, whatever its case, so that ``facebook/opt-125m``,
    ``/models/opt-125m`` and the hub's cache of it are the same. A ``.gguf`` file, a ``package:`` or a ``shape:`` names
    no model that PEFT knows: any adapter may be its.
    """
    if any(name.startswith(("package:", "shape:")) or name.endswith(".gguf") for name in (theirs, ours)):
        return True
    return _last_part(theirs) == _last_part(ours) or _same_folder(theirs, ours)


def _last_part(name: str) -> str:
    parts = Path(name).parts
    # The hub's cache: models--facebook--opt-125m/snapshots/<commit>
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].split("--")[-1].casefold()
    return parts[-1].casefold() if parts else ""


def _same_folder(theirs: str, ours: str) -> bool:
    try:
        return Path(theirs).expanduser().resolve() == Path(ours).expanduser().resolve()
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        return False
