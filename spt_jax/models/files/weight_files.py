"""The weight files of a Hugging Face folder, whichever of the supported formats they have."""

from __future__ import annotations

from pathlib import Path

from spt_jax.errors import UserError
from spt_jax.models.files.safetensors_file import SAFETENSORS_INDEX, SafetensorsFolder
from spt_jax.models.files.torch_file import TORCH_FILE, TORCH_INDEX, TorchFolder

_UNSUPPORTED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf")


def weights_of_folder(folder: Path) -> SafetensorsFolder | TorchFolder:
    """Opens the weights of a folder: safetensors where there are any, else torch's ``pytorch_model*.bin``.

    Either has the attributes of `spt_jax.models.weights.Checkpoint` and ``dtypes``, the type of every tensor by name.
    Headers alone are read.

    Raises:
        UserError: No weight file of these formats; a format that is not supported is named. Or as the two readers.
    """
    if (folder / SAFETENSORS_INDEX).is_file() or any(folder.glob("model*.safetensors")):
        return SafetensorsFolder(folder)
    if (folder / TORCH_INDEX).is_file() or any(folder.glob("pytorch_model*.bin")):
        return TorchFolder(folder)
    if any(folder.glob("*.safetensors")):  # of another name, and nothing else to take
        return SafetensorsFolder(folder)
    found = sorted(file.name for pattern in _UNSUPPORTED for file in folder.glob(pattern))
    if found:
        raise UserError(
            f"{folder} holds {found[0]}, which is not supported here; supported in a folder: *.safetensors "
            f"and {TORCH_FILE}"
        )
    raise UserError(
        f"{folder} holds no weight file; expected model.safetensors, {SAFETENSORS_INDEX} with its shards, "
        f"{TORCH_FILE}, or {TORCH_INDEX} with its shards"
    )
