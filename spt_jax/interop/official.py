"""The tensors of a checkpoint of the authors' program, and the trainable tree that they are here.

Their training leaves ``ds_ckpt/best/mp_rank_00_model_states.pt`` (DeepSpeed, ZeRO stage 2, frozen parameters left out).
Under ``module`` it holds, by torch's names:

- ``models.{k}.prompt_encoder.default.embedding.weight`` ``[P, M]``, soft prompt k of K;
- ``prompt_normalizer.weight`` ``[M, M]`` (``[out, in]``) and ``.bias`` ``[M]``, the retriever's ``lin``;
- ``retriever.layers.{i}....``, the transformer retriever's encoder, where there is one.

Frozen parameters that were not left out are passed over. Nothing in the file is ever executed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.errors import UserError, nearest
from spt_jax.models.files.torch_file import TorchTrainingCheckpoint, float32_copy

MODEL_STATES = "*model_states.pt"
BEST = "best"
CHECKPOINTS = "ds_ckpt"

_MODULE = "module"
_PROMPT = re.compile(r"models\.(\d{1,6})\.prompt_encoder\.default\.embedding\.weight")
_FROZEN = re.compile(r"model\.|models\.\d+\.(base_model|word_embeddings|model)\.")
_NORMALIZER = {"prompt_normalizer.weight": "weight", "prompt_normalizer.bias": "bias"}
_ENCODER = "retriever."


@dataclasses.dataclass(frozen=True, eq=False)
class OfficialTensors:
    """What the authors' program had learned, in float32.

    Attributes:
        where: The file, for messages.
        prompts: ``[K, P, M]``.
        normalizer: ``weight`` ``[M, M]`` (``[out, in]``) and ``bias`` ``[M]``; empty where their config had none.
        encoder: The ``state_dict`` of the transformer retriever, names beginning with ``layers.``; empty without one.
        engine: What DeepSpeed wrote beside the tensors, such as ``ds_config`` and ``dp_world_size``.
    """

    where: str
    prompts: np.ndarray
    normalizer: Mapping[str, np.ndarray]
    encoder: Mapping[str, np.ndarray]
    engine: Mapping[str, Any]


def find_model_states(place: Path) -> Path:
    """The checkpoint's file: `place` itself, or the one in its ``ds_ckpt/best``, in its ``best`` or in itself.

    Raises:
        UserError: There is none, there are several, or it is one of another kind.
    """
    if place.is_file():
        return _checked_file(place)
    if not place.is_dir():
        raise UserError(f"the checkpoint {place} does not exist{_near(place)}")
    folders = (place / CHECKPOINTS / BEST, place / BEST, place)
    for folder in folders:
        found = sorted(folder.glob(MODEL_STATES)) if folder.is_dir() else []
        if len(found) > 1:
            raise UserError(
                f"{folder} holds {len(found)} files of model states ({found[0].name}, {found[1].name}, ...), so its "
                "model was split over several devices; only a checkpoint of one mp_rank can be read"
            )
        if found:
            return _checked_file(found[0])
    looked = ", ".join(str(folder) for folder in folders)
    raise UserError(f"{place} holds no checkpoint of the authors' program: no {MODEL_STATES} in {looked}")


def _near(place: Path) -> str:
    siblings = [path.name for path in place.parent.iterdir()] if place.parent.is_dir() else []
    return f".{nearest(place.name, siblings)}" if nearest(place.name, siblings) else ""


def _checked_file(path: Path) -> Path:
    if path.name.endswith("optim_states.pt"):
        raise UserError(f"{path} holds an optimizer's state; the weights are in {MODEL_STATES} beside it")
    if path.name.startswith("zero_pp_rank"):
        raise UserError(f"{path} is a part of a ZeRO stage 3 checkpoint; only stages up to 2 can be read")
    return path


def read_official_tensors(path: Path) -> OfficialTensors:
    """Reads a file of model states.

    Raises:
        UserError: It is damaged, asks for code to be run, lacks a tensor, or holds one of another shape, one that
            belongs nowhere, or a value that is not finite.
    """
    file = TorchTrainingCheckpoint(path, _MODULE)
    prompts: dict[int, str] = {}
    encoder: list[str] = []
    for name in file.shapes:
        if match := _PROMPT.fullmatch(name):
            prompts[int(match[1])] = name
        elif name.startswith(_ENCODER):
            encoder.append(name)
        elif name not in _NORMALIZER and not _FROZEN.match(name):
            raise UserError(f"{path} holds the tensor {name!r}, which the authors' selective model does not have")
    bank = _bank(file, prompts)
    return OfficialTensors(
        where=str(path),
        prompts=bank,
        normalizer=_normalizer(file, bank.shape[-1]),
        encoder={name.removeprefix(_ENCODER): _float32(file, name) for name in encoder},
        engine=file.values,
    )


def _bank(file: TorchTrainingCheckpoint, names: Mapping[int, str]) -> np.ndarray:
    if not names:
        raise UserError(
            f"{file.where} holds no soft prompt: no tensor models.0.prompt_encoder.default.embedding.weight "
            f"under {_MODULE!r}"
        )
    missing = next((k for k in range(len(names)) if k not in names), None)
    if missing is not None:
        raise UserError(f"{file.where} holds {len(names)} soft prompts up to number {max(names)}, but not {missing}")
    shape = file.shapes[names[0]]
    for k in sorted(names):
        if len(file.shapes[names[k]]) != 2 or 0 in file.shapes[names[k]] or file.shapes[names[k]] != shape:
            raise UserError(
                f"{file.where}: soft prompt {k} has the shape {list(file.shapes[names[k]])}; expected [P, M], the same "
                f"for all (prompt 0 has {list(shape)})"
            )
    return np.stack([_float32(file, names[k]) for k in sorted(names)])


def _normalizer(file: TorchTrainingCheckpoint, width: int) -> dict[str, np.ndarray]:
    expected = {"prompt_normalizer.weight": (width, width), "prompt_normalizer.bias": (width,)}
    found = [name for name in expected if name in file.shapes]
    for name in found or ():
        if file.shapes[name] != expected[name]:
            raise UserError(
                f"{file.where}: {name} has the shape {list(file.shapes[name])}, but soft prompts of width {width} need "
                f"{list(expected[name])}"
            )
    if len(found) == 1:
        raise UserError(
            f"{file.where} holds {found[0]}, but not {next(name for name in expected if name not in found)}"
        )
    return {_NORMALIZER[name]: _float32(file, name) for name in found}


def _float32(file: TorchTrainingCheckpoint, name: str) -> np.ndarray:
    array = float32_copy(file.read(name), Path(file.where), name)
    if not np.isfinite(array).all():
        raise UserError(f"{file.where}: the tensor {name!r} holds values that are not finite")
    return array
