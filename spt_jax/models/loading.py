"""`load_lm`: a frozen LM from wherever it is, with its tokenizer and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families import family_of_gguf, family_of_hf
from spt_jax.models.family import TensorTable
from spt_jax.models.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.gguf_file import GGUFFile
from spt_jax.models.gguf_tokenizer import tokenizer_of_gguf
from spt_jax.models.safetensors_file import SafetensorsFolder
from spt_jax.models.sources import Source, resolve_source
from spt_jax.models.tokenizer import Tokenizer
from spt_jax.models.weights import Checkpoint, Progress, ShardingFor, load_params


@dataclasses.dataclass(frozen=True)
class LMIdentity:
    """Which frozen LM a checkpoint was trained for.

    Attributes:
        name: The source as the user wrote it.
        revision: The hub's commit or the package's version; else empty.
        sha256: Of the weight files' bytes: of the file itself where there is one, else of the lines
            ``{file name} {sha256 of the file}`` in the order of names. The same weights saved in other shards or
            another type have another hash.
    """

    name: str
    revision: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, str]) -> LMIdentity:
        """From `to_dict`'s object."""
        return cls(**fields)


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen LM, ready for the functions of `spt_jax.models.decoder`.

    Attributes:
        config: The decoder.
        params: The frozen tree.
        tokenizer: Its tokenizer.
        identity: What it is, for checkpoints.
    """

    config: DecoderConfig
    params: FrozenTree
    tokenizer: Tokenizer
    identity: LMIdentity


def load_lm(
    source: str,
    *,
    dtype: str = "float32",
    remat: str = "none",
    revision: str = "",
    sharding_for: ShardingFor | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Loads a frozen LM and its tokenizer.

    Args:
        source: See `spt_jax.models.sources.resolve_source`.
        dtype: ``"float32"`` or ``"bfloat16"``, whatever the files hold.
        remat: Rematerialisation policy; see `DecoderConfig`.
        revision: Branch, tag or commit of a hub id.
        sharding_for: Logical axis names and shape of a (stacked) parameter to its sharding; None puts everything on
            the default device.
        progress: Called with ``("loading weights", parameters done, parameters in all)``.

    Raises:
        UserError: The source, its configuration, its weights or its tokenizer cannot be used; says why.
    """
    found = resolve_source(source, revision)
    config, checkpoint, table, tokenizer = _opened(found)
    config = dataclasses.replace(config, dtype=dtype, remat=remat)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{found.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the LM's vocabulary holds "
            f"{config.vocab_size}; they do not belong together"
        )
    for name, token in {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}.items():
        if token is not None and not 0 <= token < config.vocab_size:
            raise UserError(
                f"{found.path}: the tokenizer's {name} token is {token}; allowed: 0 to {config.vocab_size - 1}, "
                "the LM's vocabulary"
            )
    with ThreadPoolExecutor(1) as executor:
        digest = executor.submit(_sha256, checkpoint.files)
        params = load_params(config, checkpoint, table, sharding_for=sharding_for, progress=progress)
        identity = LMIdentity(found.name, found.revision, digest.result())
    return LanguageModel(config, params, tokenizer, identity)


def load_tokenizer(source: str, revision: str = "") -> Tokenizer:
    """The tokenizer of `source` alone; from the hub, no weights are fetched.

    Raises:
        UserError: As `load_lm`.
    """
    found = resolve_source(source, revision, weights=False)
    if found.kind == "gguf":
        return tokenizer_of_gguf(GGUFFile(found.path).metadata, str(found.path))
    return tokenizer_of_folder(found.path)


def _opened(found: Source) -> tuple[DecoderConfig, Checkpoint, TensorTable, Tokenizer]:
    """Everything but the weights' values, so that what cannot work is refused before memory is taken."""
    if found.kind == "gguf":
        file = GGUFFile(found.path)
        family = family_of_gguf(file.metadata, file.where)
        config = _checked(family.config_from_gguf, file.where, file.metadata, file.shapes)
        return config, file, family.gguf, tokenizer_of_gguf(file.metadata, file.where)
    where = found.path / "config.json"
    try:
        fields = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} is not a JSON object")
    family = family_of_hf(fields, str(where))
    config = _checked(family.config_from_hf, str(where), fields)
    folder = SafetensorsFolder(found.path)
    return config, folder, family.hf, tokenizer_of_folder(found.path)


def _checked(read: Any, where: str, *args: Any) -> DecoderConfig:
    try:
        return read(*args, where)
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a field has a value that does not describe a model ({error})") from error


def _sha256(files: tuple[Path, ...]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
