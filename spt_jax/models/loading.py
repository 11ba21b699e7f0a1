"""`load_lm`: a frozen LM from wherever it is, with its tokenizer and its identity."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.models.decoder import FrozenTree
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.family import Family, TensorTable
from spt_jax.models.families.registry import family_of_gguf, family_of_hf
from spt_jax.models.files.file_hash import sha256_of_files
from spt_jax.models.files.gguf_file import GGUFFile
from spt_jax.models.files.sources import Source, resolve_source
from spt_jax.models.files.weight_files import weights_of_folder
from spt_jax.models.kept_weights import is_worth_keeping, kept_params
from spt_jax.models.random_lm import byte_tokenizer, random_lm_params, shape_sha256
from spt_jax.models.shapes import shape_fields
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.gguf_tokenizer import tokenizer_of_gguf
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.models.weights import Checkpoint, Progress, ShardingFor, load_params


@dataclasses.dataclass(frozen=True)
class LMIdentity:
    """Which frozen LM a checkpoint was trained for.

    Attributes:
        name: The source as the user wrote it.
        revision: The hub's commit or the package's version; else empty.
        sha256: Of the weight files' bytes: of the file itself where there is one, else of the lines
            ``{file name} {sha256 of the file}`` in the order of names. The same weights saved in other shards or
            another type have another hash. Of a ``shape:NAME``, of its fields and its seed.
    """

    name: str
    revision: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, str]) -> LMIdentity:
        """From `to_dict`'s object.

        Raises:
            TypeError: A field is missing, unknown, or no text.
        """
        if not all(isinstance(value, str) for value in fields.values()):
            raise TypeError("a field is no text")
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


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedLM:
    """Everything known of an LM before its weights are read.

    Attributes:
        source: Where it is.
        family: Its family.
        fields: Its description there: ``config.json``, or a GGUF file's metadata.
        config: The decoder.
        tokenizer: Its tokenizer, which fits the decoder's vocabulary.
        checkpoint: Its weight files, opened; None for a ``shape:NAME`` and where `open_lm` was told to leave them.
        table: The family's tensors in such files.
    """

    source: Source
    family: Family
    fields: Mapping[str, Any]
    config: DecoderConfig
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None
    table: TensorTable

    def load(self, *, sharding_for: ShardingFor | None = None, progress: Progress | None = None) -> LanguageModel:
        """The LM with its weights, from a source that was opened with them.

        Args:
            sharding_for: As for `load_lm`; so is `progress`.

        Raises:
            UserError: The weights cannot be used; says why.
        """
        name, config, checkpoint = self.source.name, self.config, self.checkpoint
        if checkpoint is None:
            assert self.source.kind == "shape", f"{name} was opened without its weights"
            params = random_lm_params(config, sharding_for=sharding_for, progress=progress)
            return LanguageModel(config, params, self.tokenizer, LMIdentity(name, "", shape_sha256(self.fields)))
        load = partial(load_params, config, checkpoint, self.table, sharding_for=sharding_for, progress=progress)
        if is_worth_keeping(config, checkpoint):
            sha256 = sha256_of_files(checkpoint.files)
            params = kept_params(load, config, sha256, sharding_for=sharding_for, progress=progress)
        else:
            params, sha256 = _loaded_and_hashed(load, checkpoint.files)
        return LanguageModel(config, params, self.tokenizer, LMIdentity(name, self.source.revision, sha256))


def load_lm(
    source: str,
    *,
    dtype: str = "float32",
    remat: str = "none",
    revision: str = "",
    context_length: int = 0,
    quantization: str = "none",
    sharding_for: ShardingFor | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Loads a frozen LM and its tokenizer.

    Args:
        source: See `spt_jax.models.files.sources.resolve_source`.
        dtype: ``"float32"`` or ``"bfloat16"``, whatever the files hold.
        remat: Rematerialisation policy; see `DecoderConfig`.
        revision: Branch, tag or commit of a hub id.
        context_length: Tokens for which rotary positions that depend on the length are made; 0 for the length the LM
            was trained for. See `DecoderConfig.with_context_length`.
        quantization: ``"none"``, ``"int8"`` or ``"int4"``: how the blocks' kernels are kept.
        sharding_for: Logical axis names and shape of a (stacked) parameter to its sharding; None puts everything on
            the default device.
        progress: Called with ``("loading weights", parameters done, parameters in all)``.

    Raises:
        UserError: The source, its configuration, its weights or its tokenizer cannot be used; says why.
    """
    opened = open_lm(
        source,
        dtype=dtype,
        remat=remat,
        revision=revision,
        context_length=context_length,
        quantization=quantization,
    )
    return opened.load(sharding_for=sharding_for, progress=progress)


