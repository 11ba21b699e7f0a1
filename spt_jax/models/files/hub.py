"""Models of the Hugging Face hub: the files that are needed, fetched once, pinned to a commit; or their metadata alone.

`huggingface_hub` does the transport: its cache, its locks between processes, its retries from where a connection broke.
We choose the files, see that a copy is whole, and say in one sentence what went wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.models.files.safetensors_file import SAFETENSORS_FILE, SAFETENSORS_INDEX
from spt_jax.models.files.torch_file import TORCH_FILE, TORCH_INDEX
from spt_jax.models.files.weight_files import weights_of_folder
from spt_jax.models.files.weight_shards import shard_names

_TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_INDEX_FILES = (SAFETENSORS_INDEX, TORCH_INDEX)
_FORMATS = (
    (SAFETENSORS_FILE, SAFETENSORS_INDEX, "model*.safetensors"),
    (TORCH_FILE, TORCH_INDEX, "pytorch_model*.bin"),
)
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.ckpt", "*.onnx")


@dataclasses.dataclass(frozen=True)
class HubMetadata:
    """What is known of a model of the hub without its weights.

    Attributes:
        config: Its ``config.json``.
        shapes: Type (safetensors' name for it) and shape of every tensor by name; None where only the weights
            themselves could tell, that is for ``pytorch_model.bin`` files that are not in the local cache.
        revision: The commit.
        files: Bytes of every file that loading would fetch, by name.
        weight_files: Which of them hold weights.
        folder: The local folder with ``config.json`` and the tokenizer's files.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[str, tuple[int, ...]]] | None
    revision: str
    files: dict[str, int]
    weight_files: tuple[str, ...]
    folder: Path


def hub_folder(source: str, revision: str = "", *, weights: bool = True) -> Path:
    """The local copy of a model of the hub; what is missing from it is fetched.

    Of the weights, safetensors are fetched where the repository has them, else ``pytorch_model*.bin``, never both. A
    copy in the cache serves when the hub cannot be reached, provided that it is whole; a file of another size than the
    hub's is fetched again.

    Args:
        source: A hub id such as ``facebook/opt-125m`` or ``gpt2``.
        revision: A branch, tag or commit; empty for the main branch.
        weights: Whether the weights are needed, or the configuration and the tokenizer alone.

    Returns:
        The folder, whose name is the commit.

    Raises:
        UserError: The model is gated or unknown, the revision is unknown, the hub cannot be reached and the copy is
            not whole, the download fails or the disk is full, or there is no ``config.json`` or no supported weights.
    """
    import huggingface_hub

    with _told(source, revision):
        folder = _small_files(source, revision, weights)
        if not weights:
            return folder
        sizes = _sizes(source, revision, folder)
        needed = _weight_files(source, sizes, folder)
        if any(_size(folder / name) is None for name in needed):
            huggingface_hub.snapshot_download(source, revision=folder.name, allow_patterns=needed)
        for name in needed:
            if _size(folder / name) != sizes[name]:
                huggingface_hub.hf_hub_download(source, name, revision=folder.name, force_download=True)
            if (size := _size(folder / name)) != sizes[name]:
                raise UserError(
                    f"model source {source!r}: its file {name} came with {size} bytes, and the Hugging Face hub "
                    f"promised {sizes[name]}; try again later"
                )
    return folder


def hub_metadata(source: str, revision: str = "") -> HubMetadata:
    """Configuration, tensors and file sizes of a model of the hub; no weights are fetched, only their headers.

    Raises:
        UserError: As `hub_folder`; or ``config.json`` or a header does not parse.
    """
    with _told(source, revision):
        folder = _small_files(source, revision, weights=True)
        sizes = _sizes(source, revision, folder)
        names = tuple(_weight_files(source, sizes, folder))
        if all(_size(folder / name) == sizes[name] for name in names):
            local = weights_of_folder(folder)
            shapes = {name: (local.dtypes[name], shape) for name, shape in local.shapes.items()}
        elif all(name.endswith(".safetensors") for name in names):
            shapes = _remote_shapes(source, folder.name, names)
        else:
            shapes = None
    files = {
        name: size for name, size in sizes.items() if name in names or _matches(name, _TOKENIZER_FILES + _INDEX_FILES)
    }
    return HubMetadata(json_object(folder / "config.json"), shapes, folder.name, files, names, folder)


def _small_files(source: str, revision: str, weights: bool) -> Path:
    """The folder of the revision's commit, with everything but the weights in it."""
    import huggingface_hub
    from huggingface_hub import errors

    patterns: list[str] = [*_TOKENIZER_FILES, *(_INDEX_FILES if weights else ())]
    try:
        path = Path(huggingface_hub.snapshot_download(source, revision=revision or None, allow_patterns=patterns))
    except errors.LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # an IncompleteSnapshotError, new in huggingface_hub 2
        if partial is None:
            raise
        path = Path(partial)
        _cached_sizes(source, revision, path, weights, error.__cause__ or error)
    if not (path / "config.json").is_file():
        raise UserError(f"model source {source!r}{_at(revision)}: its repository on the hub has no config.json")
    return path


def _sizes(source: str, revision: str, folder: Path) -> dict[str, int]:
    """Bytes of every file at the top of the repository: by the hub, or by the cache if its copy is whole."""
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(huggingface_hub.HfApi().list_repo_tree(source, revision=folder.name))
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    except Exception as error:  # whatever the HTTP library of the day raises
        return _cached_sizes(source, revision, folder, True, error)


def _cached_sizes(source: str, revision: str, folder: Path, weights: bool, why: BaseException) -> dict[str, int]:
    cached = {file.name: size for file in folder.iterdir() if (size := _size(file)) is not None}
    if lacking := _lacking(cached, folder, weights):
        raise UserError(
            f"model source {source!r}{_at(revision)}: its copy in the local Hugging Face cache is incomplete "
            f"(no {lacking}), and the rest cannot be fetched: {_reason(why)}"
        ) from why
    return cached


def _lacking(cached: Mapping[str, int], folder: Path, weights: bool) -> str:
    if "config.json" not in cached:
        return "config.json"
    if not cached.keys() & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        return "tokenizer"
    needed = _chosen(cached, folder) if weights else []
    if needed is None:
        return "weights"
    return ", ".join(name for name in needed if name not in cached)


def _weight_files(source: str, sizes: Mapping[str, int], folder: Path) -> list[str]:
    names = _chosen(sizes, folder)
    if names is None:
        others = sorted(name for name in sizes if _matches(name, _OTHER_WEIGHTS))
        found = f"; it has {', '.join(others[:3])}" if others else ""
        raise UserError(
            f"model source {source!r}: its repository on the hub holds no weights that can be read{found}; supported: "
            f"{SAFETENSORS_FILE} or {TORCH_FILE}, or shards of either with their index"
        )
    if absent := [name for name in names if name not in sizes]:
        raise UserError(
            f"model source {source!r}: the index in its repository on the hub names {', '.join(absent)}, "
            "which is not there"
        )
    return names


def _chosen(names: Iterable[str], folder: Path) -> list[str] | None:
    """The weight files to read, of the names in a repository whose indices lie in `folder`."""
    names = sorted(names)
    for single, index, pattern in _FORMATS:
        if single in names:
            return [single]
        if index in names:
            return list(shard_names(folder / index))
        if found := fnmatch.filter(names, pattern):
            return found
    return None


def _remote_shapes(source: str, commit: str, names: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    import huggingface_hub

    def header(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        parsed = huggingface_hub.HfApi().parse_safetensors_file_metadata(source, name, revision=commit)
        return {tensor: (info.dtype, tuple(info.shape)) for tensor, info in parsed.tensors.items()}

    with ThreadPoolExecutor(8) as executor:
        headers = list(executor.map(header, names))
    return {name: entry for tensors in headers for name, entry in tensors.items()}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _at(revision: str) -> str:
    return f" at revision {revision!r}" if revision else ""


@contextlib.contextmanager
def _told(source: str, revision: str) -> Iterator[None]:
    """Turns every failure of the hub, the network or the disk into one sentence."""
    from huggingface_hub import constants, errors

    at = _at(revision)
    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(f"model source {source!r} neither exists here nor is a valid hub id: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"model source {source!r} is gated on the Hugging Face hub (403): ask for access on its page, "
            "then log in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model source {source!r} does not exist here, and the Hugging Face hub does not know it or needs a "
            "log-in for it (401): check the name, or log in with 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"model source {source!r} has no revision {revision!r} on the Hugging Face hub") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"model source {source!r}{at} does not exist here, is not in the local Hugging Face "
            f"cache, and the hub cannot be reached (offline): {_reason(error.__cause__ or error)}"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises, and a full disk
        if _is_full(error):
            raise UserError(
                f"model source {source!r}{at} could not be fetched: the disk of {constants.HF_HUB_CACHE} is full; "
                "free some space, or name another disk in HF_HOME"
            ) from error
        raise UserError(
            f"model source {source!r}{at} could not be fetched from the Hugging Face hub: {_reason(error)}; "
            "files that did arrive are kept, so trying again fetches the others alone"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
