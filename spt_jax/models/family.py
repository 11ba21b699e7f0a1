"""What a decoder family is: how its files describe it and where each of their tensors goes in our tree."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor lies in a file, given the shape of our parameter (of one layer, where layers are stacked).

    Attributes:
        stored_shape: Our shape to the shape in the file.
        arrange: The file's array and our shape to an array of our shape; a view where that is possible, so that a
            shard of a memory-mapped tensor touches its own pages alone.
    """

    stored_shape: Callable[[Shape], Shape]
    arrange: Callable[[np.ndarray, Shape], np.ndarray]


def linear(num_inputs: int = 1) -> Layout:
    """A kernel stored ``(out, in)``; ours is ``(in..., out...)`` with `num_inputs` input axes."""

    def stored_shape(ours: Shape) -> Shape:
        return math.prod(ours[num_inputs:]), math.prod(ours[:num_inputs])

    return Layout(stored_shape, lambda array, ours: array.T.reshape(ours))


AS_STORED = Layout(lambda ours: ours, lambda array, ours: array)
"""Same shape here and there: norms, the embedding table."""

FLAT = Layout(lambda ours: (math.prod(ours),), lambda array, ours: array.reshape(ours))
"""A vector here split over several axes: the bias of a projection to heads."""


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one kind of tensor goes.

    Attributes:
        path: Our parameter, ``"layers/attention/q_proj/kernel"``. A rule whose parameter a configuration does not
            have (a bias, an untied head) is passed over.
        name: The tensor in the file, with ``{layer}`` for the layer's number where layers are stacked.
        layout: How it lies there.
    """

    path: str
    name: str
    layout: Layout


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """The tensors of a family in one kind of file.

    Attributes:
        rules: One for each parameter that any configuration of the family may have.
        ignored: Regular expressions of tensors that carry nothing the configuration does not say.
        tied_head: The head's and the embedding table's name; a head found in a file whose configuration ties it must
            equal the table.
    """

    rules: tuple[TensorRule, ...]
    ignored: tuple[str, ...]
    tied_head: tuple[str, str]

    def ignores(self, name: str) -> bool:
        """Whether the tensor `name` may be left unread."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


@dataclasses.dataclass(frozen=True)
class Family:
    """A decoder family as data: adding one is a table like `spt_jax.models.llama` and a parity test.

    Attributes:
        name: Its name in messages.
        model_types: ``model_type`` in a Hugging Face ``config.json``.
        architectures: Class names accepted under ``architectures`` there.
        gguf_architectures: ``general.architecture`` in a GGUF file.
        config_from_hf: The parsed ``config.json`` and where it lies to a `DecoderConfig`; raises `UserError` for what
            the decoder cannot do.
        config_from_gguf: A GGUF file's metadata, its tensors' shapes and its place, to a `DecoderConfig`; likewise.
        hf: Its tensors in safetensors files.
        gguf: Its tensors in GGUF files.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any], str], DecoderConfig]
    config_from_gguf: Callable[[Mapping[str, Any], Mapping[str, Shape], str], DecoderConfig]
    hf: TensorTable
    gguf: TensorTable


def required(fields: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of `key`, which a model description cannot do without; `UserError` when it is absent."""
    if fields.get(key) is None:
        raise UserError(f"{where} has no field {key!r}, which describes the model; the file is incomplete")
    return fields[key]


def refuse_unless(fields: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> None:
    """Raises `UserError` when `key` is present with a value outside `allowed`."""
    if key in fields and fields[key] not in allowed:
        names = ", ".join("none" if value is None else repr(value) for value in allowed)
        raise UserError(f"{where}: {key} is {fields[key]!r}, which is not supported; supported: {names}")