def _loaded_and_hashed(load: Callable[[], FrozenTree], files: tuple[Path, ...]) -> tuple[FrozenTree, str]:
    unwanted = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        digest = executor.submit(sha256_of_files, files, unwanted)
        try:
            params = load()
        except BaseException:
            unwanted.set()  # a refusal does not wait for the rest of a large file
            raise
        return params, digest.result()


def open_lm(
    source: str,
    *,
    dtype: str = "float32",
    remat: str = "none",
    revision: str = "",
    context_length: int = 0,
    quantization: str = "none",
    weights: bool = True,
) -> OpenedLM:
    """Finds an LM and reads all but its weights' values, so that what cannot work is refused before memory is taken.

    Args:
        source: As for `load_lm`; so are `dtype`, `remat`, `revision`, `context_length` and `quantization`.
        weights: False leaves a folder's weight files unopened, and a hub's unfetched.

    Raises:
        UserError: As `load_lm`, but for what only the weights' values or names can show.
    """
    found = resolve_source(source, revision, weights=weights)
    checkpoint: Checkpoint | None = None
    if found.kind == "gguf":
        file = GGUFFile(found.path)
        fields: Mapping[str, Any] = file.metadata
        family = family_of_gguf(fields, file.where)
        config = _checked(family.config_from_gguf, file.where, fields, file.shapes)
        assert family.gguf_tensors is not None
        checkpoint, table = file, family.gguf_tensors
        tokenizer = tokenizer_of_gguf(fields, file.where)
    else:
        where = source if found.kind == "shape" else str(found.path / "config.json")
        fields = shape_fields(source) if found.kind == "shape" else json_object(found.path / "config.json")
        family = family_of_hf(fields, where)
        config, table = _checked(family.config_from_hf, where, fields), family.hf_tensors
        if found.kind == "shape":
            tokenizer = byte_tokenizer()
        else:
            checkpoint = weights_of_folder(found.path) if weights else None
            tokenizer = tokenizer_of_folder(found.path, str(fields["model_type"]))
    config = dataclasses.replace(config, dtype=dtype, remat=remat, quantization=quantization)
    config = config.with_context_length(context_length) if context_length else config
    tokenizer = tokenizer.fitted(config.vocab_size, source if found.kind == "shape" else str(found.path))
    return OpenedLM(found, family, fields, config, tokenizer, checkpoint, table)


def load_tokenizer(source: str, revision: str = "") -> Tokenizer:
    """The tokenizer of `source` alone; from the hub, no weights are fetched.

    Raises:
        UserError: As `load_lm`.
    """
    found = resolve_source(source, revision, weights=False)
    match found.kind:
        case "gguf":
            return tokenizer_of_gguf(GGUFFile(found.path).metadata, str(found.path))
        case "shape":
            shape_fields(source)
            return byte_tokenizer()
        case _:
            return tokenizer_of_folder(found.path)


def _checked(read: Any, where: str, *args: Any) -> DecoderConfig:
    try:
        return read(*args, where)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: a field has a value that does not describe a model ({error})") from error
